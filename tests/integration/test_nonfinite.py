"""Gradients that are not finite: skipped, gone back from once, then the end of the phase. A result is always finite."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_official import save, stages
from test_trainer import Harnesses, losses, same

from bigincubate.api import evaluate
from bigincubate.data.batch import Batch
from bigincubate.errors import NonFiniteError, Preempted
from bigincubate.interchange.export import export
from bigincubate.storage import artifacts
from bigincubate.storage.sharded_tensors import copy_to_cpu
from bigincubate.training.import_official import import_model, import_part


def poisoned(trainer: Any, steps: set[int]) -> None:
    """Make the images of these steps not numbers."""
    original = trainer.parts.train_stream.batches

    def batches(step: int) -> Any:
        for batch in original(step):
            if step in steps:
                images = batch["images"].clone()
                images[0, 0, 0, 0] = float("nan")
                batch = replace(batch, columns={**batch.columns, "images": images})
            yield batch
            step += 1

    trainer.parts.train_stream.batches = batches


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_poisoned_step_is_skipped(harness: Harnesses, optimizer: str) -> None:
    skipping = harness(f"optim.name={optimizer}", "log.every_steps=1", "train.max_steps=6", "ema.decay=0.5")
    trainer = skipping.trainer("pretrain")
    poisoned(trainer, {3})
    seen = []
    update = trainer.step

    def step(batch: Batch) -> Any:
        before = copy_to_cpu(trainer.sharding.save())
        out = update(batch)
        after = copy_to_cpu(trainer.sharding.save())
        seen.append(all(torch.equal(shard.tensor, after[key].tensor) for key, shard in before.items()))
        return out

    trainer.step = step
    with trainer.stop:
        result = trainer.run()
    assert seen == [False, False, False, True, False, False]
    assert math.isfinite(result["metrics"]["loss"])
    assert trainer.state.skipped == 1
    assert [row["train/skipped"] for row in skipping.log("pretrain")] == [0, 0, 0, 1, 1, 1]


def test_too_many_skipped_steps_end_with_an_error_that_says_what_to_do(harness: Harnesses) -> None:
    failing = harness("train.max_nonfinite=1", "log.every_steps=1")
    trainer = failing.trainer("pretrain")
    poisoned(trainer, {1, 3})
    with trainer.stop, pytest.raises(NonFiniteError, match=r"not finite in 2 of 4 steps \(train.max_nonfinite = 1\)"):
        trainer.run()
    assert NonFiniteError.code == 5
    assert trainer.folder.rollback is None  # there was no checkpoint


def events(harness: Any) -> list[Any]:
    lines = [json.loads(line) for line in (harness.run.path / "events.jsonl").read_text().splitlines()]
    return [(line["step"], line["to"]) for line in lines if line["event"] == "rolled_back"]


def test_rollback_to_the_last_checkpoint_happens_once(harness: Harnesses) -> None:
    failing = harness("train.max_nonfinite=1", "log.every_steps=1")
    trainer = failing.trainer("pretrain")
    poisoned(trainer, {1, 4, 6})  # 2 skipped of 5; after the rollback to step 4, 2 of 3
    with trainer.stop, pytest.raises(NonFiniteError, match="in 2 of 3 steps since the rollback to step 4"):
        trainer.run()
    assert events(failing) == [(5, 4)]
    assert [row["step"] for row in failing.log("pretrain")] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["train/skipped"] for row in failing.log("pretrain")] == [0, 1, 1, 1, 1, 1, 2]
    assert trainer.checkpoints.committed_steps() == [4]
    again = failing.trainer("pretrain")
    poisoned(again, {4, 6})
    with again.stop, pytest.raises(NonFiniteError, match="in 2 of 3 steps since"):
        again.run()
    assert events(failing) == [(5, 4)]


def test_rollback_after_a_passing_fault_costs_only_the_steps_since_the_checkpoint(harness: Harnesses) -> None:
    sets = ["train.max_nonfinite=0", "log.every_steps=1", "data.workers=1"]
    failing, calm = harness(*sets), harness(*sets)
    trainer = failing.trainer("pretrain")
    bad = {6}
    poisoned(trainer, bad)
    back = trainer.roll_back

    def roll_back_to_good_data(error: Any) -> Any:
        bad.clear()
        return back(error)

    trainer.roll_back = roll_back_to_good_data
    with trainer.stop:
        trainer.run()
    calm.train("pretrain")
    assert events(failing) == [(7, 4)]
    assert same(failing.weights("pretrain"), calm.weights("pretrain"))
    assert losses(failing) == losses(calm)


@pytest.mark.parametrize("killed", ["restore", "open_metrics"])
def test_interrupted_rollback_is_the_same_after_a_resume(harness: Harnesses, killed: str) -> None:
    sets = ["train.max_nonfinite=1", "log.every_steps=1", "train.max_steps=8"]
    one, other = harness(*sets), harness(*sets)
    for each, interrupted in ((one, False), (other, True)):
        trainer = each.trainer("pretrain")
        poisoned(trainer, {1, 4})
        if interrupted:
            back = trainer.roll_back

            def roll_back(error: Any, trainer: Any = trainer, back: Any = back) -> None:
                def die(*_: Any) -> None:
                    raise KeyboardInterrupt

                setattr(trainer, killed, die)
                back(error)

            trainer.roll_back = roll_back
            with trainer.stop, pytest.raises(KeyboardInterrupt):
                trainer.run()
            trainer = each.trainer("pretrain")
            poisoned(trainer, {4})
        with trainer.stop:
            trainer.run()
        assert events(each) == [(5, 4)]
        assert trainer.state.skipped == 1
    assert losses(one) == losses(other)
    assert same(one.weights("pretrain"), other.weights("pretrain"))


def test_checkpoint_never_has_more_skipped_steps_than_allowed(harness: Harnesses) -> None:
    """Nothing is logged before the checkpoint is due, and still it is not written."""
    failing = harness("train.max_nonfinite=0", "log.every_steps=1000")
    trainer = failing.trainer("pretrain")
    poisoned(trainer, {1})
    with trainer.stop, pytest.raises(NonFiniteError):
        trainer.run()
    assert trainer.checkpoints.committed_steps() == []


def test_count_of_skipped_steps_survives_a_resume(harness: Harnesses) -> None:
    failing = harness("train.max_nonfinite=1", "log.every_steps=1")
    trainer = failing.trainer("pretrain")
    poisoned(trainer, {1})
    step = trainer.step

    def stopping(batch: Batch) -> Any:
        if trainer.state.step == 4:
            trainer.stop.signal = signal.SIGTERM
        return step(batch)

    trainer.step = stopping
    with pytest.raises(Preempted, match="stopped at step 5 of 12"):
        trainer.run()
    resumed = failing.trainer("pretrain")
    poisoned(resumed, {7})
    load_latest = resumed.checkpoints.load_latest
    resumed.checkpoints.load_latest = lambda: None if resumed.state.step > 5 else load_latest()
    with pytest.raises(NonFiniteError, match="in 2 of 8 steps"):
        resumed.run()


def test_huge_learning_rate_ends_with_exit_5(harness: Harnesses) -> None:
    exploding = harness("train.lr=1e30", "train.max_nonfinite=2", "train.clip_grad=0.0", "log.every_steps=1")
    with pytest.raises(NonFiniteError):
        exploding.train("pretrain")
    attempt = json.loads((exploding.run.phase("pretrain").path / "attempts" / "1.json").read_text())
    assert attempt["state"] == "failed"
    assert "not finite" in attempt["error"]
    assert exploding.run.phase("pretrain").result is None


# ------------------------------------------------------------------------------------------------ results


def poisoned_loss(trainer: Any) -> None:
    """Make the loss not a number, and leave its gradient as it is."""
    loss = trainer.task.loss
    trainer.task.loss = lambda *arguments: loss(*arguments) + float("nan")


def poisoned_weight(trainer: Any) -> None:
    """Make a weight not a number after the last step."""
    loop = trainer.loop

    def train(batches: Any) -> None:
        loop(batches)
        with torch.no_grad():
            next(trainer.model.parameters())[..., 0] = float("nan")

    trainer.loop = train


def poisoned_evaluation(trainer: Any) -> None:
    """Make the images of the validation split not numbers."""
    task = trainer.task
    evaluated = task.evaluate

    def evaluate(model: Any, batches: Any, env: Any, **options: Any) -> Any:
        images = [replace(b, columns={**b.columns, "images": b["images"] * float("inf")}) for b in batches]
        return evaluated(model, images, env, **options)

    task.evaluate = evaluate


@pytest.mark.parametrize(
    ("poison", "says"),
    [
        (lambda trainer: poisoned(trainer, {0, 1}), "the gradient was finite in none of 2 steps"),
        (poisoned_loss, "the last training loss is nan, although its gradient is finite"),
        (poisoned_weight, "loss is nan on the validation split"),
        (poisoned_evaluation, "loss is nan on the validation split"),
    ],
)
@pytest.mark.parametrize("phase", ["pretrain", "end_to_end"])
def test_phase_whose_result_is_not_finite_is_not_done(
    phase: str, poison: Callable[[Any], None], says: str, harness: Harnesses
) -> None:
    failing = harness("train.max_steps=2", "log.every_steps=1", "end_to_end.budget=epochs")
    trainer = failing.trainer(phase)
    poison(trainer)
    with trainer.stop, pytest.raises(NonFiniteError, match=says) as caught:
        trainer.run()
    assert caught.value.code == 5
    assert "\n" not in str(caught.value)
    assert not trainer.folder.artifact.exists()
    assert trainer.folder.result is None


def test_last_step_may_be_skipped(harness: Harnesses) -> None:
    passing = harness("train.max_steps=4", "log.every_steps=1")
    trainer = passing.trainer("pretrain")
    poisoned(trainer, {3})
    with trainer.stop:
        assert math.isfinite(trainer.run()["metrics"]["loss"])


@pytest.fixture
def diverged(done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A finished run in which every artifact has a weight that is not a number, as only other programs write it."""
    run = done.copy(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "check_finite_weights", lambda *_: None)
        for manifest in (tmp_path / "run").rglob("artifact/manifest.json"):
            tensors, about = artifacts.load_artifact(manifest.parent)
            next(iter(tensors.values())).view(-1)[0] = float("nan")
            artifacts.save_artifact(manifest.parent, tensors, about)
    return run


def test_weights_that_are_not_finite_are_not_used(
    diverged: Any, digits: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    run = diverged.run.path
    module = ["train", run / "recipe.toml", "--run-dir", run, "--phase", "incubate", "--module", 0]
    assemble = ["train", run / "recipe.toml", "--run-dir", run, "--phase", "finetune"]
    shutil.rmtree(run / "modules" / "00")
    for words in (
        ["evaluate", run, "--data", digits],
        ["evaluate", run / "assembled", "--data", digits],
        ["export", run, "--out", tmp_path / "out"],
        ["export", run, "--out", tmp_path / "out.pth", "--as", "official"],
        module,
    ):
        code, out, err = call(*words)
        assert (code, out) == (5, "")
        assert "has values that are not finite" in err
        assert err.count("\n") == 1
    assert not list(tmp_path.glob("out*"))
    assert not (run / "modules" / "00" / "artifact").exists()
    assert call(*assemble)[0] in (0, 4)  # the finished phase, or a module that is missing


def test_modules_that_are_not_finite_are_not_assembled(harness: Harnesses, monkeypatch: pytest.MonkeyPatch) -> None:
    made = harness("train.max_steps=2", "log.every_steps=1")
    for phase, module in (("pretrain", None), ("incubate", 0), ("incubate", 1)):
        made.train(phase, module)
    folder = made.run.phase("incubate", 1).artifact
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "check_finite_weights", lambda *_: None)
        tensors, about = artifacts.load_artifact(folder)
        next(iter(tensors.values())).view(-1)[0] = float("inf")
        artifacts.save_artifact(folder, tensors, about)
    with pytest.raises(NonFiniteError, match=r"modules/01/artifact: tensor 'blocks.2.attn.proj.bias' has values"):
        made.train("finetune")
    assert made.run.assembled.result is None


def test_exported_weights_that_are_not_finite_are_not_used(done: Any, digits: Path, tmp_path: Path) -> None:
    export(done.run.path, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights["head.bias"][0] = float("inf")
    save_file(weights, tmp_path / "out" / "model.safetensors")
    with pytest.raises(NonFiniteError, match=r"tensor 'head\.bias'"):
        evaluate(tmp_path / "out", digits)


def test_official_weights_that_are_not_finite_are_not_imported(harness: Harnesses, tmp_path: Path) -> None:
    made = harness("train.max_steps=2", "log.every_steps=1")
    modules = stages([2, 2], seed=3)
    modules[1]["head.bias"] = torch.full((10,), float("nan"))
    file = save(tmp_path / "vit.pth", modules)
    with pytest.raises(NonFiniteError, match=r"vit\.pth: tensor 'head\.bias'"):
        import_model(made.recipe, [file], tmp_path / "vit")
    meta = stages([1, 1], seed=0)
    meta[0]["cls_token"] = meta[0]["cls_token"] + float("nan")
    with pytest.raises(NonFiniteError, match=r"meta\.pth: tensor 'cls_token'"):
        list(import_part(made.recipe, "meta", [save(tmp_path / "meta.pth", meta)], made.run))
    assert not (tmp_path / "vit").exists()
    assert made.run.phase("pretrain").result is None
