"""Two real ranks over gloo against one process: the same numbers, the same exits, and nothing that need not travel."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import LOUD, PHASES, digest, environment, launch, torchrun, words

Harnesses = Callable[..., Any]


class Ranks:
    """Everything that two ranks are asked to do in this file, done in one launch."""

    def __init__(self, harness: Harnesses, digits: Path, folder: Path) -> None:
        self.single = harness(*LOUD)
        for phase, module in PHASES:
            self.single.train(phase, module)
        self.double, self.stopped, self.locked, self.odd = (harness(*LOUD) for _ in range(4))
        self.poisoned = harness(*LOUD, "train.max_nonfinite=2")
        micro = ["--set", "train.micro_batch=8"]
        jobs: dict[str, dict[str, Any]] = {}
        for phase, module in PHASES:
            jobs[f"{phase} {module}"] = words(self.double, phase, module, *micro)
        artifact = str(self.single.run.phase("finetune").artifact)
        for samples in (287, 1):
            jobs[f"evaluate {samples}"] = {"evaluate": artifact, "data": str(digits), "samples": samples}
        jobs["stopped"] = {**words(self.stopped, "pretrain"), "spoiled_rank": 1, "signal_at": 6}
        jobs["poisoned"] = {
            **words(self.poisoned, "pretrain", None, "--set", "checkpoint.every_steps=8"),
            "spoiled_rank": 1,
            "poison": [2, 3, 8, 9, 10],
        }
        owner = self.locked.run.phase("pretrain").path / "owners" / "1.json"
        owner.parent.mkdir(parents=True)

        from bigincubate.storage.lease import describe_process

        owner.write_text(json.dumps(describe_process(1)))
        jobs["locked"] = words(self.locked, "pretrain")
        jobs["no data"] = words(self.odd, "pretrain", None, "--set", "data.path=/nowhere")
        jobs["no modules"] = words(self.odd, "finetune", None, "--set", f"data.path={digits}")
        jobs["odd"] = words(self.odd, "pretrain", None, "--set", "train.micro_batch=3")
        self.outcomes = dict(zip(jobs, launch(folder, list(jobs.values())), strict=True))

    def codes(self, name: str) -> list[int]:
        return [outcome["code"] for outcome in self.outcomes[name]]


@pytest.fixture(scope="module")
def ranks(harness: Harnesses, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(harness, digits, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("phase", "module"), PHASES)
def test_losses_are_those_of_one_process(ranks: Ranks, phase: str, module: int | None) -> None:
    """With augmentation, repeats, mixing, stochastic depth; the ranks accumulate over two micro-batches besides."""
    assert ranks.codes(f"{phase} {module}") == [0, 0]
    single, double = ranks.single.log(phase, module), ranks.double.log(phase, module)
    assert [row["step"] for row in double] == list(range(1, 13))
    for key in ("train/loss", "train/lr", "train/grad_norm"):
        assert [row[key] for row in double] == pytest.approx([row[key] for row in single], abs=1e-5), key
    assert double != single
    scores = [each.run.phase(phase, module).result["metrics"] for each in (ranks.double, ranks.single)]
    for key in ("top1", "top5"):
        assert scores[0][key] == scores[1][key]
    found = ranks.double.weights(phase, module)
    for name, tensor in ranks.single.weights(phase, module).items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("phase", "module"), PHASES)
def test_ranks_hold_the_same_bits(ranks: Ranks, phase: str, module: int | None) -> None:
    weights = [outcome["weights"] for outcome in ranks.outcomes[f"{phase} {module}"]]
    assert weights[0] == weights[1]
    assert weights[0]


@pytest.mark.parametrize("module", [0, 1])
def test_frozen_tensors_are_the_meta_models(ranks: Ranks, module: int) -> None:
    meta = ranks.double.weights("pretrain")
    trainer = ranks.double.trainer("incubate", module)
    frozen = [name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad]
    hashes = ranks.outcomes[f"incubate {module}"][1]["weights"]
    before = trainer.model.state_dict()
    assert len(frozen) > 10
    for name in frozen:
        assert any(torch.equal(before[name], tensor) for tensor in meta.values() if tensor.shape == before[name].shape)
        assert hashes[name] == digest(before[name]), name


@pytest.mark.parametrize(("phase", "module"), PHASES)
def test_trainable_gradients_alone_are_reduced_once_per_step(ranks: Ranks, phase: str, module: int | None) -> None:
    key = phase if module is None else f"{phase}/{module}"
    planned = next(row for row in ranks.double.rows if row.key == key)
    assert planned.cost.allreduce_bytes == 4 * planned.cost.trainable
    for outcome in ranks.outcomes[f"{phase} {module}"]:
        assert outcome["bytes"] == 12 * planned.cost.allreduce_bytes


@pytest.mark.parametrize("samples", [287, 1])
def test_evaluation_counts_each_sample_once(ranks: Ranks, digits: Path, samples: int) -> None:
    """For a number that two ranks cannot share evenly, and one of which a rank gets nothing."""
    import dataclasses

    from bigincubate.distributed.process_group import DistributedContext

    trainer = ranks.single.trainer("finetune")
    trainer.model.load_state_dict(ranks.single.weights("finetune"))
    info = dataclasses.replace(trainer.data, samples={**trainer.data.samples, "val": samples})
    stream = trainer.task.eval_stream(info, "val", batch_size=samples)
    alone = trainer.task.evaluate(trainer.model, stream, DistributedContext())
    for scores in ranks.outcomes[f"evaluate {samples}"]:
        assert scores["samples"] == samples
        assert (scores["top1"], scores["top5"]) == (alone["top1"], alone["top5"])
        assert scores["loss"] == pytest.approx(alone["loss"], abs=1e-6)


def test_ranks_score_a_partial_assembly_together(ranks: Ranks) -> None:
    for module in (0, 1):
        one, two = (each.run.phase("incubate", module).partial for each in (ranks.single, ranks.double))
        assert (one["joined"], one["samples"]) == (two["joined"], two["samples"])
        assert two["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], rel=1e-4)


def test_signal_to_one_rank_stops_both_with_a_checkpoint(ranks: Ranks) -> None:
    assert ranks.codes("stopped") == [75, 75]
    folder = ranks.stopped.run.phase("pretrain")
    assert [attempt["state"] for attempt in folder.read_attempts()] == ["preempted"]
    assert (folder.checkpoints / "step-00000007" / "COMMITTED").exists()
    manifest = json.loads((folder.checkpoints / "step-00000007" / "manifest.json").read_text())
    assert manifest["world"] == 2


def test_one_process_goes_on_where_two_ranks_stopped(ranks: Ranks) -> None:
    folder = ranks.stopped.run.phase("pretrain")
    if folder.result is None:
        ranks.stopped.train("pretrain")
    assert len(folder.read_attempts()) == 2
    rows = ranks.stopped.log("pretrain")
    assert [row["step"] for row in rows] == list(range(1, 13))
    single = ranks.single.log("pretrain")
    assert [row["train/loss"] for row in rows] == pytest.approx([row["train/loss"] for row in single], abs=1e-5)


def test_gradient_that_is_not_finite_on_one_rank_stops_both_alike(ranks: Ranks) -> None:
    assert ranks.codes("poisoned") == [5, 5]
    folder = ranks.poisoned.run.phase("pretrain")
    assert folder.read_attempts()[-1]["state"] == "failed"
    assert "not finite in 3 of 3 steps since the rollback to step 8" in folder.read_attempts()[-1]["error"]
    assert json.loads((folder.path / "rollback.json").read_text()) == {"to": 8, "at": 9}


@pytest.mark.parametrize(("name", "code"), [("locked", 7), ("no data", 3), ("no modules", 4), ("odd", 2)])
def test_errors_reach_every_rank_and_none_waits(ranks: Ranks, name: str, code: int) -> None:
    assert ranks.codes(name) == [code, code]
    for outcome in ranks.outcomes[name]:
        assert outcome["err"].startswith("bigincubate: ")
        assert outcome["err"].count("\n") == 1


def test_stop_under_torchrun_is_recorded_and_releases_the_lease(harness: Harnesses) -> None:
    """torchrun changes exit codes: what happened is in ``attempts``."""
    long = harness("train.max_steps=100000", "log.every_steps=1", "schedule.name=constant")
    folder = long.run.phase("pretrain")
    words = torchrun("-m", "bigincubate", *long.command("pretrain"))
    with subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True) as launched:
        while len(long.log("pretrain")) < 3:
            assert launched.poll() is None, launched.stderr.read()  # type: ignore[union-attr]
        os.kill(folder.read_attempts()[0]["pid"], signal.SIGTERM)  # rank 0 alone
        _, err = launched.communicate(timeout=120)
    assert launched.returncode != 0
    assert "Traceback" not in err.partition("ChildFailedError")[0].partition("Traceback")[0]
    assert err.count("with a checkpoint") == 2
    assert [attempt["state"] for attempt in folder.read_attempts()] == ["preempted"]
    assert (folder.path / "owners" / "1.json").read_text() == ""
    stopped = max(row["step"] for row in long.log("pretrain"))
    assert (folder.checkpoints / f"step-{stopped:08d}" / "COMMITTED").exists()
