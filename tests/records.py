"""The content of files of a run, for tests that write them without a training."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from bigincubate.tasks.metric import Metric


def make_result(**fields: Any) -> dict[str, Any]:
    """Return the result of a phase, with these fields instead of the usual ones."""
    usual = {"metrics": {"top1": 50.0}, "headline": "top1", "samples": 8, "unit": "images"}
    return usual | {"steps": 1, "seen": 8, "flops": 100, "seconds": 1.0} | fields


def make_attempt(**fields: Any) -> dict[str, Any]:
    """Return an attempt that is running on another machine, with these fields instead of the usual ones."""
    usual = {"state": "running", "host": "n1", "pid": 1, "job": None, "sharding": "ddp"}
    return usual | {"device": "CPU (x86_64)", "world": 1, "threads": 1, "versions": {"torch": "2.9"}} | fields


def make_plan(*keys: str, **fields: Any) -> dict[str, Any]:
    """Return the plan of a run with these phases, and with those that every plan has.

    Args:
        keys: Keys of phases, such as ``pretrain`` or ``incubate/0``.
        fields: Fields of each phase, instead of the usual ones.
    """
    cost = dict.fromkeys(("parameters", "forward_flops", "training_flops", "allreduce_bytes"), 1)
    usual = {"metrics": [asdict(Metric("top1", "top-1", "%"))], "unit": "images", "cost": cost, "batch_size": 8}
    usual |= {"batch_units": 8, "steps": 8, "stable_steps": 0, "epochs": 1.0, "total_flops": 64, "identity": {}}
    rows = []
    for key in dict.fromkeys((*keys, "finetune", "end_to_end")):
        phase, _, module = key.partition("/")
        about = {"key": key, "phase": phase, "module": int(module) if module else None, "title": key.replace("/", " ")}
        rows.append({**usual, "data": "d" * 64, **about, **fields})
    costs = {"incubation_flops": 1, "end_to_end_flops": 1, "finetune_share": 1.0}
    return {"data": "d" * 64, "target_depths": [[2]], "meta_depths": [[1]], **costs, "rows": rows}
