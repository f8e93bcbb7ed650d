"""Curves, as SVG that takes its ink from the page around it, or as a picture."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..tasks.metric import Metric
from .console_tables import common_unit
from .run_data import COSTS, LEAST, LOSS, PhaseFacts, Way

COLOURS = ["#3d7edb", "#e0793a", "#2a9d8f", "#c9507a", "#8f6fc4", "#7c9c3c", "#b58a1b", "#5f8ea8"]
INK = "#22223b"  # of a picture
MARK = "#012345"  # in a drawing: replaced by the page's own colour
Draw = Callable[[], Figure]


def _style(ink: str) -> dict[str, Any]:
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    return {
        **dict.fromkeys(names, ink),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.15,
        "axes.linewidth": 0.6,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "font.size": 9,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.5,
        "axes.formatter.useoffset": False,
        "figure.constrained_layout.use": True,
        "svg.fonttype": "none",
        "svg.hashsalt": "bigincubate",  # the same run, the same page
    }


def svg(draw: Draw) -> str:
    """The drawing as an element of a page: no address, no font and no colour of text but the page's own."""
    out = StringIO()
    with matplotlib.rc_context(_style(MARK)):
        draw().savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href").replace(MARK, "currentColor")
    text = re.sub(r' id="[A-Za-z0-9]+_\d+"', "", text)  # figure_1 of every figure
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )


def png(draw: Draw, file: Path) -> None:
    with matplotlib.rc_context(_style(INK)):
        draw().savefig(file, dpi=150)


def colours(count: int) -> list[str]:
    """So many colours that can be told apart, on light and on dark."""
    if count <= len(COLOURS):
        return COLOURS[:count]
    ramp = matplotlib.colormaps["viridis"]
    return [matplotlib.colors.to_hex(ramp(0.15 + 0.7 * k / (count - 1))) for k in range(count)]


def smooth(values: Sequence[float]) -> list[float]:
    """A running mean over about an eighth of the curve: mixed batches have noisy losses."""
    weight, out = 1 - 1 / max(1, len(values) / 8), list(values[:1])
    for value in values[1:]:
        out.append(weight * out[-1] + (1 - weight) * value)
    return out


def walk(way: Way) -> Iterator[tuple[PhaseFacts, dict[str, float]]]:
    """Each phase, with what those before it had cost: all of them one after another."""
    before = dict(LEAST)
    for phase in way.phases:
        yield phase, before
        before = {key: before[key] + phase.spent[key] for key in COSTS}


def titles(metrics: Iterable[Metric]) -> str:
    """``Top-1``; of several metrics ``Top-1 and loss``."""
    text = " and ".join(dict.fromkeys(metric.title for metric in metrics))
    return text[:1].upper() + text[1:]


def _axis_label(metrics: Iterable[Metric]) -> str:
    return " / ".join(dict.fromkeys(", ".join(filter(None, (metric.title, metric.unit))) for metric in metrics))


def progress(ways: Sequence[tuple[str, Way]]) -> Figure:
    """The headline and the loss of validation against each cost, a colour a way: a line through whole models (meta
    model, assembled, fine-tuned), a ring a hybrid, faint the loss of training."""
    figure = Figure(figsize=(12.4, 5.6))
    axes = figure.subplots(2, len(COSTS), sharex="col", sharey="row")
    for colour, (label, way) in zip(colours(len(ways)), ways, strict=True):
        for column, cost in enumerate(COSTS):
            _way(axes[0][column], axes[1][column], way, cost, colour, label)
    unit = common_unit(way.last.unit for _, way in ways)
    for column, title in enumerate(("epochs", unit, "training FLOPs", "training seconds")):
        axes[1][column].set_xlabel(title)
        axes[1][column].set_xlim(left=0)
        axes[1][column].ticklabel_format(axis="x", style="sci", scilimits=(-3, 5), useMathText=True)
    axes[0][0].set_ylabel(_axis_label(way.last.headline for _, way in ways)), axes[1][0].set_ylabel("loss")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper left", ncols=min(4, len(ways)))
    return figure


def _way(scores: Axes, losses: Axes, way: Way, cost: str, colour: str, label: str) -> None:
    for phase, before in walk(way):
        trained = [(before[cost] + p.cost[cost], p.loss) for p in phase.points if p.loss is not None]
        if trained:
            losses.plot([x for x, _ in trained], smooth([y for _, y in trained]), color=colour, alpha=0.35, lw=1)
    for axis, name in ((scores, way.last.headline.name), (losses, LOSS)):
        _validation(axis, way, name, cost, colour, label)


def _validation(axis: Axes, way: Way, name: str, cost: str, colour: str, label: str) -> None:
    """A metric of validation."""
    whole: list[list[tuple[float, float]]] = [[]]  # the meta model; what was assembled
    for phase, before in walk(way):
        if phase is way.last and way.assembled:
            whole.append([(before[cost], value) for key, value in way.assembled["metrics"].items() if key == name])
        points = [(before[cost] + p.cost[cost], p.metrics[name]) for p in phase.points if name in p.metrics]
        if phase.planned["module"] is None:
            whole[-1] += points
        else:
            axis.plot(*_columns(points), "o", ms=4, mfc="none", mec=colour, mew=1)
    for part, line in enumerate(whole):
        axis.plot(*_columns(line), "o-", ms=3.5, color=colour, label=label if part == 0 else None)
    if len(whole) > 1 and all(whole):
        axis.plot(*_columns([whole[0][-1], whole[1][0]]), ":", lw=1, alpha=0.6, color=colour)


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def module_curves(ways: Sequence[tuple[str, Way]]) -> Figure:
    """The loss of training of each module against its own epochs, a panel a run."""
    figure = Figure(figsize=(12.4, 3.2))
    panels = figure.subplots(1, len(ways), sharey=True, squeeze=False)[0]
    for axis, (label, way) in zip(panels, ways, strict=True):
        for colour, phase in zip(colours(len(way.modules)), way.modules, strict=True):
            points = [point for point in phase.points if point.loss is not None]
            losses = smooth([point.loss for point in points if point.loss is not None])
            axis.plot([point.cost["epochs"] for point in points], losses, color=colour, label=phase.title)
        axis.set_xlabel("epochs of the module"), axis.set_title(label)
        if 0 < len(way.modules) <= len(COLOURS):
            axis.legend(ncols=2)
    panels[0].set_ylabel("training loss")
    return figure


def fit(way: Way) -> Figure:
    """The headline of each module as a hybrid, and beside those that were finished when it was, in that order."""
    figure = Figure(figsize=(12.4, 2.9))
    axis = figure.subplots()
    done = [(phase, phase.status["partial"]) for phase in way.modules if phase.result and phase.status["partial"]]
    done.sort(key=lambda each: len(each[1]["joined"]))
    places = range(len(done))
    headline = way.modules[0].headline
    if way.meta is not None and (reference := headline.value_in(way.meta.result)) is not None:
        axis.axhline(reference, color=matplotlib.rcParams["text.color"], lw=1, ls=":", label="meta model")
    hybrids = [phase.score for phase, _ in done if phase.score is not None]
    partial = [value for _, scores in done if (value := headline.value_in(scores)) is not None]
    axis.vlines(places, hybrids, partial, color=COLOURS[0], alpha=0.4, lw=1)
    axis.plot(places, hybrids, "o", ms=10, mfc="none", mec=COLOURS[0], label="as a hybrid, alone")
    axis.plot(places, partial, "o", ms=7, color=COLOURS[1], label="beside those finished before")
    axis.set_xticks(places, [f"{phase.title}\n{len(s['joined'])} of {s['modules']} in" for phase, s in done])
    axis.set_xlim(-0.5, len(done) - 0.5), axis.set_ylabel(_axis_label([headline]))
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def before_after(ways: Sequence[tuple[str, Way]]) -> Figure:
    """The headline of each way's hybrids, of what was assembled from them, and at the end; a line a way."""
    figure = Figure(figsize=(12.4, 0.9 + 0.36 * len(ways)))
    axis = figure.subplots()
    for at, (_, way) in enumerate(ways):
        values = way.last.headline.value_in
        hybrids = [value for phase in way.modules if (value := values(phase.result)) is not None]
        assembled, trained = values(way.assembled), values(way.last.result)
        ends = [value for value in (assembled, trained) if value is not None]
        axis.hlines([at] * (len(ends) > 1), min(ends, default=0), max(ends, default=0), color=COLOURS[0], alpha=0.4)
        axis.plot(
            hybrids, [at] * len(hybrids), "o", ms=5, mfc="none", mec=COLOURS[2], label="hybrids" if not at else None
        )
        if assembled is not None:
            axis.plot(assembled, at, "D", color=COLOURS[1], label="assembled")
        if trained is not None:
            axis.plot(trained, at, "o", ms=8, color=COLOURS[0], label="trained")
    axis.set_yticks(range(len(ways)), [label for label, _ in ways]), axis.set_ylim(len(ways) - 0.5, -0.5)
    axis.set_xlabel(_axis_label(way.last.headline for _, way in ways))
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=3)
    return figure
