"""Whether modules fit, seen before fine-tuning: each is scored beside those that are finished when it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bigincubate.files import read_json_lines
from bigincubate.report.console_tables import format_ranges
from bigincubate.report.status import run_status
from bigincubate.training.partial_assembly import build_partial_assembly, finished_modules

Harnesses = Callable[..., Any]
SETS = ("train.max_steps=6", "plan.target_depths=[2, 2, 3]", "plan.meta_depths=[1, 1, 1]")


@pytest.fixture(scope="module")
def trained(harness: Harnesses) -> Any:
    """Modules that finish in the order 2, 0, 1; fine-tuned."""
    made = harness(*SETS)
    made.train("pretrain")
    for module in (2, 0, 1):
        made.train("incubate", module)
    made.train("finetune")
    return made


def partial(harness: Any, module: int) -> dict[str, Any]:
    found: dict[str, Any] = harness.run.phase("incubate", module).partial
    return found


def scored(result: dict[str, Any]) -> list[float]:
    return [*result["metrics"].values(), result["samples"]]


def test_module_is_scored_with_those_that_finished_before(trained: Any) -> None:
    assert [partial(trained, module)["joined"] for module in (2, 0, 1)] == [[2], [0, 2], [0, 1, 2]]
    assert {partial(trained, module)["modules"] for module in range(3)} == {3}


def test_first_score_is_of_its_hybrid_and_last_of_the_assembled_model(trained: Any) -> None:
    assert scored(partial(trained, 2)) == scored(trained.run.phase("incubate", 2).result)
    assert scored(partial(trained, 1)) == scored(trained.run.assembled.result)
    assert scored(partial(trained, 0)) not in ([scored(partial(trained, module)) for module in (1, 2)])


def test_partial_assembly_computes_with_the_modules_and_the_meta_model(trained: Any) -> None:
    """Blocks 0-1 and 3-5 are of modules 0 and 2, block 2 is the meta model's block 1."""
    context = trained.context("incubate", 0)
    state = torch.get_rng_state()
    model = build_partial_assembly(context, [0, 2])
    assert torch.equal(torch.get_rng_state(), state)
    whole = {name: tensor for module in (0, 2) for name, tensor in trained.weights("incubate", module).items()}
    found = model.state_dict()
    for here, source, there in ((0, whole, 0), (1, whole, 1), (3, whole, 4), (5, whole, 6)):
        assert torch.equal(found[f"blocks.{here}.mlp.fc1.weight"], source[f"blocks.{there}.mlp.fc1.weight"])
    assert torch.equal(found["blocks.2.mlp.fc1.weight"], trained.weights("pretrain")["blocks.1.mlp.fc1.weight"])
    assert torch.equal(found["head.weight"], whole["head.weight"])
    assert len(list(model.get_submodule("blocks").children())) == 6
    again = context.task.evaluate(model, trained.trainer("incubate", 0).parts.eval_stream, context.env)
    assert scored(context.task.make_result(again)) == scored(partial(trained, 0))


def test_score_is_in_events_tensorboard_and_status(trained: Any) -> None:
    told = [row for row in read_json_lines(trained.run.path / "events.jsonl") if row["event"] == "partial_assembly"]
    assert [row["phase"] for row in told] == ["incubate/2", "incubate/0", "incubate/1"]
    assert [row["metrics"] for row in told] == [partial(trained, module)["metrics"] for module in (2, 0, 1)]
    reader = EventAccumulator(str(trained.run.path / "partial" / "00")).Reload()
    shown = {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    scores = partial(trained, 0)
    charts = {"top1": "top-1 (%)", "top5": "top-5 (%)", "loss": "loss"}
    assert shown == {
        f"whole model/{charts[name]}": [(2, pytest.approx(value, rel=1e-6))]
        for name, value in scores["metrics"].items()
    }
    by_phase = {row["phase"]: row["partial"] for row in run_status(trained.run)}
    assert by_phase == {"pretrain": None, "finetune": None} | {f"incubate/{k}": partial(trained, k) for k in range(3)}
    status = run("status", trained.run.path)
    assert status.wait() == 0, status.err
    line = next(line for line in status.out.splitlines() if line.startswith("module 0"))
    assert f"{scores['metrics']['top1']:.2f} (0,2 of 3)" in line
    as_json = run("status", trained.run.path, "--json")
    assert as_json.wait() == 0
    assert json.loads(as_json.out)[1]["partial"] == scores


def test_module_that_does_not_fit_is_left_out(trained: Any, tmp_path: Path) -> None:
    mine = trained.copy(tmp_path / "run")
    context = mine.context("incubate", 0)
    assert finished_modules(context) == [0, 1, 2]
    weights = mine.run.phase("incubate", 1).artifact / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert finished_modules(context) == [0, 2]
    (mine.run.phase("pretrain").artifact / "manifest.json").unlink()
    assert finished_modules(context) == []


def test_scoring_changes_no_weights_and_no_logs(
    trained: Any, harness: Harnesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = harness(*SETS)
    monkeypatch.setattr("bigincubate.training.trainer.Trainer.score_partial", lambda *_: None)
    for phase, module in (("pretrain", None), ("incubate", 0)):
        other.train(phase, module)
        one, two = (each.weights(phase, module) for each in (trained, other))
        assert all(torch.equal(one[name], two[name]) for name in one)
        mine, others = (
            [{key: row[key] for key in row if not key.startswith(("perf", "memory", "checkpoint"))} for row in rows]
            for rows in (trained.log(phase, module), other.log(phase, module))
        )
        assert mine == others
    assert partial(other, 0) is None


def test_consecutive_numbers_are_printed_as_a_range() -> None:
    assert [format_ranges(numbers) for numbers in ([3], [0, 1, 2, 5], [0, 2])] == ["3", "0-2,5", "0,2"]
