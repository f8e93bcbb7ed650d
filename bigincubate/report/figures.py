"""Figures, as SVG in the text color of the surrounding page, or as PNG."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from io import StringIO
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import MissingDependencyError
from ..tasks.metric import Metric
from .console_tables import common_unit
from .run_data import COSTS, LOSS, NO_COST, PhaseData, TrainingRoute

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ["#3d7edb", "#e0793a", "#2a9d8f", "#c9507a", "#8f6fc4", "#7c9c3c", "#b58a1b", "#5f8ea8"]
INK = "#22223b"  # text color of a PNG
PLACEHOLDER = "#012345"  # text color while an SVG is drawn, then replaced by the text color of the page
LabeledRoutes = Sequence[tuple[str, TrainingRoute]]
Drawn = TypeVar("Drawn")


def import_matplotlib() -> Any:
    """Import and return matplotlib, which is an optional dependency.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure
        import matplotlib.style
    except ImportError as error:
        raise MissingDependencyError(f"figures need matplotlib ({error}): pip install 'bigincubate[report]'") from None
    return matplotlib


def render_svg(draw: Callable[[Drawn], Figure], drawn: Drawn) -> str:
    """Return a figure as an SVG element without URLs or fonts, in the text color of the page."""
    out = StringIO()
    with _style(PLACEHOLDER):
        draw(drawn).savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href").replace(PLACEHOLDER, "currentColor")
    text = re.sub(r' id="[A-Za-z0-9]+_\d+"', "", text)  # such as figure_1, which every figure has
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    return re.sub(r' (height|width)="[^"]*"', "", text, count=2)  # only those of the svg element itself


def save_png(draw: Callable[[Drawn], Figure], drawn: Drawn, file: Path) -> None:
    """Write a figure as a PNG file."""
    with _style(INK):
        draw(drawn).savefig(file, dpi=150)


def _style(ink: str) -> AbstractContextManager[None]:
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    return import_matplotlib().style.context([Path(__file__).with_name("figures.mplstyle"), dict.fromkeys(names, ink)])


def pick_colors(count: int) -> list[str]:
    """Return colors that are distinguishable on light and dark backgrounds."""
    if count <= len(COLORS):
        return COLORS[:count]
    matplotlib = import_matplotlib()
    ramp = matplotlib.colormaps["viridis"]
    return [matplotlib.colors.to_hex(ramp(0.15 + 0.7 * k / (count - 1))) for k in range(count)]


def running_mean(values: Sequence[float]) -> list[float]:
    """Return an exponential moving average over an eighth of the curve, because losses of mixed batches are noisy."""
    weight = 1 - 1 / max(1, len(values) / 8)
    return list(accumulate(values, lambda mean, value: weight * mean + (1 - weight) * value))


def phases_with_start_cost(route: TrainingRoute) -> Iterator[tuple[PhaseData, dict[str, float]]]:
    """Yield each phase with the total cost of all previous phases."""
    before = dict(NO_COST)
    for phase in route.phases:
        yield phase, before
        before = {key: before[key] + phase.spent[key] for key in COSTS}


def join_titles(metrics: Iterable[Metric]) -> str:
    """Return the titles of metrics as the start of a sentence: ``Top-1``, or ``Top-1 and loss``."""
    text = " and ".join(dict.fromkeys(metric.title for metric in metrics))
    return text[:1].upper() + text[1:]


def _axis_label(metrics: Iterable[Metric]) -> str:
    return " / ".join(dict.fromkeys(", ".join(filter(None, (metric.title, metric.unit))) for metric in metrics))


def draw_progress(routes: LabeledRoutes) -> Figure:
    """Plot the headline metric and the loss on the validation split against each cost, with one color per route.

    Lines are complete models (meta model, assembled, fine-tuned), rings are hybrids, pale lines are the training loss.
    """
    figure = import_matplotlib().figure.Figure(figsize=(12.4, 5.6))
    axes = figure.subplots(2, len(COSTS), sharex="col", sharey="row")
    for color, (label, route) in zip(pick_colors(len(routes)), routes, strict=True):
        for column, cost in enumerate(COSTS):
            _draw_route(axes[0][column], axes[1][column], route, cost, color, label)
    unit = common_unit(route.last.unit for _, route in routes)
    for column, title in enumerate(("epochs", unit, "training FLOPs", "training seconds")):
        axes[1][column].set_xlabel(title)
        axes[1][column].set_xlim(left=0)
        axes[1][column].ticklabel_format(axis="x", style="sci", scilimits=(-3, 5), useMathText=True)
    axes[0][0].set_ylabel(_axis_label(route.last.headline for _, route in routes)), axes[1][0].set_ylabel("loss")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper left", ncols=min(4, len(routes)))
    return figure


def _draw_route(scores: Axes, losses: Axes, route: TrainingRoute, cost: str, color: str, label: str) -> None:
    for phase, before in phases_with_start_cost(route):
        x, y = _columns([(before[cost] + p.cost[cost], p.loss) for p in phase.points if p.loss is not None])
        if x:
            losses.plot(x, running_mean(y), color=color, alpha=0.35, lw=1)
    for axis, name in ((scores, route.last.headline.name), (losses, LOSS)):
        _draw_validation(axis, route, name, cost, color, label)


def _draw_validation(axis: Axes, route: TrainingRoute, name: str, cost: str, color: str, label: str) -> None:
    """Plot one metric of the validation split."""
    lines: list[list[tuple[float, float]]] = [[]]  # of the meta model, and of the assembled model
    for phase, before in phases_with_start_cost(route):
        if phase is route.last and route.assembled:
            lines.append([(before[cost], value) for key, value in route.assembled["metrics"].items() if key == name])
        points = [(before[cost] + p.cost[cost], p.metrics[name]) for p in phase.points if name in p.metrics]
        if phase.planned["module"] is None:
            lines[-1] += points
        else:
            axis.plot(*_columns(points), "o", ms=4, mfc="none", mec=color, mew=1)
    for part, line in enumerate(lines):
        axis.plot(*_columns(line), "o-", ms=3.5, color=color, label=label if part == 0 else None)
    if len(lines) > 1 and all(lines):
        axis.plot(*_columns([lines[0][-1], lines[1][0]]), ":", lw=1, alpha=0.6, color=color)


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def draw_module_curves(routes: LabeledRoutes) -> Figure:
    """Plot the training loss of each module against its epochs, with one panel per run."""
    figure = import_matplotlib().figure.Figure(figsize=(12.4, 3.2))
    panels = figure.subplots(1, len(routes), sharey=True, squeeze=False)[0]
    for axis, (label, route) in zip(panels, routes, strict=True):
        for color, phase in zip(pick_colors(len(route.modules)), route.modules, strict=True):
            x, y = _columns([(point.cost["epochs"], point.loss) for point in phase.points if point.loss is not None])
            axis.plot(x, running_mean(y), color=color, label=phase.title)
        axis.set_xlabel("epochs of the module"), axis.set_title(label)
        if 0 < len(route.modules) <= len(COLORS):
            axis.legend(ncols=2)
    panels[0].set_ylabel("training loss")
    return figure


def draw_compatibility(route: TrainingRoute) -> Figure:
    """Plot the headline metric of each module as a hybrid and in its partial assembly, in the order of completion."""
    figure = import_matplotlib().figure.Figure(figsize=(12.4, 2.9))
    axis = figure.subplots()
    done = [(phase, phase.status["partial"]) for phase in route.modules if phase.result and phase.status["partial"]]
    done.sort(key=lambda each: len(each[1]["joined"]))
    places = range(len(done))
    headline = route.modules[0].headline
    if route.meta is not None and (reference := headline.value_in(route.meta.result)) is not None:
        axis.axhline(reference, color=import_matplotlib().rcParams["text.color"], lw=1, ls=":", label="meta model")
    hybrids = [phase.score for phase, _ in done if phase.score is not None]
    partial = [value for _, scores in done if (value := headline.value_in(scores)) is not None]
    axis.vlines(places, hybrids, partial, color=COLORS[0], alpha=0.4, lw=1)
    axis.plot(places, hybrids, "o", ms=10, mfc="none", mec=COLORS[0], label="as a hybrid")
    axis.plot(places, partial, "o", ms=7, color=COLORS[1], label="with the previously finished modules")
    axis.set_xticks(places, [f"{phase.title}\n{len(s['joined'])} of {s['modules']} modules" for phase, s in done])
    axis.set_xlim(-0.5, len(done) - 0.5), axis.set_ylabel(_axis_label([headline]))
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def draw_before_after(routes: LabeledRoutes) -> Figure:
    """Plot the headline metric of the hybrids, the assembled model and the final model, with one line per route."""
    figure = import_matplotlib().figure.Figure(figsize=(12.4, 0.9 + 0.36 * len(routes)))
    axis = figure.subplots()
    for at, (_, route) in enumerate(routes):
        values = route.last.headline.value_in
        hybrids = [value for phase in route.modules if (value := values(phase.result)) is not None]
        assembled, trained = values(route.assembled), values(route.last.result)
        ends = [value for value in (assembled, trained) if value is not None]
        axis.hlines([at] * (len(ends) > 1), min(ends, default=0), max(ends, default=0), color=COLORS[0], alpha=0.4)
        axis.plot(hybrids, [at] * len(hybrids), "o", ms=5, mfc="none", mec=COLORS[2], label="hybrids")
        if assembled is not None:
            axis.plot(assembled, at, "D", color=COLORS[1], label="assembled")
        if trained is not None:
            axis.plot(trained, at, "o", ms=8, color=COLORS[0], label="trained")
    axis.set_yticks(range(len(routes)), [label for label, _ in routes]), axis.set_ylim(len(routes) - 0.5, -0.5)
    axis.set_xlabel(_axis_label(route.last.headline for _, route in routes))
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=3)
    return figure
