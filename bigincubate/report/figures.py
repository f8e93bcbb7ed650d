"""Figures, as SVG in the text color of the surrounding page, or as PNG.

A panel without data says so in a sentence.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
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
WIDE, NARROW = 12.4, 3.7  # inches; a narrow figure is for phones and has its panels below each other
LARGEST = 1e30  # finite values of this size or larger are not plotted; a diverging model can have such losses
EM = 10 / 72  # size of the text in inches, as in figures.mplstyle
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
        import matplotlib.ticker
    except ImportError as error:
        raise MissingDependencyError(f"figures need matplotlib ({error}): pip install 'bigincubate[report]'") from None
    return matplotlib


def render_svg(draw: Callable[[Drawn, float], Figure], drawn: Drawn) -> str:
    """Return a figure as two SVG elements without URLs or fonts, in the text color of the page.

    The page shows the element of the class ``wide`` or, in a narrow window, that of the class ``narrow``.
    """
    widths = {"wide": WIDE, "narrow": NARROW}
    return "".join(_render_width(draw, drawn, width, name) for name, width in widths.items())


def _render_width(draw: Callable[[Drawn, float], Figure], drawn: Drawn, width: float, name: str) -> str:
    out = StringIO()
    with _style(PLACEHOLDER, f"{draw.__name__} {name}"):
        draw(drawn, width).savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href").replace(PLACEHOLDER, "currentColor")
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)  # such as figure_1, which every figure has
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r' (height|width)="[^"]*"', "", text, count=2)  # only those of the svg element itself
    return text.replace("<svg", f'<svg class="{name}"', 1)


def save_png(draw: Callable[[Drawn, float], Figure], drawn: Drawn, file: Path) -> None:
    """Write a figure as a PNG file."""
    with _style(INK, ""):
        draw(drawn, WIDE).savefig(file, dpi=150)


def _style(ink: str, salt: str) -> AbstractContextManager[None]:
    """Return the style of a figure.

    Args:
        ink: The color of text and axes.
        salt: What the IDs in an SVG are made from, so that equal runs produce equal files, and no two figures of a page
            share an ID.
    """
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    colors = dict.fromkeys(names, ink)
    file = Path(__file__).with_name("figures.mplstyle")
    return import_matplotlib().style.context([file, colors, {"svg.hashsalt": salt}])


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


def has_points(route: TrainingRoute) -> bool:
    """Return whether anything of a route has been logged."""
    return any(phase.points for phase in route.phases)


def has_scores(route: TrainingRoute) -> bool:
    """Return whether the hybrids, the assembled model or the final model of a route have been evaluated."""
    return bool(route.assembled or route.last.result or any(module.result for module in route.modules))


def _say_if_empty(axis: Axes, sentence: str) -> None:
    """Show a sentence instead of the axes of a panel that has no finite value."""
    values: list[Any] = [value for line in axis.get_lines() for value in line.get_ydata()]  # type: ignore[union-attr]
    if not any(map(math.isfinite, values)):
        axis.set_axis_off()
        axis.text(0.5, 0.5, sentence, transform=axis.transAxes, ha="center", va="center")


def _count_columns(labels: Iterable[str], width: float, most: int) -> int:
    """Return how many entries of a legend fit next to each other."""
    longest = max(map(len, labels), default=0)
    return max(1, min(most, int(width / (EM * (0.62 * longest + 4)))))


def draw_progress(routes: LabeledRoutes, width: float) -> Figure:
    """Plot the headline metric and the loss on the validation split against each cost, with one color per route.

    Lines are complete models (meta model, assembled, fine-tuned), rings are hybrids, pale lines are the training loss.
    """
    narrow = width < WIDE
    figure = import_matplotlib().figure.Figure(figsize=(width, 15 if narrow else 5.6))
    axes = _narrow_pairs(figure) if narrow else figure.subplots(2, len(COSTS), sharex="col", sharey="row")
    for color, (label, route) in zip(pick_colors(len(routes)), routes, strict=True):
        shown = label if has_points(route) else f"{label} (nothing logged yet)"
        for column, cost in enumerate(COSTS):
            _draw_route(axes[0][column], axes[1][column], route, cost, color, shown)
    unit = common_unit(route.last.unit for _, route in routes)
    for column, title in enumerate(("epochs", unit, "training FLOPs", "training seconds")):
        axes[1][column].set_xlabel(title)
        axes[1][column].set_xlim(left=0)
        axes[1][column].xaxis.set_major_formatter(_format_tick)
        axes[1][column].locator_params("x", nbins=5)
    for column in range(len(COSTS) if narrow else 1):
        axes[0][column].set_ylabel(_axis_label(route.last.headline for _, route in routes))
        axes[1][column].set_ylabel("loss")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=_count_columns(labels, width, 4))
    for scores, losses in zip(*axes, strict=True):
        _say_if_empty(scores, "Nothing evaluated yet.")
        _say_if_empty(losses, "No loss logged yet.")
    return figure


def _format_tick(value: float, _: object) -> str:
    """Return the label of a tick, such as 0.25, 4000, 15k or 2.5G."""
    return import_matplotlib().ticker.EngFormatter(sep="")(value) if abs(value) >= 1e4 else f"{value:g}"


def _narrow_pairs(figure: Figure) -> Any:
    """Return panels below each other, two for each cost, indexed like those of the wide figure."""
    panels = figure.subplots(2 * len(COSTS), 1).reshape(-1, 2)
    for scores, losses in panels:
        scores.sharex(losses), scores.tick_params(labelbottom=False)
    return panels.T


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
    """Return x and y of points, without finite values that are so large that the arithmetic of matplotlib overflows."""
    found = [(x, y) for x, y in points if not LARGEST <= max(abs(x), abs(y)) < math.inf]
    return [x for x, _ in found], [y for _, y in found]


def _value_in(metric: Metric, result: dict[str, Any] | None) -> float | None:
    """Return the metric of a result, or None if there is none that can be plotted."""
    value = metric.value_in(result)
    return None if value is None or abs(value) >= LARGEST else value


def draw_module_curves(routes: LabeledRoutes, width: float) -> Figure:
    """Plot the training loss of each module against its epochs, with one panel per run."""
    columns = min(len(routes), 3 if width == WIDE else 1)
    rows = math.ceil(len(routes) / columns)
    figure = import_matplotlib().figure.Figure(figsize=(width, 0.5 + 2.9 * rows))
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis in panels.flat[len(routes) :]:
        axis.remove()
    legend: dict[str, Any] = {}
    for axis, (label, route) in zip(panels.flat, routes, strict=False):
        for color, phase in zip(pick_colors(len(route.modules)), route.modules, strict=True):
            x, y = _columns([(point.cost["epochs"], point.loss) for point in phase.points if point.loss is not None])
            (line,) = axis.plot(x, running_mean(y), color=color)
            if x and len(route.modules) <= len(COLORS):
                legend[phase.title] = line
        axis.set_xlabel("epochs of the module")
        axis.locator_params("x", nbins=max(5, int(width / columns)))
        axis.set_title(textwrap.fill(label, int(width / columns / EM * 1.5)))
        _say_if_empty(axis, "No loss of a module logged yet.")
    for row in panels:
        first = next((axis for axis in row if axis.axison), row[0])
        first.set_ylabel("training loss"), first.tick_params(labelleft=True)
    figure.legend(legend.values(), legend, loc="outside upper left", ncols=_count_columns(legend, width, len(COLORS)))
    return figure


def draw_compatibility(route: TrainingRoute, width: float) -> Figure:
    """Plot the headline metric of each module as a hybrid and in its partial assembly, in the order of completion."""
    figure = import_matplotlib().figure.Figure(figsize=(width, 2.9 if width == WIDE else 4.4))
    axis = figure.subplots()
    done = [(phase, phase.status["partial"]) for phase in route.modules if phase.result and phase.status["partial"]]
    done.sort(key=lambda each: len(each[1]["joined"]))
    places = range(len(done))
    headline = route.modules[0].headline
    if route.meta is not None and (reference := _value_in(headline, route.meta.result)) is not None:
        axis.axhline(reference, color=import_matplotlib().rcParams["text.color"], lw=1, ls=":", label="meta model")
    hybrids = [math.nan if (value := _value_in(headline, phase.result)) is None else value for phase, _ in done]
    assembled = [math.nan if (value := _value_in(headline, scores)) is None else value for _, scores in done]
    axis.vlines(places, hybrids, assembled, color=COLORS[0], alpha=0.4, lw=1)
    axis.plot(places, hybrids, "o", ms=10, mfc="none", mec=COLORS[0], label="as a hybrid")
    axis.plot(places, assembled, "o", ms=7, color=COLORS[1], label="with the previously finished modules")
    titles = [f"{phase.title}\n{len(scores['joined'])} of {scores['modules']}" for phase, scores in done]
    _label_places(axis, titles, width)
    axis.set_xlim(-0.5, len(done) - 0.5), axis.set_ylabel(_axis_label([headline]))
    labels = axis.get_legend_handles_labels()[1]
    figure.legend(loc="outside upper left", ncols=_count_columns(labels, width, 3))
    return figure


def _label_places(axis: Axes, titles: Sequence[str], width: float) -> None:
    """Label the places 0, 1, ... on the x-axis: vertically if there is too little room, and only some of many."""
    room = width / (EM * len(titles))  # for each title, in sizes of the text
    vertical = room < 6
    step = math.ceil(3 / room) if vertical else 1
    axis.set_xticks(range(0, len(titles), step), titles[::step], rotation=90 if vertical else 0)


def draw_before_after(routes: LabeledRoutes, width: float) -> Figure:
    """Plot the headline metric of the hybrids, the assembled model and the final model, with one line per route."""
    titles = [textwrap.fill(label, 48 if width == WIDE else 16) for label, _ in routes]
    lines = sum(1.4 + title.count("\n") for title in titles)
    figure = import_matplotlib().figure.Figure(figsize=(width, 1.1 + 0.26 * lines + (0.5 if width < WIDE else 0)))
    axis = figure.subplots()
    for at, (_, route) in enumerate(routes):
        values = partial(_value_in, route.last.headline)
        hybrids = [value for phase in route.modules if (value := values(phase.result)) is not None]
        assembled, trained = values(route.assembled), values(route.last.result)
        ends = [value for value in (assembled, trained) if value is not None]
        axis.hlines([at] * (len(ends) > 1), min(ends, default=0), max(ends, default=0), color=COLORS[0], alpha=0.4)
        if hybrids:
            axis.plot(hybrids, [at] * len(hybrids), "o", ms=5, mfc="none", mec=COLORS[2], label="hybrids")
        if assembled is not None:
            axis.plot(assembled, at, "D", color=COLORS[1], label="assembled")
        if trained is not None:
            axis.plot(trained, at, "o", ms=8, color=COLORS[0], label="trained")
        if not hybrids and not ends:
            axis.text(0.02, at, "Nothing evaluated yet.", transform=axis.get_yaxis_transform(), va="center")
    axis.set_yticks(range(len(routes)), titles), axis.set_ylim(len(routes) - 0.5, -0.5)
    axis.set_xlabel(_axis_label(route.last.headline for _, route in routes))
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=_count_columns(handles, width, 3))
    axis.xaxis.set_visible(bool(handles))
    return figure
