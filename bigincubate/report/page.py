"""The report of one run as an HTML page: model, data, scores, curves, costs, events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC
from typing import Any

from ..config import Recipe
from ..errors import format_command
from ..tasks.metric import Metric
from . import figures, html
from .accounting import JobUsage
from .console_tables import common_unit, format_depths, format_ranges, metric_columns
from .html import NONE, Markup, cost_numbers, figure, flops_number, join_markup, number, score_number, table, tag
from .machines import describe_devices, describe_versions
from .run_data import PhaseData, RunData, TrainingRoute
from .timeline import TimelineEvent, build_timeline
from .units import choose_prefix, format_duration, format_metric, format_quantity, format_three_digits, format_time
from .verify import Finding, Verdict


def render_report(run_data: RunData, findings: Sequence[Finding], usage: Mapping[str, JobUsage] | None = None) -> str:
    """Return the report as HTML.

    Args:
        run_data: The run.
        findings: Findings from verifying its artifacts and results.
        usage: What its Slurm jobs used, by the key of the phase; empty or None if that is not known.
    """
    timeline = build_timeline(run_data)
    title = f"{run_data.recipe.name}: {run_data.run.path.resolve().name}"
    main = run_data.main
    sections = {
        "Model and data": _model_section(run_data),
        "Phases": _phases_section(run_data),
        "Curves": _curves_section(run_data),
        "Do the modules fit together?": (_compatibility_section(main) if main and main.modules else None),
        "Cost": _cost_section(run_data),
        "Slurm jobs": _usage_section(run_data, usage) if usage else None,
        "Events": _timeline_section(timeline),
        "Machines and software": _environment_section(run_data),
        "Verification": _verification_section(findings),
    }
    return html.html_page(
        title,
        _header(run_data, timeline),
        *(join_markup(tag("h2", heading), content) for heading, content in sections.items() if content is not None),
        tag("details", tag("summary", "Resolved recipe"), tag("pre", run_data.recipe.toml())),
        tag("footer", format_command("report", run_data.run.path)),
    )


# ------------------------------------------------------------------------------------------------ header


def _header(run_data: RunData, timeline: Iterable[TimelineEvent]) -> Markup:
    missing = [title for route in run_data.routes for title in route.missing]
    state = tag("span", "unfinished" if missing else "done", class_="state" if missing else "state done")
    description = tag("p", run_data.recipe.description, class_="soft") if run_data.recipe.description else Markup()
    missing_note = tag("p", f"Missing: {', '.join(missing)}.", class_="missing") if missing else Markup()
    tiles = []
    for route in run_data.routes:
        if route.last.result:
            name = "end to end" if route.is_baseline else "fine-tuned"
            tiles.append(_score_tile(route.last.headline, route.last.result, name))
        if route.assembled:
            tiles.append(_score_tile(route.last.headline, route.assembled, "assembled, not fine-tuned"))
        if route.spent["flops"]:
            tiles.append(_tile(flops_number(route.spent["flops"]), f"for training, {route.name}"))
            tiles.append(_tile(html.duration_number(route.spent["seconds"]), f"of training, {route.name}"))
    if faults := sum(event.fault for event in timeline):
        name = "interruption or fault" if faults == 1 else "interruptions and faults"
        tiles.append(_tile(str(faults), name if missing else f"{name}, recovered"))
    heading = tag("h1", run_data.recipe.name, state)
    return join_markup(heading, description, missing_note, tag("div", *tiles, class_="tiles"))


def _score_tile(metric: Metric, result: dict[str, Any], name: str) -> Markup:
    return _tile(join_markup(score_number(metric, result), f" {metric.unit}".rstrip()), f"{metric.title}, {name}")


def _tile(value: object, name: str) -> Markup:
    return tag("div", tag("b", value), tag("span", name), class_="tile")


def _model_section(run_data: RunData) -> Markup:
    recipe, plan = run_data.recipe, run_data.plan
    rows = {row["key"]: row for row in plan["rows"]}
    settings = recipe.settings("finetune" if run_data.main else "end_to_end")

    def model(row: dict[str, Any], blocks: list[list[int]]) -> Markup:
        cost, depth = row["cost"], sum(map(sum, blocks))
        return join_markup(
            number(cost["parameters"], format_quantity(cost["parameters"], "")),
            f" parameters, {depth} blocks ({format_depths(blocks)}), ",
            flops_number(cost["forward_flops"]),
            " forward per sample",
        )

    keys = settings.model.model_dump(exclude={"name", "args"}) | settings.model.args
    described = ", ".join([settings.model.name, *(f"{key} = {value}" for key, value in keys.items())])
    parts = "; module k is trained only on partition k" if recipe.data.decentralized else ""
    data = join_markup(recipe.data.source or recipe.data.path or "", tag("code", f" {plan['data'][:12]}"), parts)
    pairs: dict[str, object] = {"model": described, "target": model(rows["end_to_end"], plan["target_depths"])}
    if origin := plan.get("initial_weights"):
        pairs["fine-tuned from"] = _describe_origin(origin)
    if "pretrain" in rows and run_data.main:
        pairs["meta model"] = model(rows["pretrain"], plan["meta_depths"])
        pairs["modules"] = _describe_modules(recipe)
    if run_data.baseline and recipe.end_to_end.init != "plain":
        pairs["end to end"] = f"initialized: {recipe.end_to_end.init}"
    return html.definitions({**pairs, "data": data, "seed": settings.train.seed})


def _describe_origin(origin: dict[str, Any]) -> Markup:
    """Return the finished model that a run fine-tunes, and what its training has cost."""
    if origin["flops"] is None:
        return join_markup(origin["source"], "; its training FLOPs are unknown, and not part of the costs below")
    return join_markup(
        origin["source"], "; its ", flops_number(origin["flops"]), " of training are not part of the costs below"
    )


def _describe_modules(recipe: Recipe) -> str:
    """Return the number of modules and how they are initialized."""
    number, incubated = recipe.plan.number, recipe.plan.incubated
    if len(incubated) == number:
        return f"{number}, initialized: {recipe.incubate.init}"
    expanded = f"made from the meta model: {recipe.expand.init}"
    if not incubated:
        return f"{number}, not incubated, {expanded}"
    own = f"{format_ranges(incubated)} incubated, initialized: {recipe.incubate.init}"
    return f"{number}; {own}; the others {expanded}"


def _phases_section(run_data: RunData) -> Markup:
    factor, sign = choose_prefix(phase.spent["flops"] for phase in run_data.phases)
    metrics = metric_columns(phase.metrics for phase in run_data.phases)
    unit = common_unit(phase.unit for phase in run_data.phases)
    scores = [metric.column for metric in metrics]
    head = ["phase", "state", *scores, "epochs", unit, f"{sign}FLOP", "time", "device time", "attempts"]
    rows: list[list[object]] = []
    for route in run_data.routes:
        for phase in route.phases:
            if phase is route.last and route.assembled:
                scored = [score_number(metric, route.assembled) for metric in metrics]
                rows.append(["assembled", tag("span", "done", class_="good"), *scored, *[NONE] * 6])
            rows.append(_phase_row(phase, factor, metrics))
    note = (
        f"{figures.join_titles(metrics)} on the validation {unit}. A module is evaluated as a hybrid, inside the"
        " meta model. Device time is time multiplied by the number of GPUs or CPU cores in use."
    )
    return join_markup(table(head, rows), tag("p", note, class_="soft"))


def _phase_row(phase: PhaseData, factor: float, metrics: Sequence[Metric]) -> list[object]:
    if not phase.started:
        return [phase.title, "not started", *[NONE] * (len(metrics) + 6)]
    state, spent_on = phase.status["state"], phase.device_seconds
    if phase.result is None:
        state = f"{state}, {phase.status['percent']:.0f} %"
    device = number(spent_on[0], f"{format_three_digits(spent_on[0])} {spent_on[1]}-s") if spent_on else NONE
    return [
        phase.title,
        tag("span", state, class_="good" if state == "done" else "bad"),
        *(score_number(metric, phase.result) for metric in metrics),
        *cost_numbers(phase.spent, factor),
        device,
        len(phase.attempts),
    ]


# ------------------------------------------------------------------------------------------------ curves


def _curves_section(run_data: RunData) -> Markup:
    routes = [(route.name, route) for route in run_data.routes if figures.has_points(route)]
    if not routes:
        return tag("p", "Nothing has been logged yet.")
    unit = common_unit(phase.unit for phase in run_data.phases)
    caption = (
        f"Phases in order. Dots and lines: complete models on the validation {unit} (meta model, assembled,"
        " fine-tuned; end to end); rings: modules as hybrids; pale lines: training loss, smoothed."
    )
    parts = [figure(figures.render_svg(figures.draw_progress, routes), caption)]
    if incubated := [(name, route) for name, route in routes if any(module.points for module in route.modules)]:
        drawing = figures.render_svg(figures.draw_module_curves, incubated)
        parts.append(figure(drawing, "Training loss of each module in its hybrid, smoothed."))
    return join_markup(*parts)


def _compatibility_section(route: TrainingRoute) -> Markup:
    scored = [phase for phase in route.modules if phase.status["partial"] and phase.result]
    if not scored:
        return tag("p", "No module has been evaluated together with others yet.")
    headline, unit = scored[0].headline, scored[0].unit
    metrics = metric_columns(phase.metrics for phase in scored)
    rows = []
    for phase in sorted(scored, key=lambda phase: len(phase.status["partial"]["joined"])):
        partial = phase.status["partial"]
        scores = [score_number(headline, phase.result), *(score_number(metric, partial) for metric in metrics)]
        rows.append([phase.title, ", ".join(map(str, partial["joined"])), *scores])
    partial_columns = [f"together, {headline.column}", *(metric.column for metric in metrics[1:])]
    head = ["in order of completion", "modules used", f"hybrid, {headline.column}", *partial_columns]
    note = (
        "Before fine-tuning, each finished module was evaluated together with the previously finished modules, and"
        " with the meta model's modules in place of the others. With all modules, this is the assembled model."
    )
    drawing = figures.render_svg(figures.draw_compatibility, route)
    caption = f"{figures.join_titles([headline])} on the validation {unit}."
    return join_markup(tag("p", note), figure(drawing, caption), table(head, rows))


# ------------------------------------------------------------------------------------------------ costs


def _cost_section(run_data: RunData) -> Markup:
    main, baseline = run_data.main, run_data.baseline
    planned = next(row for row in run_data.plan["rows"] if row["key"] == "end_to_end")["total_flops"]
    bars = {main.name: _bar(main, "planned")} if main else {}
    bars["end to end"] = _bar(baseline, "end_to_end planned") if baseline else [("end_to_end planned", planned)]
    longest = max(sum(amount for _, amount in parts) for parts in bars.values()) or 1.0
    lines = []
    for name, parts in bars.items():
        widths = [(kind, amount) for kind, amount in parts if amount]
        inside = [tag("i", "", class_=kind, style=f"width:{100 * amount / longest:.2f}%") for kind, amount in widths]
        spent = sum(amount for kind, amount in parts if "planned" not in kind)
        amount_text = flops_number(spent) if spent else join_markup(flops_number(planned), " planned")
        lines.append(join_markup(tag("span", name), tag("div", *inside, class_="bar"), tag("span", amount_text)))
    kinds = {"pretrain": "meta model", "incubate": "modules", "finetune": "fine-tuning", "end_to_end": "end to end"}
    keys = join_markup(*(tag("span", title, class_=f"key {kind}") for kind, title in kinds.items()))
    key = tag("p", keys, tag("span", "\u2002pale: planned, not spent", class_="soft"))
    return join_markup(tag("div", *lines, class_="bars"), key, _cost_summary(run_data), _ways_table(run_data))


def _bar(route: TrainingRoute, rest: str) -> list[tuple[str, float]]:
    """Return the kind and the FLOPs of each part of a bar: those of each phase so far, then the remaining FLOPs.

    Args:
        route: The route.
        rest: The kind of the remaining FLOPs.
    """
    unfinished = [phase for phase in route.phases if phase.result is None]
    left = sum(phase.planned["total_flops"] for phase in unfinished) - sum(phase.spent["flops"] for phase in unfinished)
    return [*((str(phase.planned["phase"]), phase.spent["flops"]) for phase in route.phases), (rest, max(0.0, left))]


def _cost_summary(run_data: RunData) -> Markup:
    """Return a summary of the costs in sentences."""
    main, baseline = run_data.main, run_data.baseline
    words: list[str] = []
    if main and len(main.modules) > 1 and main.spent["flops"]:
        share = main.last.spent["flops"] / main.spent["flops"]
        words.append(
            f"{'Training so far takes' if main.missing else 'Training takes'}"
            f" {format_duration(main.spent['seconds'])} with one phase after another, and"
            f" {format_duration(main.path('seconds'))} with all modules in parallel."
            + (f" Fine-tuning is {100 * share:.0f} % of the FLOPs spent." if share else "")
        )
    if main and baseline and main.last.score is not None and baseline.last.score is not None:
        metric, samples = main.last.headline, (main.last.result or {})["samples"]
        gap = main.last.score - baseline.last.score
        score, baseline_score, difference = (
            format_metric(metric, x, samples) for x in (main.last.score, baseline.last.score, abs(gap))
        )
        unit = f" {metric.unit}".rstrip()
        points = " points" if metric.unit == "%" else unit
        ratio = main.spent["flops"] / (baseline.spent["flops"] or 1)
        words.append(
            f"{main.name.capitalize()} {score}{unit}, end to end {baseline_score}{unit}: {difference}{points}"
            f" {'more' if gap >= 0 else 'less'}, for {ratio:.2f} times the FLOPs. One seed each."
        )
    elif main and not baseline:
        command = tag("code", "bigincubate run --baseline")
        note = "This run has no end-to-end baseline; its planned cost is shown ("
        words.append(join_markup(note, command, " trains one)."))
    return join_markup(*(tag("p", sentence) for sentence in words))


def _ways_table(run_data: RunData) -> Markup:
    """Return what each way has cost so far, with the same columns as `plan --ways`."""
    head = ["way", "FLOPs", "on the critical path", "memory before", "memory last", "sent before", "sent last"]
    rows = []
    for route in run_data.routes:
        before = route.phases[:-1]
        memory = [max((phase.peak_memory for phase in before), default=0.0), route.last.peak_memory]
        sent = [sum(phase.sent_gradients for phase in before), route.last.sent_gradients]
        cells = [number(size, format_quantity(size, "B")) if size else NONE for size in (*memory, *sent)]
        rows.append(
            [route.name, *(flops_number(flops) for flops in (route.spent["flops"], route.path("flops"))), *cells]
        )
    note = join_markup(
        "On the critical path, only the largest module counts, because modules can be trained in parallel. Memory is"
        " the peak of rank 0, and what was sent are the gradients of phases with several ranks, both before and in the"
        " last phase. ",
        tag("code", "bigincubate plan --ways"),
        " compares these costs with those of other ways.",
    )
    return join_markup(table(head, rows), tag("p", note, class_="soft"))


def _usage_section(run_data: RunData, usage: Mapping[str, JobUsage]) -> Markup:
    titles = {phase.key: phase.title for phase in run_data.phases} | {"gate": "gates"}
    total = JobUsage([attempt for used in usage.values() for attempt in used.attempts])
    shown = {title: usage[key] for key, title in titles.items() if key in usage} | {"all": total}
    head = ["phase", "node hours", "CPU efficiency", "peak memory", *(["energy"] if total.energy else []), "starts"]
    rows = []
    for title, used in shown.items():
        efficiency = used.cpu_efficiency
        row: list[object] = [
            title,
            number(used.node_hours, format_three_digits(used.node_hours)),
            NONE if efficiency is None else number(efficiency, f"{100 * efficiency:.0f} %"),
            number(used.memory, format_quantity(used.memory, "B")) if used.memory else NONE,
        ]
        if total.energy:
            row.append(number(used.energy, format_quantity(used.energy, "J")) if used.energy else NONE)
        rows.append([*row, len(used.attempts)])
    note = (
        "From Slurm's accounting, which counts from the start of a job. CPU efficiency is the used share of the"
        " allocated CPU time, of jobs that have ended. Peak memory is that of the largest rank. A requeued job starts"
        " several times."
    )
    return join_markup(table(head, rows), tag("p", note, class_="soft"))


# ------------------------------------------------------------------------------------------------ events and machines


def _timeline_section(timeline: Sequence[TimelineEvent]) -> Markup:
    faults = [event for event in timeline if event.fault]
    count = f"{len(faults)} interruptions and faults." if len(faults) > 1 else "One interruption." if faults else ""
    times = [format_time(event.time, UTC) for event in timeline]
    texts = [tag("span", event.text, class_="bad") if event.fault else event.text for event in timeline]
    return join_markup(
        tag("p", count or "There were no interruptions."),
        table(["UTC", "event"], list(zip(times, texts, strict=True)), words=True),
    )


def _environment_section(run_data: RunData) -> Markup:
    attempts = [attempt for phase in run_data.phases for attempt in phase.attempts]
    pairs = {
        "devices": describe_devices(attempts) or "not recorded",
        "versions": describe_versions(attempts) or "not recorded",
        "hosts": ", ".join(sorted({attempt["host"] for attempt in attempts})) or "none yet",
    }
    return html.definitions(pairs)


def _verification_section(findings: Sequence[Finding]) -> Markup:
    counts = Counter(each.verdict for each in findings)
    bad = [each for each in findings if each.verdict in (Verdict.DAMAGED, Verdict.STALE)]
    words = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    color = {"class_": "bad" if bad else "good"} if bad or counts[Verdict.GOOD] else {}
    summary = tag("p", f"Artifacts and results, verified for this page: {words}.", **color)
    command = tag("code", "bigincubate verify")
    more = tag("p", "Data and resume checkpoints were not verified for this page: ", command, " verifies all files.")
    rows = [[each.part, f"{each.verdict}: {each.path} {each.why}"] for each in bad]
    return join_markup(summary, table(["part", "problem"], rows, words=True) if rows else "", more)
