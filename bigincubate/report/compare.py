"""Several runs beside each other: a row for each way in which one trained its model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import figures, html
from .console_tables import common_unit, metric_columns
from .html import NONE, data, figure, flops, score, table, tag
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
    """A row a way: ``run``, ``way``, ``missing`` (titles of phases); ``metrics`` by name at the end, on ``samples``, of
    which ``headline`` names one; those of the ``meta`` model, of the ``hybrids``, of ``partial`` assemblies and of what
    was ``assembled``, None where they are not there; and what all of it cost: ``epochs``, ``seen`` (in ``unit``),
    ``flops``, ``seconds``; ``path_seconds`` with modules beside each other."""
    rows = []
    for label, way in ways:
        last, meta = way.last.result, way.meta.result if way.meta else None
        partial = [module.status["partial"] for module in way.modules]
        rows.append(
            {
                "run": label,
                "way": way.name,
                "missing": way.missing,
                "metrics": _metrics(last),
                "headline": way.last.headline.name,
                "samples": last and last["samples"],
                "meta": _metrics(meta),
                "hybrids": [_metrics(module.result) for module in way.modules],
                "partial": [_metrics(result) for result in partial],
                "assembled": _metrics(way.assembled),
                "unit": way.last.unit,
                **way.spent,
                "path_seconds": way.path_seconds,
            }
        )
    return rows


def _metrics(result: dict[str, Any] | None) -> dict[str, float] | None:
    return result and result["metrics"]


def compare_page(ways: Labelled) -> str:
    """The comparison as a page of its own."""
    metrics = metric_columns(way.last.metrics for _, way in ways)
    unit = common_unit(way.last.unit for _, way in ways)
    scores = [*(metric.column for metric in metrics), "meta model", "hybrids", "assembled"]
    lines = []
    for label, way in ways:
        hybrids = [score(phase.headline, phase.result) for phase in way.hybrid_range]
        spread = html.join(hybrids[0], " to ", hybrids[1]) if hybrids else NONE
        missing = tag("span", f" (not there yet: {', '.join(way.missing)})", class_="bad") if way.missing else ""
        lines.append(
            [
                html.join(label, missing),
                *(score(metric, way.last.result) for metric in metrics),
                *(score(way.meta.headline, way.meta.result) if way.meta else NONE, spread),
                score(way.last.headline, way.assembled),
                data(way.spent["epochs"], f"{way.spent['epochs']:.3g}"),
                *(html.count(way.spent["seen"]), flops(way.spent["flops"]), html.seconds(way.spent["seconds"])),
            ]
        )
    grown = [(label, way) for label, way in ways if way.modules]
    headlines = [way.last.headline for _, way in ways]
    return html.page(
        f"Comparison of {len(ways)}",
        tag("h1", "Comparison"),
        tag("p", f"Scores on the validation {unit}. Costs are those of all phases of a row together.", class_="soft"),
        table(["run", *scores, "epochs", unit, "FLOPs", "time"], lines),
        tag("h2", "What it took"),
        figure(
            figures.svg(lambda: figures.progress(ways)),
            "Phases one after another. Dots and lines: whole models (meta model, assembled, fine-tuned; end to end);"
            " rings: modules as hybrids; faint: loss of training, smoothed.",
        ),
        tag("h2", "Before and after fine-tuning"),
        figure(
            figures.svg(lambda: figures.before_after(ways)), f"{figures.titles(headlines)} on the validation {unit}."
        ),
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
