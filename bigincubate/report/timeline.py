"""The timeline of a run: stops, failures, rollbacks, requeues and changed settings, with one line per event."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..errors import format_count
from .console_tables import format_ranges, format_stragglers
from .run_data import PhaseData, RunData

ENDS = {
    "preempted": "stopped with a checkpoint",
    "running": "stopped without a message (killed, or the machine failed)",
    "failed": "failed",
}
EVENTS = {  # texts for the rows of ``events.jsonl``
    "created": "created from the recipe {recipe}",
    "forked": "forked from {source}",
    "collected": "{title}: collected from {source}",
    "recipe_changed": "recipe changed: {changes}",
    "done": "{title}: done after {steps}",
    "shared_loader": "co-trained: {made:,} batches made, {sent:,} sent to modules",
    "partial_assembly": "{title}: evaluated together with the finished modules ({joined})",
    "rolled_back": "{title}: too many non-finite gradients at step {step:,}; returned to step {to:,}",
    "stragglers": "{title}: {stragglers}",
    "made_again": "{title}: created again: {reason}",
    "submitted": "submitted: job {job} ({kind}{modules})",
    "cancelled": "canceled: {jobs}",
    "baseline": "an end-to-end baseline was requested",
}
FAULTS = ("rolled_back", "made_again", "cancelled")


@dataclass(frozen=True)
class TimelineEvent:
    """One event.

    Attributes:
        time: Unix time in seconds.
        text: Description of the event.
        fault: Whether it was a failure or an interruption.
    """

    time: float
    text: str
    fault: bool = False


def build_timeline(run_data: RunData) -> list[TimelineEvent]:
    """Return all events of a run, oldest first."""
    titles = {phase.key: phase.title for phase in run_data.phases}
    timeline = [_event(event, titles) for event in run_data.events]
    timeline += [event for phase in run_data.phases for event in _attempts(phase)]
    return sorted(timeline, key=lambda event: event.time)


def _attempts(phase: PhaseData) -> Iterator[TimelineEvent]:
    last = len(phase.attempts) - 1
    for index, attempt in enumerate(phase.attempts):
        state = phase.status["state"] if index == last and attempt["state"] == "running" else attempt["state"]
        attempt_name = f"{phase.title}, attempt {attempt['attempt']} on {attempt['host']}"
        attempt_name += f" (job {attempt['job']})" if attempt.get("job") else ""
        if state in ("running", "queued") and index == last:
            yield TimelineEvent(attempt["time"], f"{attempt_name}: started")
        elif state == "done":
            if index:
                yield TimelineEvent(attempt["time"], f"{attempt_name}: resumed and finished")
        else:
            why = f": {attempt['error']}" if attempt.get("error") else ""
            yield TimelineEvent(attempt["time"], f"{attempt_name}: {ENDS.get(state, ENDS['running'])}{why}", fault=True)
    for requeue in phase.requeues:
        where = f"step {requeue['checkpoint']}" if requeue["checkpoint"] is not None else "the beginning"
        text = f"{phase.title}: requeued to resume from {where}: {requeue['reason']}"
        yield TimelineEvent(requeue["time"], text, fault=True)


def _event(event: dict[str, Any], titles: dict[str, str]) -> TimelineEvent:
    """Convert a row of ``events.jsonl`` to an event.

    Only the kind is given for an event that this version does not know, or whose fields are damaged.
    """
    kind = event["event"]
    text = kind.replace("_", " ")
    if kind in EVENTS:
        with suppress(AttributeError, KeyError, TypeError, ValueError, OverflowError):
            text = EVENTS[kind].format(**_event_fields(event, titles))
    return TimelineEvent(event["time"], text, fault=kind in FAULTS)


def _event_fields(event: dict[str, Any], titles: dict[str, str]) -> dict[str, Any]:
    """Return the values for the text of an event."""
    phase, modules, jobs = event.get("phase", ""), event.get("modules"), event.get("jobs", ())
    fields = event | {
        "title": titles.get(phase, phase),
        "changes": "; ".join(event.get("changes", ())),
        "jobs": f"job{'s' * (len(jobs) != 1)} {', '.join(jobs)}",
        "joined": format_ranges(event.get("joined", [])),
        "stragglers": format_stragglers(event.get("stragglers", [])) or "the ranks are equally fast again",
        "modules": f", modules {format_ranges(modules)}" if modules else "",
    }
    if "steps" in event:
        fields["steps"] = format_count(event["steps"], "step")
    return fields
