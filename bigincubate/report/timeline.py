"""The timeline of a run: stops, failures, rollbacks, requeues and changed settings, with one line per event."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..errors import format_count
from ..storage.record_types import STRAGGLER_TYPES, ListOf, Types, has_types
from .console_tables import format_ranges, format_stragglers
from .run_data import PhaseData, RunData

ENDS = {
    "preempted": "stopped with a checkpoint",
    "running": "stopped without a message (killed, or the machine failed)",
    "failed": "failed",
}


@dataclass(frozen=True)
class EventKind:
    """A kind of events in ``events.jsonl``.

    Attributes:
        text: The text of an event. Its placeholders are names of fields, whose values `_format_field` formats.
        types: The types of these fields.
    """

    text: str
    types: Types = field(default_factory=dict)


EVENTS = {
    "created": EventKind("created from the recipe {recipe}", {"recipe": str}),
    "forked": EventKind("forked from {source}", {"source": str}),
    "imported": EventKind("{phase}: imported from {source}", {"phase": str, "source": str}),
    "collected": EventKind("{phase}: collected from {source}", {"phase": str, "source": str}),
    "recipe_changed": EventKind("recipe changed: {changes}", {"changes": ListOf(str)}),
    "done": EventKind("{phase}: done after {steps}", {"phase": str, "steps": int}),
    "shared_loader": EventKind("co-trained: {made} made, {sent} sent to modules", {"made": int, "sent": int}),
    "partial_assembly": EventKind(
        "{phase}: evaluated together with the finished modules ({joined})", {"phase": str, "joined": ListOf(int)}
    ),
    "rolled_back": EventKind(
        "{phase}: too many non-finite gradients at step {step}; returned to step {to}",
        {"phase": str, "step": int, "to": int},
    ),
    "stragglers": EventKind("{phase}: {stragglers}", {"phase": str, "stragglers": ListOf(STRAGGLER_TYPES)}),
    "made_again": EventKind("{phase}: created again: {reason}", {"phase": str, "reason": str}),
    "submitted": EventKind("submitted: job {job} ({kind}{modules})", {"job": str, "kind": str, "modules": ListOf(int)}),
    "cancelled": EventKind("canceled: {jobs}", {"jobs": ListOf(str)}),
    "baseline": EventKind("an end-to-end baseline was requested"),
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
        checkpoint = requeue["checkpoint"]
        where = "the beginning" if checkpoint is None else f"step {checkpoint}"
        text = f"{phase.title}: requeued to resume from {where}: {requeue['reason']}"
        yield TimelineEvent(requeue["time"], text, fault=True)


def _event(event: dict[str, Any], titles: dict[str, str]) -> TimelineEvent:
    """Convert a row of ``events.jsonl`` to an event.

    Only the kind is given for an event that this version does not know, or whose fields are damaged.
    """
    name = event["event"]
    text, kind = name.replace("_", " "), EVENTS.get(name)
    if kind is not None and has_types(event, kind.types):
        text = kind.text.format(**{key: _format_field(key, event[key], titles) for key in kind.types})
    return TimelineEvent(event["time"], text, fault=name in FAULTS)


def _format_field(key: str, value: Any, titles: dict[str, str]) -> str:
    """Return the text of a field of an event."""
    match key:
        case "phase":
            return titles.get(value, value)
        case "changes":
            return "; ".join(value)
        case "jobs":
            return f"{'job' if len(value) == 1 else 'jobs'} {', '.join(value)}"
        case "joined":
            return format_ranges(value)
        case "modules":
            return f", modules {format_ranges(value)}" if value else ""
        case "stragglers":
            return format_stragglers(value) or "the ranks are equally fast again"
        case "steps":
            return format_count(value, "step")
        case "made":
            return format_count(value, "batch")
        case "step" | "to" | "sent":
            return f"{value:,}"
    return str(value)
