"""Compare runs, with one row for each route (incubation, expansion or end-to-end training) of each run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import name_in_errors, write_text
from . import figures
from .console_tables import common_unit, metric_columns
from .figures import LabeledRoutes
from .html import NONE, cost_numbers, figure, html_page, join_markup, score_number, table, tag
from .run_data import RunData


def label_routes(runs: Sequence[RunData]) -> LabeledRoutes:
    """Return the routes of all runs with labels.

    The label is the run's path relative to the common parent of all runs, plus ``, end to end`` for that route.
    """
    paths = [run.run.path.resolve() for run in runs]
    base = Path(os.path.commonpath([path.parent for path in paths]))
    return [
        (f"{path.relative_to(base)}{', end to end' if route.is_baseline else ''}", route)
        for path, run in zip(paths, runs, strict=True)
        for route in run.routes
    ]


def compare_json(routes: LabeledRoutes) -> list[dict[str, Any]]:
    """Return the comparison as JSON values.

    Returns:
        A dict per route: run, route, missing (titles of unfinished phases); metrics of the final model by name,
        headline (the name of the main metric), samples (number of samples evaluated); metrics of the meta model, the
        hybrids, the partial assemblies and the assembled model, or None; unit; total epochs, seen, flops and seconds;
        path_seconds, the time if modules train in parallel.
    """
    return [
        {
            "run": label,
            "route": route.name,
            "missing": route.missing,
            "metrics": _metrics(route.last.result),
            "headline": route.last.headline.name,
            "samples": route.last.result and route.last.result["samples"],
            "meta": _metrics(route.meta.result if route.meta else None),
            "hybrids": [_metrics(module.result) for module in route.modules],
            "partial": [_metrics(module.status["partial"]) for module in route.modules],
            "assembled": _metrics(route.assembled),
            "unit": route.last.unit,
            **route.spent,
            "path_seconds": route.path("seconds"),
        }
        for label, route in routes
    ]


def _metrics(result: dict[str, Any] | None) -> dict[str, float] | None:
    return result and result["metrics"]


def compare_page(routes: LabeledRoutes) -> str:
    """Return the comparison as an HTML page."""
    metrics = metric_columns(route.last.metrics for _, route in routes)
    unit = common_unit(route.last.unit for _, route in routes)
    scores = [*(metric.column for metric in metrics), "meta model", "hybrids", "assembled"]
    lines = []
    for label, route in routes:
        hybrids = [score_number(phase.headline, phase.result) for phase in route.hybrid_range]
        spread = join_markup(hybrids[0], " to ", hybrids[1]) if hybrids else NONE
        missing = tag("span", f" (missing: {', '.join(route.missing)})", class_="bad missing") if route.missing else ""
        lines.append(
            [
                join_markup(label, missing),
                *(score_number(metric, route.last.result) for metric in metrics),
                score_number(route.meta.headline, route.meta.result) if route.meta else NONE,
                spread,
                score_number(route.last.headline, route.assembled),
                *cost_numbers(route.spent),
            ]
        )
    headlines = figures.join_titles(route.last.headline for _, route in routes)
    costs = tag("p", "Nothing has been logged yet.")
    modules = []
    if any(figures.has_points(route) for _, route in routes):
        costs = figure(
            figures.render_svg(figures.draw_progress, routes),
            "Phases in order. Dots and lines: complete models (meta model, assembled, fine-tuned; end to end);"
            " rings: modules as hybrids; pale lines: training loss, smoothed.",
        )
    if any(figures.has_scores(route) for _, route in routes):
        drawing = figures.render_svg(figures.draw_before_after, routes)
        before_after = figure(drawing, f"{headlines} on the validation {unit}.")
    else:
        before_after = tag("p", "No module and no complete model has been evaluated yet.")
    if incubated := _with_modules(routes):
        curves = figures.render_svg(figures.draw_module_curves, incubated)
        modules = [tag("h2", "Modules"), figure(curves, "Training loss of each module in its hybrid, smoothed.")]
    return html_page(
        f"Comparison of {len(routes)}",
        tag("h1", "Comparison"),
        tag("p", f"Scores on the validation {unit}. Costs are sums over all phases of a row.", class_="soft"),
        table(["run", *scores, "epochs", unit, "FLOPs", "time"], lines),
        tag("h2", "Cost"),
        costs,
        tag("h2", "Before and after fine-tuning"),
        before_after,
        *modules,
    )


def _with_modules(routes: LabeledRoutes) -> LabeledRoutes:
    """Return the routes with modules; none if no module has been logged."""
    incubated = [(label, route) for label, route in routes if route.modules]
    return incubated if any(module.points for _, route in incubated for module in route.modules) else []


def write_comparison(routes: LabeledRoutes, out: Path) -> list[Path]:
    """Write ``compare.html``, and its figures as PNG files.

    Returns:
        The paths of the files.

    Raises:
        MissingDependencyError: matplotlib is not installed; nothing is written.
    """
    drawings = {"progress": (figures.draw_progress, routes), "before-after": (figures.draw_before_after, routes)}
    if incubated := _with_modules(routes):
        drawings["modules"] = (figures.draw_module_curves, incubated)
    page = compare_page(routes)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "compare.html", page)
    for name, (draw, drawn) in drawings.items():
        with name_in_errors(out / f"{name}.png"):
            figures.save_png(draw, drawn, out / f"{name}.png")
    return sorted([out / "compare.html", *(out / f"{name}.png" for name in drawings)])
