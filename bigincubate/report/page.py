"""The page of one run: what was trained, what it came to, what it cost, how it went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ..tasks.metric import Metric
from . import figures, html
from .console_tables import common_unit, depths_text, metric_columns
from .html import NONE, Markup, data, definitions, figure, flops, join, score, table, tag, text
from .run_data import PhaseFacts, RunFacts, Way
from .timeline import Moment, story
from .units import duration, measured, prefix, quantity, three
from .verify import Finding, Verdict


def report(facts: RunFacts, findings: Sequence[Finding]) -> str:
    """The page as HTML.

    Args:
        findings: what became of verifying artifacts and results.
    """
    moments = story(facts)
    title = f"{facts.recipe.name}: {facts.run.path.resolve().name}"
    incubated = facts.way("incubated")
    return html.page(
        title,
        _head(facts, moments),
        tag("h2", "What was trained"),
        _trained(facts),
        tag("h2", "The phases"),
        _phases(facts),
        *_curves(facts),
        *(_fit(incubated) if incubated else ()),
        tag("h2", "What it cost"),
        _bill(facts),
        tag("h2", "How it went"),
        _history(facts, moments),
        tag("h2", "Where it ran"),
        _environment(facts),
        tag("h2", "Verification"),
        _verification(findings),
        tag("details", tag("summary", "The recipe, as resolved"), tag("pre", facts.recipe.toml())),
        tag("footer", f"bigincubate report {facts.run.path}"),
    )


# ------------------------------------------------------------------------------------------------ at the top


def _head(facts: RunFacts, moments: Iterable[Moment]) -> Markup:
    missing = facts.missing
    state = tag("span", "unfinished" if missing else "done", class_="state" if missing else "state done")
    said = tag("p", facts.recipe.description, class_="soft") if facts.recipe.description else Markup()
    told = tag("p", f"Not there yet: {', '.join(missing)}.", class_="missing") if missing else Markup()
    tiles = []
    for way in facts.ways:
        if way.last.result:
            name = "fine-tuned" if way.modules else "end to end"
            tiles.append(_score_tile(way.last.headline, way.last.result, name))
        if way.assembled:
            tiles.append(_score_tile(way.last.headline, way.assembled, "assembled, not fine-tuned"))
        tiles.append(_tile(flops(way.spent["flops"]), f"for training, {way.name}"))
        tiles.append(_tile(html.seconds(way.spent["seconds"]), f"of training, {way.name}"))
    if healed := sum(moment.fault for moment in moments):
        tiles.append(
            _tile(str(healed), "interruptions and faults overcome" if not missing else "interruptions and faults")
        )
    return join(tag("h1", facts.recipe.name, state), said, told, tag("div", *tiles, class_="tiles"))


def _score_tile(metric: Metric, result: dict[str, Any], name: str) -> Markup:
    return _tile(join(score(metric, result), f" {metric.unit}".rstrip()), f"{metric.title}, {name}")


def _tile(value: object, name: str) -> Markup:
    return tag("div", tag("b", value), tag("span", name), class_="tile")


def _trained(facts: RunFacts) -> Markup:
    recipe, plan = facts.recipe, facts.plan
    rows = {row["key"]: row for row in plan["rows"]}
    target, meta = rows["end_to_end"], rows["pretrain"]
    settings = recipe.settings("finetune" if facts.way("incubated") else "end_to_end")

    def model(row: dict[str, Any], blocks: list[list[int]]) -> Markup:
        cost, depth = row["cost"], sum(map(sum, blocks))
        return join(
            data(cost["parameters"], quantity(cost["parameters"], "")),
            f" parameters, {depth} blocks ({depths_text(blocks)}), ",
            flops(cost["forward_flops"]),
            " forward for a sample",
        )

    keys = settings.model.model_dump(exclude={"name", "args"}) | settings.model.args
    described = ", ".join([settings.model.name, *(f"{key} = {value}" for key, value in keys.items())])
    parts = "; module k only on part k" if recipe.data.decentralized else ""
    pairs: list[tuple[str, object]] = [
        ("model", described),
        ("target", model(target, plan["target_depths"])),
    ]
    if facts.way("incubated"):
        pairs.append(("meta model", model(meta, plan["meta_depths"])))
        pairs.append(("modules", f"{len(plan['target_depths'])}, initialised: {recipe.incubate.init}"))
    pairs += [
        ("data", join(recipe.data.source or recipe.data.path or "", tag("code", f" {plan['data'][:12]}"), parts)),
        ("seed", str(settings.train.seed)),
    ]
    return definitions(pairs)


def _phases(facts: RunFacts) -> Markup:
    factor, sign = prefix(phase.spent["flops"] for phase in facts.phases)
    metrics = metric_columns(phase.metrics for phase in facts.phases)
    unit = common_unit(phase.unit for phase in facts.phases)
    scores = [metric.column for metric in metrics]
    head = ["phase", "state", *scores, "epochs", unit, f"{sign}FLOP", "time", "device time", "attempts"]
    rows: list[list[object]] = []
    for way in facts.ways:
        for phase in way.phases:
            if phase is way.last and way.assembled:
                done = tag("span", "done", class_="good")
                rows.append(["assembled", done, *(score(metric, way.assembled) for metric in metrics), *[NONE] * 6])
            rows.append(_phase(phase, factor, metrics))
    return join(
        table(head, rows),
        tag(
            "p",
            f"{figures.titles(metrics)} on the validation {unit}. A module is scored as a hybrid: itself, and the meta"
            " model around it. Device time: time, times the GPUs or CPU cores at work.",
            class_="soft",
        ),
    )


def _phase(phase: PhaseFacts, factor: float, metrics: Sequence[Metric]) -> list[object]:
    spent, state = phase.spent, phase.status["state"]
    if phase.result is None and phase.begun:
        state = f"{state}, {phase.status['percent']:.0f} %"
    spent_on = phase.device_seconds
    device = data(spent_on[0], f"{three(spent_on[0])} {spent_on[1]}-s") if spent_on else NONE
    if not phase.begun:
        return [phase.title, "not begun", *[NONE] * (len(metrics) + 6)]
    return [
        phase.title,
        tag("span", state, class_="good" if state == "done" else "bad"),
        *(score(metric, phase.result) for metric in metrics),
        data(spent["epochs"], f"{spent['epochs']:.3g}"),
        html.count(spent["seen"]),
        html.scaled(spent["flops"], factor),
        html.seconds(spent["seconds"]),
        device,
        len(phase.attempts),
    ]


# ------------------------------------------------------------------------------------------------ curves


def _curves(facts: RunFacts) -> list[Markup]:
    ways = [(way.name, way) for way in facts.ways if any(phase.points for phase in way.phases)]
    if not ways:
        return [tag("h2", "Curves"), tag("p", "Nothing was logged yet.")]
    unit = common_unit(phase.unit for phase in facts.phases)
    parts = [
        tag("h2", "Curves"),
        figure(
            figures.svg(lambda: figures.progress(ways)),
            f"Phases one after another. Dots and lines: validation {unit}, whole models (meta model, assembled,"
            " fine-tuned; end to end); rings: modules as hybrids; faint: loss of training, smoothed.",
        ),
    ]
    if grown := [(name, way) for name, way in ways if any(module.points for module in way.modules)]:
        drawing = figures.svg(lambda: figures.module_curves(grown))
        parts.append(figure(drawing, "Each module in its hybrid, the meta model around it frozen; smoothed."))
    return parts


def _fit(way: Way) -> list[Markup]:
    scored = [phase for phase in way.modules if phase.status["partial"] and phase.result]
    title = tag("h2", "Do the modules fit?")
    if not scored:
        return [title, tag("p", "No module was scored beside others yet.")]
    headline, unit = scored[0].headline, scored[0].unit
    metrics = metric_columns(phase.metrics for phase in scored)
    rows = []
    for phase in sorted(scored, key=lambda phase: len(phase.status["partial"]["joined"])):
        partial = phase.status["partial"]
        joined = ", ".join(map(str, partial["joined"]))
        rows.append(
            [phase.title, joined, score(headline, phase.result), *(score(metric, partial) for metric in metrics)]
        )
    beside = [f"beside those, {headline.column}", *(metric.column for metric in metrics[1:])]
    head = ["in the order of finishing", "modules in", f"hybrid, {headline.column}", *beside]
    return [
        title,
        tag(
            "p",
            "Before fine-tuning: each module when it was finished, beside those that were, the meta model in place of"
            " the others. With all modules in it is the assembled model.",
        ),
        figure(figures.svg(lambda: figures.fit(way)), f"{figures.titles([headline])} on the validation {unit}."),
        table(head, rows),
    ]


# ------------------------------------------------------------------------------------------------ the bill


def _bill(facts: RunFacts) -> Markup:
    incubated, baseline = facts.way("incubated"), facts.way("end to end")
    planned = next(row for row in facts.plan["rows"] if row["key"] == "end_to_end")["total_flops"]
    bars: list[tuple[str, list[tuple[str, float]]]] = []
    if incubated:
        done = [(str(phase.planned["phase"]), phase.spent["flops"]) for phase in incubated.phases]
        rest = sum(phase.planned["total_flops"] for phase in incubated.phases if phase.result is None)
        left = max(0.0, rest - sum(phase.spent["flops"] for phase in incubated.phases if phase.result is None))
        bars.append(("incubated", [*done, ("planned", left)]))
    done = [("end_to_end", baseline.spent["flops"] if baseline else 0.0)]
    left = 0.0 if baseline and not baseline.missing else max(0.0, planned - done[0][1])
    bars.append(("end to end", [*done, ("end_to_end planned", left)]))
    longest = max(sum(amount for _, amount in parts) for _, parts in bars) or 1.0
    lines = []
    for name, parts in bars:
        widths = [(kind, amount) for kind, amount in parts if amount]
        inside = [tag("i", "", class_=kind, style=f"width:{100 * amount / longest:.2f}%") for kind, amount in widths]
        spent = sum(amount for kind, amount in parts if "planned" not in kind)
        told = flops(spent) if spent else join(flops(planned), " planned")
        lines.append(join(tag("span", name), tag("div", *inside, class_="bar"), tag("span", told)))
    kinds = {"pretrain": "meta model", "incubate": "modules", "finetune": "fine-tuning", "end_to_end": "end to end"}
    keys = join(*(tag("span", title, class_=f"key {kind}") for kind, title in kinds.items()))
    key = tag("p", keys, tag("span", "\u2002pale: planned, not spent", class_="soft"))
    return join(tag("div", *lines, class_="bars"), key, _verdict(facts))


def _verdict(facts: RunFacts) -> Markup:
    """The bill in words; numbers where both ways are done, or what they lack."""
    incubated, baseline = facts.way("incubated"), facts.way("end to end")
    words = []
    if incubated and len(incubated.modules) > 1:
        share = incubated.last.spent["flops"] / (incubated.spent["flops"] or 1)
        words.append(
            f"Phases one after another: {duration(incubated.spent['seconds'])} of training; modules beside each other:"
            f" {duration(incubated.path_seconds)}. Fine-tuning is {100 * share:.0f} % of the FLOPs spent."
        )
    if incubated and baseline and incubated.last.score is not None and baseline.last.score is not None:
        metric, samples = incubated.last.headline, (incubated.last.result or {})["samples"]
        gap = incubated.last.score - baseline.last.score
        one, two, apart = (measured(metric, x, samples) for x in (incubated.last.score, baseline.last.score, abs(gap)))
        unit, points = f" {metric.unit}".rstrip(), " points" if metric.unit == "%" else f" {metric.unit}".rstrip()
        ratio = incubated.spent["flops"] / (baseline.spent["flops"] or 1)
        words.append(
            f"Incubated {one}{unit}, end to end {two}{unit}: {apart}{points} {'more' if gap >= 0 else 'less'},"
            f" for {ratio:.2f} times the FLOPs. One seed each."
        )
    elif incubated and not baseline:
        words.append("Nothing was trained end to end in this run (run --baseline does): its cost is the plan's.")
    return join(*(tag("p", sentence) for sentence in words))


# ------------------------------------------------------------------------------------------------ how, where, whether


def _history(facts: RunFacts, moments: Sequence[Moment]) -> Markup:
    faults = [moment for moment in moments if moment.fault]
    said = f"{len(faults)} interruptions and faults." if len(faults) > 1 else "One interruption." if faults else ""
    rows = [
        [moment.when, tag("span", moment.what, class_="bad") if moment.fault else moment.what] for moment in moments
    ]
    return join(tag("p", said or "Nothing interrupted it."), table(["UTC", "what"], rows, words=True))


def _environment(facts: RunFacts) -> Markup:
    attempts = [attempt for phase in facts.phases for attempt in phase.attempts]
    machines = Counter(
        f"{each['device']}, {each['world']} rank{'s' if each['world'] > 1 else ''}"
        + (
            f" of {each['threads']} thread{'s' if each['threads'] > 1 else ''}"
            if each["device"].startswith("CPU")
            else ""
        )
        + (f", {each['sharding']}" if each["world"] > 1 else "")
        for each in attempts
        if "device" in each
    )
    versions = Counter(
        ", ".join(f"{name} {version}" for name, version in each["versions"].items())
        for each in attempts
        if "versions" in each
    )

    def listed(found: Counter[str]) -> str:
        several = len(found) > 1
        return (
            "; ".join(f"{what} ({n} attempts)" if several else what for what, n in found.most_common()) or "not noted"
        )

    hosts = ", ".join(sorted({attempt["host"] for attempt in attempts})) or "none yet"
    return definitions([("devices", listed(machines)), ("versions", listed(versions)), ("hosts", hosts)])


def _verification(findings: Sequence[Finding]) -> Markup:
    counts = Counter(each.verdict for each in findings)
    bad = [each for each in findings if each.verdict in (Verdict.DAMAGED, Verdict.STALE)]
    words = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    said = tag("p", f"Artifacts and results, hashed for this page: {words}.", class_="bad" if bad else "good")
    more = tag(
        "p", "Data and resume checkpoints were not read for it: ", tag("code", "bigincubate verify"), " reads all."
    )
    rows = [[each.part, join(text(each.verdict), ": ", str(each.path), " ", each.why)] for each in bad]
    return join(said, table(["part", "problem"], rows, words=True) if rows else "", more)
