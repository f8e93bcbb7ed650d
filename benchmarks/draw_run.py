"""Draw a finished run as one figure: the pipeline with its scores, and the training curves below it.

python benchmarks/draw_run.py RUN_DIR --out docs/pipeline.svg
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, from anywhere

from bigincubate.tasks.metric import planned_metrics

WIDTH, HEIGHT = 960, 470
COLORS = ["#d1495b", "#edae49", "#2a9d8f", "#457b9d", "#8e6c8a", "#6a994e", "#bc6c25", "#577590"]
INK, SOFT, META, FINE = "#22223b", "#8d99ae", "#4a4e69", "#1d7874"


def text(
    x: float, y: float, words: str, size: int = 13, fill: str = INK, anchor: str = "middle", bold: str = ""
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{weight}>{words}</text>'
    )


def box(x: float, y: float, w: float, h: float, fill: str, opacity: float = 1.0) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="3" fill="{fill}" opacity="{opacity}"/>'


def arrow(x: float, y: float, length: float) -> str:
    path = f"M{x} {y} h{length} m-5 -4 l5 4 l-5 4"
    return f'<path d="{path}" fill="none" stroke="{SOFT}" stroke-width="1.6"/>'


def stack(x: float, y: float, depths: list[int], fills: list[str], width: float) -> str:
    """Draw modules next to each other, with one bar per block; ``width`` is the total width."""
    total, parts, at = sum(depths), [], x
    bar = (width - 4 * (len(depths) - 1)) / total
    for depth, fill in zip(depths, fills, strict=True):
        for _ in range(depth):
            parts.append(box(at, y, max(bar - 0.8, 0.8), 26, fill, 1.0))
            at += bar
        at += 4
    return "".join(parts)


def losses(folder: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]


def smooth(points: list[tuple[int, float]], weight: float = 0.8) -> list[tuple[int, float]]:
    out, value = [], points[0][1]
    for step, loss in points:
        value = weight * value + (1 - weight) * loss
        out.append((step, value))
    return out


def curve(points: list[tuple[int, float]], x: float, y: float, w: float, h: float, low: float, high: float) -> str:
    last = points[-1][0]
    scaled = [
        (x + w * step / last, y + h - h * (math.log(max(loss, low)) - math.log(low)) / (math.log(high) - math.log(low)))
        for step, loss in smooth(points)
    ]
    return "M" + " L".join(f"{a:.1f} {b:.1f}" for a, b in scaled)


def draw(run: Path) -> str:
    plan, summary = json.loads((run / "plan.json").read_text()), json.loads((run / "summary.json").read_text())
    meta = [sum(stages) for stages in plan["meta_depths"]]
    target = [sum(stages) for stages in plan["target_depths"]]
    count = len(target)
    colors = [COLORS[k % len(COLORS)] for k in range(count)]
    steps = {row["key"]: row["steps"] for row in plan["rows"]}

    metric = planned_metrics(plan["rows"][0])[0]

    def score(result: dict[str, Any]) -> str:
        return metric.text(metric.value_in(result), unit=True)

    parts = [
        text(120, 26, "1. meta model", bold="b"),
        text(405, 26, f"2. {count} modules, trained separately", bold="b"),
    ]
    parts += [text(650, 26, "3. assembled", bold="b"), text(855, 26, "4. fine-tuned", bold="b")]
    parts += [stack(60, 92, meta, [META] * count, 120), text(120, 138, score(summary["meta"]), 15, META, bold="b")]
    parts.append(text(120, 158, f"{sum(meta)} blocks, {steps['pretrain']:,} steps", 11, SOFT))
    for k in range(count):
        y = 44 + k * 34
        depths = [target[j] if j == k else meta[j] for j in range(count)]
        parts.append(stack(300, y, depths, [colors[j] if j == k else META for j in range(count)], 160))
        parts.append(text(470, y + 18, score(summary["modules"][k]), 13, colors[k], "start", "b"))
    parts.append(text(385, 44 + count * 34 + 12, "dark blocks are frozen; modules do not communicate", 11, SOFT))
    parts += [stack(570, 92, target, colors, 160), text(650, 138, score(summary["assembled"]), 15, bold="b")]
    parts.append(text(650, 158, f"{sum(target)} blocks, not yet trained together", 11, SOFT))
    parts += [stack(775, 92, target, [FINE] * count, 160)]
    parts.append(text(855, 138, score(summary["finetune"]), 15, FINE, bold="b"))
    parts.append(text(855, 158, f"{steps['finetune']:,} steps", 11, SOFT))
    parts += [arrow(205, 105, 70), arrow(530, 105, 28), arrow(740, 105, 24)]

    panels = [("meta model", 40.0, [(run / "meta", META)])]
    panels.append(("modules", 350.0, [(run / "modules" / f"{k:02d}", colors[k]) for k in range(count)]))
    panels.append(("fine-tuning", 660.0, [(run / "finetune", FINE)]))
    curves = {folder: losses(folder) for _, _, lines in panels for folder, _ in lines}
    values = [loss for points in curves.values() for _, loss in smooth(points)]
    low, high = min(values), max(values)
    top, height, width = 250.0, 170.0, 260.0
    for title, x, lines in panels:
        parts.append(box(x, top, width, height, "#f4f4f8"))
        parts.append(text(x + 8, top - 8, f"{title}: training loss", 12, INK, "start"))
        for folder, color in lines:
            path = curve(curves[folder], x, top, width, height, low, high)
            parts.append(f'<path d="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        parts.append(
            text(
                x + width,
                top + height + 16,
                f"step {max(p[-1][0] for p in [curves[f] for f, _ in lines]):,}",
                11,
                SOFT,
                "end",
            )
        )
        parts.append(text(x + 4, top + 12, f"{high:.2g}", 10, SOFT, "start"))
        parts.append(text(x + 4, top + height - 4, f"{low:.2g}", 10, SOFT, "start"))
    parts.append(
        text(
            40,
            HEIGHT - 10,
            f"log scale; scores are {metric.title} on held-out {plan['rows'][0]['unit']}",
            11,
            SOFT,
            "start",
        )
    )
    style = "font-family:Helvetica,Arial,sans-serif"
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" style="{style}">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n{body}\n</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.write_text(draw(options.run))


if __name__ == "__main__":
    main()
