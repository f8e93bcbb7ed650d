"""Several runs beside each other: a row for each way in which one trained its model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import figures, html
from .html import NONE, data, figure, flops, loss, table, tag, top1
from .run_data import RunFacts, Way

Labelled = Sequence[tuple[str, Way]]


def labelled(runs: Sequence[RunFacts]) -> list[tuple[str, Way]]:
    """Every way of every run under a name of its own: the run's folder, as far as it differs, and ``end to end``."""
    paths = [run.run.path.resolve() for run in runs]
    base = Path(os.path.commonpath([path.parent for path in paths]))
    return [
        (f"{path.relative_to(base)}{'' if way.name == 'incubated' else ', end to end'}", way)
        for path, run in zip(paths, runs, strict=True)
        for way in run.ways
    ]


def compare_json(ways: Labelled) -> list[dict[str, Any]]:
    """A row a way: ``run``, ``way``, ``missing`` (titles of phases); ``top1`` (percent) and ``loss`` at the end, of the
    ``meta`` model, of the ``hybrids`` and of what was ``assembled``, None where they are not there; and what all of
    it cost: ``epochs``, ``images``, ``flops``, ``seconds``; ``path_seconds`` with modules beside each other."""
    rows = []
    for label, way in ways:
        last, meta = way.last.result, way.meta.result if way.meta else None
        rows.append(
            {
                "run": label,
                "way": way.name,
                "missing": way.missing,
                "top1": last and last["top1"],
                "loss": last and last["loss"],
                "samples": last and last["samples"],
                "meta": meta and meta["top1"],
                "hybrids": [module.result and module.result["top1"] for module in way.modules],
                "partial": [module.status["partial"] and module.status["partial"]["top1"] for module in way.modules],
                "assembled": way.assembled and way.assembled["top1"],
                **way.spent,
                "path_seconds": way.path_seconds,
            }
        )
    return rows


def compare_page(ways: Labelled) -> str:
    """The comparison as a page of its own."""
    head = ["run", "top-1 %", "loss", "meta model", "hybrids", "assembled", "epochs", "images", "FLOPs", "time"]
    lines = []
    for label, way in ways:
        hybrids = sorted((m.result for m in way.modules if m.result), key=lambda result: float(result["top1"]))
        spread = html.join(top1(hybrids[0]), " to ", top1(hybrids[-1])) if hybrids else NONE
        missing = tag("span", f" (not there yet: {', '.join(way.missing)})", class_="bad") if way.missing else ""
        lines.append(
            [
                html.join(label, missing),
                *(top1(way.last.result), loss(way.last.result)),
                *(top1(way.meta.result if way.meta else None), spread, top1(way.assembled)),
                data(way.spent["epochs"], f"{way.spent['epochs']:.3g}"),
                *(html.count(way.spent["images"]), flops(way.spent["flops"]), html.seconds(way.spent["seconds"])),
            ]
        )
    grown = [(label, way) for label, way in ways if way.modules]
    return html.page(
        f"Comparison of {len(ways)}",
        tag("h1", "Comparison"),
        tag("p", "Scores on the validation images. Costs are those of all phases of a row together.", class_="soft"),
        table(head, lines),
        tag("h2", "What it took"),
        figure(
            figures.svg(lambda: figures.progress(ways)),
            "Phases one after another. Dots and lines: whole models (meta model, assembled, fine-tuned; end to end);"
            " rings: modules as hybrids; faint: loss of training, smoothed.",
        ),
        tag("h2", "Before and after fine-tuning"),
        figure(figures.svg(lambda: figures.before_after(ways)), "Top-1 on the validation images."),
        *(
            (
                tag("h2", "Modules"),
                figure(figures.svg(lambda: figures.module_curves(grown)), "Each module in its hybrid; smoothed."),
            )
            if grown
            else ()
        ),
    )


def write_comparison(ways: Labelled, out: Path) -> list[Path]:
    """``compare.html``, and the same drawings as pictures."""
    out.mkdir(parents=True, exist_ok=True)
    drawings = {"progress": figures.progress, "before-after": figures.before_after}
    grown = [(label, way) for label, way in ways if way.modules]
    (out / "compare.html").write_text(compare_page(ways))
    for name, draw in drawings.items():
        figures.png(lambda draw=draw: draw(ways), out / f"{name}.png")  # type: ignore[misc]
    if grown:
        figures.png(lambda: figures.module_curves(grown), out / "modules.png")
    return sorted([out / "compare.html", *(out / f"{name}.png" for name in [*drawings, *["modules"] * bool(grown)])])
