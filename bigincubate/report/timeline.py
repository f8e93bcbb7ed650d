"""What happened to a run, a line each: stops, failures, returns to a checkpoint, requeues, changes on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from .console_tables import ranges
from .run_data import PhaseFacts, RunFacts

ENDS = {
    "preempted": "stopped with a checkpoint",
    "running": "ended without a word (killed, or its machine was lost)",
    "failed": "failed",
}


@dataclass(frozen=True)
class Moment:
    time: float  # seconds since 1970
    what: str
    fault: bool = False  # something that had to be overcome

    @property
    def when(self) -> str:
        return f"{datetime.fromtimestamp(self.time, UTC):%Y-%m-%d %H:%M:%S}"


def story(facts: RunFacts) -> list[Moment]:
    """All of it, oldest first."""
    titles = {phase.key: phase.title for phase in facts.phases}
    moments = [_event(event, titles) for event in facts.events]
    moments += [moment for phase in facts.phases for moment in _attempts(phase)]
    return sorted(moments, key=lambda moment: moment.time)


def _attempts(phase: PhaseFacts) -> Iterator[Moment]:
    last = len(phase.attempts) - 1
    for index, attempt in enumerate(phase.attempts):
        state = phase.status["state"] if index == last and attempt["state"] == "running" else attempt["state"]
        who = f"{phase.title}, attempt {attempt['attempt']} on {attempt['host']}"
        who += f" (job {attempt['job']})" if attempt.get("job") else ""
        if state in ("running", "queued") and index == last:
            yield Moment(attempt["time"], f"{who}: begun")
        elif state == "done":
            if index:
                yield Moment(attempt["time"], f"{who}: went on, and ended well")
        else:
            why = f": {attempt['error']}" if attempt.get("error") else ""
            yield Moment(attempt["time"], f"{who}: {ENDS.get(state, ENDS['running'])}{why}", fault=True)
    for requeue in phase.requeues:
        where = f"step {requeue['checkpoint']}" if requeue["checkpoint"] is not None else "the beginning"
        yield Moment(requeue["time"], f"{phase.title}: requeued to go on from {where}: {requeue['reason']}", fault=True)


def _event(event: dict[str, Any], titles: dict[str, str]) -> Moment:
    kind, time = event["event"], event["time"]
    title = titles.get(event.get("phase", ""), event.get("phase", ""))
    match kind:
        case "created":
            return Moment(time, f"created from the recipe {event['recipe']}")
        case "recipe_changed":
            return Moment(time, f"recipe changed: {'; '.join(event['changes'])}")
        case "done":
            return Moment(time, f"{title}: done after {event['steps']:,} steps")
        case "shared_loader":
            return Moment(time, f"co-trained: {event['made']:,} batches made, {event['sent']:,} sent to modules")
        case "partial_assembly":
            return Moment(time, f"{title}: scored beside the modules that were finished ({ranges(event['joined'])})")
        case "rolled_back":
            what = (
                f"{title}: too many gradients were not finite at step {event['step']:,}; back to step {event['to']:,}"
            )
            return Moment(time, what, fault=True)
        case "made_again":
            return Moment(time, f"{title}: made again: {event['reason']}", fault=True)
        case "submitted":
            modules = f", modules {ranges(event['modules'])}" if event["modules"] else ""
            return Moment(time, f"submitted: job {event['job']} ({event['kind']}{modules})")
        case "cancelled":
            return Moment(time, f"cancelled: jobs {', '.join(event['jobs'])}", fault=True)
        case "baseline":
            return Moment(time, "an end-to-end baseline was asked for")
    return Moment(time, kind.replace("_", " "))
