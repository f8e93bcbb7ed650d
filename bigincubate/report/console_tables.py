"""Tables for the console."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from ..errors import format_count
from ..tasks.metric import Metric, planned_metrics
from .units import format_flops_column, format_time

if TYPE_CHECKING:
    from ..planning.planned_row import PlannedRow
    from .run_data import TrainingRoute

MOST_DEPTHS = 16  # number of modules up to which each depth is shown


class TextTable(Table):
    """A table of plain text: titles and cells are never read as markup, emoji codes or control sequences.

    Paths, error messages, names of nodes and of recipes may contain any characters.
    """

    def __init__(self, title: str, columns: Sequence[str]) -> None:
        """Create a table whose first column is aligned to the left, and the others to the right."""
        heading = plain_text(title)
        heading.stylize("bold")
        super().__init__(title=heading, title_justify="left", header_style="bold", box=None, pad_edge=False)
        for index, column in enumerate(columns):
            self.add_column(plain_text(column), justify="left" if index == 0 else "right", no_wrap=True)

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row of plain text."""
        super().add_row(*map(plain_text, cells), **options)


def plain_text(value: object) -> Text:
    """Return a value as text without markup, on one line and without control characters."""
    return Text("".join(letter if letter.isprintable() else " " for letter in str(value)))


def metric_columns(groups: Iterable[Iterable[Metric]]) -> list[Metric]:
    """Return the metrics to show in a table of phases, given the metrics of each phase."""
    return list({metric.column: metric for group in groups for metric in group if metric.in_tables}.values())


def common_unit(units: Iterable[str]) -> str:
    """Return the unit of a table of phases: the unit that all phases share, or ``"samples"`` if they differ."""
    several = set(units)
    return several.pop() if len(several) == 1 else "samples"


def format_depths(depths: Sequence[Sequence[int]]) -> str:
    """Format depths: ``3+1+1+1`` for one stage, ``2,2,6,0 + 0,0,2,0`` for several stages.

    If there are many modules, consecutive modules of equal depth are counted: ``1 (x 40) + 3 + 1 (x 59)``.
    """
    modules = [",".join(map(str, stages)) for stages in depths]
    if len(modules) > MOST_DEPTHS:
        runs = [(module, len(list(equal))) for module, equal in groupby(modules)]
        return " + ".join(module if times == 1 else f"{module} (x {times})" for module, times in runs)
    return ("+" if all(len(stages) == 1 for stages in depths) else " + ").join(modules)


def row_depths(plan: dict[str, Any], row: dict[str, Any]) -> list[list[int]]:
    """Return the depths of the model of a row of the plan."""
    target, meta = plan["target_depths"], plan["meta_depths"]
    if (module := row["module"]) is not None:
        return [*meta[:module], target[module], *meta[module + 1 :]]
    return meta if row["phase"] == "pretrain" else target


def plan_table(plan: dict[str, Any]) -> Table:
    """Return a table of the cost of each phase."""
    costs = [row["cost"] for row in plan["rows"]]
    forward_unit, forward = format_flops_column([cost["forward_flops"] for cost in costs], 3)
    training_unit, training = format_flops_column([cost["training_flops"] for cost in costs])
    total_unit, total = format_flops_column([row["total_flops"] for row in plan["rows"]])
    flops = [f"fwd {forward_unit.removesuffix('LOPs')}", f"train {training_unit.removesuffix('LOPs')}"]  # GF for GFLOPs
    columns = ["phase", "depths", "params M", "train M", *flops, "act MiB", "opt MiB", "sync MiB", "steps", "epochs"]
    approximate: list[list[str]] = [[] for _ in costs]
    total_column = f"total {total_unit.removesuffix('LOPs')}"
    extra: list[str] = []
    if all(row["approximate_flops"] for row in plan["rows"]):
        unit, cells = format_flops_column([row["approximate_flops"] for row in plan["rows"]])
        extra, approximate = [f"6ND {unit.removesuffix('LOPs')}"], [[cell] for cell in cells]
    table = TextTable(f"{plan['recipe']}: cost of each phase", [*columns, total_column, *extra])
    for row, cost, *cells, more in zip(plan["rows"], costs, forward, training, total, approximate, strict=True):
        table.add_row(
            row["title"],
            format_depths(row_depths(plan, row)),
            f"{cost['parameters'] / 1e6:.2f}",
            f"{cost['trainable'] / 1e6:.2f}",
            cells[0],
            cells[1],
            f"{cost['activation_bytes'] / 2**20:.2f}",
            f"{cost['optimizer_bytes'] / 2**20:.2f}",
            f"{cost['allreduce_bytes'] / 2**20:.2f}",
            str(row["steps"]),
            f"{row['epochs']:g}",
            cells[2],
            *more,
        )
    return table


def describe_unused_flops(plan: dict[str, Any]) -> str:
    """Return how much of its budget each phase with equal FLOPs leaves, as its steps are whole; empty if none does."""
    shares = []
    for row in plan["rows"]:
        if unused := row["unused_flops"]:
            total = plan["end_to_end_flops"] if row["phase"] == "end_to_end" else plan["incubation_flops"]
            shares.append(f"{row['title']} {100 * unused / (total + unused):.3f}%")
    return f"not used of equal FLOPs, because steps are whole: {', '.join(shares)}" if shares else ""


def sharding_tables(plan: dict[str, Any]) -> list[Table]:
    """Return two tables, memory per rank and communication per step, by strategy and number of ranks.

    Consecutive modules with equal values share a row.
    """
    names = list(dict.fromkeys(each["strategy"] for row in plan["rows"] for each in row["sharding"]))
    title = "MiB per rank, including DeepSpeed's fixed buckets; add `act MiB` for each sample of a micro-batch"
    memory_table = TextTable(title, ["phase", "ranks", common_unit(row["unit"] for row in plan["rows"]), *names])
    sent_table = TextTable("MiB sent per step (complete tensors in collectives)", ["phase", "ranks", *names])
    lines: dict[tuple[str, int], tuple[list[str], list[str]]] = {}
    for row in plan["rows"]:
        for world in dict.fromkeys(each["world"] for each in row["sharding"]):
            found = {each["strategy"]: each for each in row["sharding"] if each["world"] == world}
            first = next(iter(found.values()))
            memory = [_mib(found[name]["total"] - first["activations"]) if name in found else "-" for name in names]
            sent = [_mib(found[name]["sent"]) if name in found else "-" for name in names]
            units = first["samples"] * row["batch_units"] // row["batch_size"]
            lines[row["title"], world] = ([str(units), *memory], sent)
    for table, side in ((memory_table, 0), (sent_table, 1)):
        for titles, world, cells in _merge_equal_phases({key: value[side] for key, value in lines.items()}):
            if side == 0 or world > 1:
                table.add_row(titles, str(world), *cells)
    return [memory_table, sent_table]


def _merge_equal_phases(lines: dict[tuple[str, int], list[str]]) -> list[tuple[str, int, list[str]]]:
    """Merge consecutive phases with equal values for every number of ranks, under titles such as ``module 1, 2``."""
    titles = list(dict.fromkeys(title for title, _ in lines))
    worlds = list(dict.fromkeys(world for _, world in lines))
    groups = [list(group) for _, group in groupby(titles, lambda title: [lines[title, world] for world in worlds])]
    return [
        (", ".join([first, *(title.removeprefix("module ") for title in others)]), world, lines[first, world])
        for first, *others in groups
        for world in worlds
    ]


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def ways_table(plan: dict[str, Any]) -> Table:
    """Return a table of the ways to train the target; see :mod:`bigincubate.planning.ways`."""
    ways = plan["ways"]
    connected = any(way["connected_path_flops"] is not None for way in ways)
    timed = any(way["seconds"] is not None for way in ways)
    keys = ["flops", "separate_path_flops", *(["connected_path_flops"] if connected else [])]
    unit, amounts = format_flops_column([way[key] for way in ways for key in keys])
    unit = unit.removesuffix("LOPs")
    heads = [f"total {unit}", f"path {unit}", "MiB before", "MiB last"]
    heads += [f"path {unit}, DP", "GB before, DP", "GB last, DP"] if connected else []
    heads += ["GPU-hours", "h:mm:ss"] if timed else []
    workers = format_count(ways[0]["workers"], "worker")
    table = TextTable(f"{plan['recipe']}: ways to train the target with {workers}", ["way", *heads])
    for way, *flops in zip(ways, *(amounts[at :: len(keys)] for at in range(len(keys))), strict=True):
        cells = [way["title"], *flops[:2], _mib(way["memory_before"]), _mib(way["memory_last"])]
        if connected:
            cells += [flops[2], *(f"{way[key] / 1e9:,.2f}" for key in ("sent_before", "sent_last"))]
        if timed:
            cells += [f"{way['gpu_seconds'] / 3600:,.2f}", _duration(way["seconds"])]
        table.add_row(*cells)
    return table


def cluster_table(cluster: dict[str, Any]) -> Table:
    """Return a table of the estimated durations on a cluster."""
    title = f"on {format_count(cluster['gpus'], 'GPU')}: training only, assuming linear scaling"
    table = TextTable(title, ["phase", "GPUs", "h:mm:ss", "GPU-hours"])
    for each in cluster["phases"]:
        used = each["gpus"] * each["seconds"] / 3600
        table.add_row(each["title"], f"{each['gpus']:,}", _duration(each["seconds"]), f"{used:,.2f}")
    table.add_section()
    used = cluster["gpu_seconds"] / 3600
    table.add_row("without end to end, first step to last", "", _duration(cluster["seconds"]), f"{used:,.2f}")
    return table


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return the title, phase key and result of everything that has finished, in the order of the pipeline."""
    modules = enumerate(summary["modules"])
    rows = [
        ("meta model", "pretrain", summary["meta"]),
        *((f"module {index} (as a hybrid)", f"incubate/{index}", result) for index, result in modules),
        ("assembled", "finetune", summary["assembled"]),
        ("fine-tuned", "finetune", summary["finetune"]),
        ("end to end", "end_to_end", summary["end_to_end"]),
    ]
    return [(title, key, result) for title, key, result in rows if result]


def summary_table(name: str, summary: dict[str, Any], planned: Iterable[PlannedRow]) -> Table:
    """Return a table of a run's results.

    Args:
        name: The name in the title.
        summary: The return value of `RunDir.update_summary`.
        planned: The phases, for their metrics.
    """
    rows, metrics = summary_rows(summary), {row.key: row.metrics for row in planned}
    columns = metric_columns(metrics[key] for _, key, _ in rows)
    unit = common_unit(result["unit"] for *_, result in rows)
    flops_unit, flops = format_flops_column([result["flops"] for *_, result in rows])
    table = TextTable(
        f"{name}: results", ["phase", *(metric.column for metric in columns), "seconds", unit, flops_unit]
    )
    for (title, _, result), cell in zip(rows, flops, strict=True):
        table.add_row(
            title,
            *(metric.text(metric.value_in(result)) for metric in columns),
            f"{result['seconds']:.1f}",
            f"{result['seen']:,}",
            cell,
        )
    return table


def compare_table(routes: Sequence[tuple[str, TrainingRoute]]) -> Table:
    """Return a table that compares routes, given with their labels."""
    metrics = metric_columns(route.last.metrics for _, route in routes)
    unit = common_unit(route.last.unit for _, route in routes)
    scores = [*(metric.column for metric in metrics), "meta", "hybrids", "assembled"]
    flops_unit, flops = format_flops_column([route.spent["flops"] for _, route in routes])
    table = TextTable("comparison of runs", ["run", *scores, "epochs", unit, flops_unit, "seconds", "missing"])
    for (label, route), cell in zip(routes, flops, strict=True):
        hybrids = [phase.headline.text(phase.score) for phase in route.hybrid_range]
        table.add_row(
            label,
            *(metric.text(metric.value_in(route.last.result)) for metric in metrics),
            route.meta.headline.text(route.meta.score) if route.meta else "-",
            " to ".join(hybrids) or "-",
            route.last.headline.text(route.last.headline.value_in(route.assembled)),
            f"{route.spent['epochs']:.4g}",
            f"{route.spent['seen']:,.0f}",
            cell,
            f"{route.spent['seconds']:,.1f}",
            ", ".join(route.missing) or "-",
        )
    return table


def status_table(name: str, rows: list[dict[str, Any]], plan: dict[str, Any]) -> Table:
    """Return a table of a run's status.

    Args:
        name: The name in the title.
        rows: The return value of `run_status`.
        plan: The content of ``plan.json``, for the metrics.
    """
    metrics = {row["key"]: planned_metrics(row) for row in plan["rows"]}
    headlines = metric_columns(metrics[row["phase"]][:1] for row in rows if row["phase"] in metrics)
    unit = common_unit(row["unit"] for row in rows if row["unit"])
    submitted, joined = (any(row[key] for row in rows) for key in ("job", "partial"))
    queued = ["job", "in Slurm", "node"] if submitted else []
    scores = [*(metric.column for metric in headlines), *(["with finished modules"] if joined else [])]
    columns = ["step", "done", "loss", *scores, f"{unit}/s", "ETA", "restarts", "checkpoint", "error"]
    table = TextTable(f"{name}: status", ["phase", "state", *queued, *columns])
    for row in rows:
        table.add_row(
            row["title"],
            row["state"],
            *([row[key] or "-" for key in ("job", "queue", "node")] if submitted else []),
            "-" if row["steps"] is None else f"{row['step']}/{row['steps']}",
            "-" if row["percent"] is None else f"{row['percent']:.0f}%",
            _number(row["loss"], ".4f"),
            *(metric.text(metric.value_in(row)) for metric in headlines),
            *([format_partial(row["partial"], metrics[row["phase"]][0]) if row["partial"] else "-"] if joined else []),
            _number(row["samples_per_sec"], ".0f"),
            _duration(row["eta_seconds"]),
            str(row["restarts"]),
            _number(row["checkpoint"], "d"),
            row["error"] or format_stragglers(row["stragglers"] or []),
        )
    return table


def format_stragglers(stragglers: list[dict[str, Any]]) -> str:
    """Format the slowest of the slow ranks, and how many more there are; empty if there is none.

    For example: ``rank 3 (n2) is slow: 2.4 times the median, and 1 more``.
    """
    if not stragglers:
        return ""
    slowest, more = stragglers[0], len(stragglers) - 1
    text = f"rank {slowest['rank']} ({slowest['host']}) is slow: {slowest['ratio']:.1f} times the median"
    return f"{text}, and {more} more" if more else text


def format_partial(partial: dict[str, Any] | None, headline: Metric) -> str:
    """Format the score of a partial assembly, such as ``91.39 (0-2 of 4)``.

    Args:
        partial: The result, or None.
        headline: The metric to show.
    """
    score = headline.text(headline.value_in(partial))
    return f"{score} ({format_ranges(partial['joined'])} of {partial['modules']})" if partial else "-"


def format_ranges(numbers: Sequence[int]) -> str:
    """Format ascending numbers: ``[0, 1, 2, 5]`` as ``0-2,5``."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def checkpoint_table(name: str, rows: list[dict[str, Any]]) -> Table:
    """Return a table of checkpoints."""
    table = TextTable(f"{name}: checkpoints", ["checkpoint", "step", "ranks", "bytes", "committed", "verified", "when"])
    for row in rows:
        table.add_row(
            row["path"],
            str(row["step"]),
            str(row["ranks"]),
            f"{row['bytes']:,}",
            "yes" if row["committed"] else "no",
            "-" if not row["committed"] else "damaged" if row["problem"] else "yes",
            format_time(row["time"]),
        )
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if not math.isfinite(seconds):  # a measured rate is damaged
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
