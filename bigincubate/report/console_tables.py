"""The tables that commands print."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from rich.table import Table


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def depths_text(depths: list[list[int]]) -> str:
    """``3+1+1+1`` for one stage, ``2,2,6,0 + 0,0,2,0`` for several."""
    if all(len(stages) == 1 for stages in depths):
        return "+".join(str(stages[0]) for stages in depths)
    return " + ".join(",".join(map(str, stages)) for stages in depths)


def plan_table(plan: dict[str, Any]) -> Table:
    columns = ["phase", "depths", "params M", "train M", "fwd GF", "train GF", "act MiB", "opt MiB", "sync MiB"]
    table = _table(f"{plan['recipe']}: what each phase costs", [*columns, "steps", "epochs", "total PF"])
    for row in plan["rows"]:
        cost = row["cost"]
        table.add_row(
            row["title"],
            depths_text(row["depths"]),
            f"{cost['parameters'] / 1e6:.2f}",
            f"{cost['trainable'] / 1e6:.2f}",
            f"{cost['forward_flops'] / 1e9:.3g}",
            f"{cost['training_flops'] / 1e9:.4g}",
            f"{cost['activation_bytes'] / 2**20:.2f}",
            f"{cost['optimizer_bytes'] / 2**20:.2f}",
            f"{cost['allreduce_bytes'] / 2**20:.2f}",
            str(row["steps"]),
            f"{row['epochs']:g}",
            f"{row['total_flops'] / 1e15:.4g}",
        )
    return table


def sharding_tables(plan: dict[str, Any]) -> list[Table]:
    """What a rank holds, and what travels in a step. Modules that differ in nothing share a line."""
    names = list(dict.fromkeys(each["strategy"] for row in plan["rows"] for each in row["sharding"]))
    title = (
        "MiB that a rank holds, DeepSpeed's fixed buckets included; besides, `act MiB` for each image of a micro-batch"
    )
    holds = _table(title, ["phase", "ranks", "images", *names])
    sends = _table("MiB that travel in a step (whole tensors in collectives)", ["phase", "ranks", *names])
    lines: dict[tuple[str, int], tuple[list[str], list[str]]] = {}
    for row in plan["rows"]:
        for world in dict.fromkeys(each["world"] for each in row["sharding"]):
            found = {each["strategy"]: each for each in row["sharding"] if each["world"] == world}
            one = next(iter(found.values()))
            held = [_mib(found[name]["total"] - one["activations"]) if name in found else "-" for name in names]
            sent = [_mib(found[name]["sent"]) if name in found else "-" for name in names]
            lines[row["title"], world] = ([str(one["images"]), *held], sent)
    for table, side in ((holds, 0), (sends, 1)):
        for titles, world, cells in _merged({key: value[side] for key, value in lines.items()}):
            if side == 0 or world > 1:
                table.add_row(titles, str(world), *cells)
    return [holds, sends]


def _merged(lines: dict[tuple[str, int], list[str]]) -> list[tuple[str, int, list[str]]]:
    """Phases one after another that are alike for every world become one: ``module 1, 2``."""
    titles = list(dict.fromkeys(title for title, _ in lines))
    worlds = list(dict.fromkeys(world for _, world in lines))
    groups: list[list[str]] = []
    for title in titles:
        if groups and all(lines[title, world] == lines[groups[-1][0], world] for world in worlds):
            groups[-1].append(title)
        else:
            groups.append([title])
    return [
        (", ".join([group[0], *(title.removeprefix("module ") for title in group[1:])]), world, lines[group[0], world])
        for group in groups
        for world in worlds
    ]


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def cluster_table(cluster: dict[str, Any]) -> Table:
    title = f"on {cluster['gpus']:,} GPUs: training alone, scaling taken as linear"
    table = _table(title, ["phase", "GPUs", "h:mm:ss", "GPU-hours"])
    for each in cluster["phases"]:
        used = each["gpus"] * each["seconds"] / 3600
        table.add_row(each["title"], f"{each['gpus']:,}", _duration(each["seconds"]), f"{used:,.2f}")
    table.add_section()
    used = cluster["gpu_seconds"] / 3600
    table.add_row("incubation, first step to last", "", _duration(cluster["seconds"]), f"{used:,.2f}")
    return table


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(title, result) of what is done, in the order of the pipeline."""
    rows = [("meta model", summary["meta"])]
    rows += [(f"module {index} (as a hybrid)", result) for index, result in enumerate(summary["modules"])]
    rows += [("assembled", summary["assembled"]), ("fine-tuned", summary["finetune"])]
    rows += [("end to end", summary["end_to_end"])]
    return [(title, result) for title, result in rows if result]


def summary_table(name: str, summary: dict[str, Any]) -> Table:
    table = _table(f"{name}: results", ["phase", "top-1 %", "loss", "seconds", "images", "GFLOPs"])
    for title, result in summary_rows(summary):
        table.add_row(
            title,
            f"{result['top1']:.2f}",
            f"{result['loss']:.4f}",
            f"{result['seconds']:.1f}",
            f"{result['images']:,}",
            f"{result['flops'] / 1e9:,.0f}",
        )
    return table


def compare_table(rows: list[dict[str, Any]]) -> Table:
    columns = [
        "run",
        "top-1 %",
        "loss",
        "meta",
        "hybrids",
        "assembled",
        "epochs",
        "images",
        "TFLOPs",
        "seconds",
        "missing",
    ]
    table = _table("runs compared", columns)
    for row in rows:
        hybrids = [top1 for top1 in row["hybrids"] if top1 is not None]
        table.add_row(
            row["run"],
            _number(row["top1"], ".2f"),
            _number(row["loss"], ".4f"),
            _number(row["meta"], ".2f"),
            f"{min(hybrids):.2f} to {max(hybrids):.2f}" if hybrids else "-",
            _number(row["assembled"], ".2f"),
            f"{row['epochs']:.4g}",
            f"{row['images']:,.0f}",
            f"{row['flops'] / 1e12:,.4g}",
            f"{row['seconds']:,.1f}",
            ", ".join(row["missing"]) or "-",
        )
    return table


def status_table(name: str, rows: list[dict[str, Any]]) -> Table:
    submitted = any(row["job"] for row in rows)
    columns = ["step", "done", "loss", "top-1 %", "img/s", "ETA", "restarts", "checkpoint", "error"]
    queued = ["job", "in Slurm", "node"] if submitted else []
    if joined := any(row["partial"] for row in rows):
        columns.insert(columns.index("top-1 %") + 1, "beside finished modules")
    table = _table(f"{name}: status", ["phase", "state", *queued, *columns])
    for row in rows:
        table.add_row(
            row["title"],
            row["state"],
            *([row[key] or "-" for key in ("job", "queue", "node")] if submitted else []),
            f"{row['step']}/{row['steps']}",
            f"{row['percent']:.0f}%",
            _number(row["loss"], ".4f"),
            _number(row["top1"], ".2f"),
            *([partial_text(row["partial"])] if joined else []),
            _number(row["images_per_sec"], ".0f"),
            _duration(row["eta_seconds"]),
            str(row["restarts"]),
            _number(row["checkpoint"], "d"),
            row["error"] or "",
        )
    return table


def partial_text(partial: dict[str, Any] | None) -> str:
    """``91.39 (0-2 of 4)``: top-1 of the modules that were finished, the meta model in place of the others."""
    return f"{partial['top1']:.2f} ({ranges(partial['joined'])} of {partial['modules']})" if partial else "-"


def ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2,5``."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def checkpoint_table(name: str, rows: list[dict[str, Any]]) -> Table:
    table = _table(f"{name}: checkpoints", ["checkpoint", "step", "ranks", "bytes", "committed", "verified", "when"])
    for row in rows:
        table.add_row(
            row["path"],
            str(row["step"]),
            str(row["ranks"]),
            f"{row['bytes']:,}",
            "yes" if row["committed"] else "no",
            "-" if not row["committed"] else "damaged" if row["problem"] else "yes",
            f"{datetime.fromtimestamp(row['time']):%Y-%m-%d %H:%M:%S}",
        )
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
