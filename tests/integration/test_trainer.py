"""The training loop: what a step computes, what is frozen, what is handed on, what is logged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bigincubate.data.batch import Batch
from bigincubate.errors import ConfigError
from bigincubate.storage.artifacts import load_manifest

LOUD = ["mixup.mixup=0.4", "mixup.cutmix=1.0", "drop_path.rate=0.3", "loss.label_smoothing=0.1"]
Harnesses = Callable[..., Any]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses(harness: Any, phase: str = "pretrain", module: int | None = None) -> list[float]:
    return [row["train/loss"] for row in harness.log(phase, module) if "train/loss" in row]


@pytest.fixture(scope="module")
def trained(harness: Harnesses) -> Any:
    """Meta model and module 1, with every source of randomness on, each step logged."""
    done = harness(*LOUD, "log.every_steps=1", "log.eval_every_epochs=0", "incubate.drop_path.ramp_over=hybrid")
    done.train("pretrain")
    done.train("incubate", 1)
    return done


# ------------------------------------------------------------------------------------------------ a step


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("repeats", [1, 2])
def test_micro_batches_make_one_batch(harness: Harnesses, count: int, repeats: int) -> None:
    """The same losses and weights, with augmentation, mixing and stochastic depth."""
    sets = [*LOUD, "log.every_steps=1", f"augment.repeated_aug={repeats}", "mixup.prob=1.0", "augment.erase=0.3"]
    sets += ["optim.name=sgd", "train.lr=0.05"]  # plain: AdamW divides rounding errors by small numbers
    whole, parts = harness(*sets), harness(*sets, f"train.micro_batch={32 // count}")
    assert parts.trainer("pretrain").parts.micro_batches == count
    whole.train("pretrain")
    parts.train("pretrain")
    assert len(losses(whole)) == 12
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)
    assert losses(parts) != losses(whole)  # it did compute otherwise
    for name, tensor in whole.weights("pretrain").items():
        torch.testing.assert_close(parts.weights("pretrain")[name], tensor, atol=1e-5, rtol=1e-4)


def test_micro_batch_that_does_not_divide_is_refused(harness: Harnesses) -> None:
    with pytest.raises(ConfigError, match=r"train\.micro_batch = 12 does not divide"):
        harness("train.micro_batch=12").trainer("pretrain")
    with pytest.raises(ConfigError, match="mixup pairs samples inside a micro-batch"):
        harness("train.micro_batch=1").trainer("pretrain")


def test_repeated_augmentation_shows_a_sample_several_times_and_counts_views_as_images(harness: Harnesses) -> None:
    repeated = harness("augment.repeated_aug=3", "mixup.mixup=0.0")
    trainer = repeated.trainer("pretrain")
    batch = next(trainer.parts.train_stream.batches(0))
    assert len(batch) == 32
    assert len(set(batch.sample_ids.tolist())) == 11
    steps = repeated.data.samples["train"] // 256 * 256 // 32
    assert trainer.parts.train_stream.steps_per_epoch == trainer.parts.steps_per_epoch == steps
    assert len({image.numpy().tobytes() for image in batch["images"]}) > 11  # views differ
    assert repeated.train("pretrain")["seen"] == 12 * 32


def test_clipping_clips(harness: Harnesses) -> None:
    """SGD without momentum's help: the first step moves by at most lr times the norm."""
    sets = ["optim.name=momentum", "optim.weight_decay=0.0", "train.lr=1.0", "train.max_steps=1", "log.every_steps=1"]
    free, clipped = (harness(*sets, f"train.clip_grad={limit}") for limit in (0.0, 0.01))
    moved = []
    for each in (free, clipped):
        start = {name: tensor.clone() for name, tensor in each.trainer("pretrain").model.state_dict().items()}
        each.train("pretrain")
        end = each.weights("pretrain")
        moved.append(math.sqrt(sum((end[name] - start[name]).square().sum().item() for name in start)))
        assert each.log("pretrain")[0]["train/grad_norm"] == pytest.approx(moved[0], rel=1e-3)  # before clipping
    assert moved[0] > 0.05
    assert moved[1] == pytest.approx(0.01, rel=1e-3)


def test_label_smoothing_reaches_the_loss(harness: Harnesses) -> None:
    smooth, sharp = harness("loss.label_smoothing=0.5", "mixup.mixup=0.0"), harness("mixup.mixup=0.0")
    trainers = [each.trainer("pretrain") for each in (smooth, sharp)]
    batch = next(trainers[0].parts.train_stream.batches(0))
    targets = [trainer.task.prepare(batch, 0)[1] for trainer in trainers]
    one_hot = torch.nn.functional.one_hot(batch["labels"], 10).float()
    torch.testing.assert_close(targets[0], one_hot * 0.5 + 0.05)
    torch.testing.assert_close(targets[1], one_hot)
    logits = torch.randn(32, 10, generator=torch.Generator().manual_seed(0))
    expected = -(targets[0] * logits.log_softmax(1)).sum(1).mean()
    loss = trainers[0].task.loss(lambda images: logits, batch, 0)
    torch.testing.assert_close(loss, expected)


def test_bfloat16_runs_and_keeps_weights_in_full_precision(harness: Harnesses) -> None:
    half, full = harness("train.precision=bf16", "log.every_steps=1"), harness("log.every_steps=1")
    result = half.train("pretrain")
    full.train("pretrain")
    assert math.isfinite(result["metrics"]["loss"])
    assert {tensor.dtype for tensor in half.weights("pretrain").values()} == {torch.float32}
    assert losses(half) == pytest.approx(losses(full), abs=0.05)
    assert losses(half) != losses(full)


def test_phase_of_no_steps_publishes_the_initialization(harness: Harnesses) -> None:
    none = harness("train.max_steps=0", "incubate.init=grow", "incubate.ema.decay=0.9", "incubate.export=ema")
    result = none.train("pretrain")
    assert (result["steps"], result["seen"], result["flops"]) == (0, 0, 0)
    assert same(none.weights("pretrain"), none.trainer("pretrain").model.state_dict())
    for module in (0, 1):
        hybrid = none.train("incubate", module)
        assert hybrid["metrics"]["loss"] == pytest.approx(
            result["metrics"]["loss"], abs=1e-5
        )  # grown: it still is the meta model
    none.train("finetune")
    assert len(none.log("pretrain")) == 1


# ------------------------------------------------------------------------------------------------ frozen, averaged


@pytest.mark.parametrize("module", [0, 1])
def test_frozen_tensors_keep_their_bits_and_only_the_module_is_published(
    trained: Any, harness: Harnesses, module: int
) -> None:
    fresh = harness(*LOUD, "incubate.optim.weight_decay=0.5", "incubate.train.lr=0.05")
    fresh.train("pretrain")
    trainer = fresh.trainer("incubate", module)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    with trainer.stop:
        trainer.run()
    after = trainer.model.state_dict()
    assert trainable == {name for name in before if not torch.equal(before[name], after[name])}
    assert 0 < len(trainable) < len(before)
    # the hybrid's blocks are 2 + 1 or 1 + 2, the target's 2 + 2
    handed = fresh.weights("incubate", module)
    offset = 0 if module == 0 else 1
    renamed = {
        f"blocks.{int(name.split('.')[1]) + offset}.{name.split('.', 2)[2]}" if name.startswith("blocks.") else name
        for name in trainable
    }
    assert handed.keys() == renamed
    assert {name.split(".")[1] for name in handed if name.startswith("blocks.")} == (
        {"0", "1"} if module == 0 else {"2", "3"}
    )
    assert ("head.weight" in handed) == (module == 1)
    assert ("patch_embed.proj.weight" in handed) == (module == 0)
    assert torch.equal(handed[f"blocks.{2 * module + 1}.mlp.fc1.weight"], after[f"blocks.{module + 1}.mlp.fc1.weight"])
    assert not any(
        tensor.grad is not None for name, tensor in trainer.model.named_parameters() if name not in trainable
    )


def test_ema_is_published_if_asked_for(harness: Harnesses) -> None:
    raw, ema = harness("ema.decay=0.9"), harness("ema.decay=0.9", 'pretrain.export="ema"')
    for each in (raw, ema):
        each.train("pretrain")
    trainer = raw.trainer("pretrain")
    trainer.restore(trainer.checkpoints.load_latest())
    assert same(raw.weights("pretrain"), trainer.model.state_dict())
    assert same(ema.weights("pretrain"), trainer.ema.average)
    assert not same(raw.weights("pretrain"), ema.weights("pretrain"))
    for each, name in ((raw, "raw"), (ema, "ema")):
        assert load_manifest(each.run.phase("pretrain").artifact).weights == name
    # and the phase's result is that of what it hands on
    shown = ema.run.phase("pretrain").result
    checker = ema.trainer("pretrain")
    checker.model.load_state_dict(ema.weights("pretrain"))
    assert checker.score()["loss"] == pytest.approx(shown["metrics"]["loss"], abs=1e-9)


def test_ema_is_of_the_weights_after_each_step(harness: Harnesses) -> None:
    averaged = harness("ema.decay=0.9", 'pretrain.export="ema"', "train.max_steps=6")
    trainer = averaged.trainer("pretrain")
    expected = {name: tensor.double().clone() for name, tensor in trainer.model.state_dict().items()}
    step = trainer.step

    def followed(batch: Batch) -> Any:
        out = step(batch)
        for name, tensor in trainer.model.state_dict().items():
            expected[name].mul_(0.9).add_(tensor.double(), alpha=0.1)
        return out

    trainer.step = followed
    trainer.run()
    for name, tensor in averaged.weights("pretrain").items():
        torch.testing.assert_close(tensor.double(), expected[name], atol=1e-6, rtol=1e-5)


def test_evaluation_of_the_ema_does_not_change_training(harness: Harnesses) -> None:
    """With evaluations in between or not: the same weights in the end."""
    sets = ["ema.decay=0.9", 'pretrain.export="ema"', "train.batch_size=288", "train.max_steps=9", "drop_path.rate=0.3"]
    often, never = harness(*sets, "log.eval_every_epochs=1"), harness(*sets)
    often.train("pretrain")
    never.train("pretrain")
    assert sum("val/top1" in row for row in often.log("pretrain")) == 3
    assert same(often.weights("pretrain"), never.weights("pretrain"))


# ------------------------------------------------------------------------------------------------ what is logged


def test_loss_that_is_logged_is_the_mean_over_the_batch(trained: Any) -> None:
    """Computed again by hand for the first step: plain cross entropy with the soft targets of the whole batch."""
    trainer = trained.trainer("pretrain")
    batch = next(trainer.parts.train_stream.batches(0))
    images, targets = trainer.task.prepare(batch, 0)
    from bigincubate.models.drop_path import apply_masks, draw_masks, find_drop_paths

    apply_masks(trainer.model, draw_masks(0, 0, len(find_drop_paths(trainer.model)), 32)[:, batch.global_position])
    each = -(targets * trainer.model.train()(images).log_softmax(1)).sum(1)
    assert trained.log("pretrain")[0]["train/loss"] == pytest.approx(each.mean().item(), abs=1e-6)


CHARTS = {  # by the key in metrics.jsonl
    "train/loss": "train/loss",
    "train/lr": "train/step: learning rate",
    "train/grad_norm": "train/step: gradient norm",
    "train/skipped": "train/steps skipped",
    "val/top1": "val/top-1 (%)",
    "val/top5": "val/top-5 (%)",
    "val/loss": "val/loss",
    "perf/images_per_sec": "work/images per second",
    "perf/gflops": "work/GFLOP per second",
    "perf/data_wait": "work/data wait (fraction)",
    "memory/peak_gib": "work/peak memory (GiB)",
    "checkpoint/blocked_ms": "work/checkpoint wait (ms)",
    "checkpoint/mib_per_sec": "work/checkpoint (MiB/s)",
}


def test_tensorboard_has_a_chart_of_every_key_and_the_same_numbers_as_the_file(trained: Any) -> None:
    reader = trained.events("pretrain")
    rows = trained.log("pretrain")
    keys = set().union(*rows) - {"step"}
    assert keys == CHARTS.keys()
    assert set(reader.Tags()["scalars"]) == set(CHARTS.values())
    for key, chart in CHARTS.items():
        shown = [(event.step, event.value) for event in reader.Scalars(chart)]
        kept = [(row["step"], row[key]) for row in rows if key in row]
        assert [step for step, _ in shown] == [step for step, _ in kept], chart
        assert [value for _, value in shown] == pytest.approx([value for _, value in kept], rel=1e-6), chart
    assert [event.step for event in reader.Scalars("train/loss")] == list(range(1, 13))
    assert [event.step for event in reader.Scalars("val/top-1 (%)")] == [12]


def test_tensorboard_of_a_run_has_all_phases_in_the_same_charts(trained: Any) -> None:
    for phase, module in (("pretrain", None), ("incubate", 1)):
        shown, own = trained.events(phase, module, fleet=True), trained.events(phase, module)
        rate = "images per second"
        for tag, of in (("whole run/loss", "train/loss"), (f"whole run/{rate}", f"work/{rate}")):
            pairs = [
                [(event.step, event.value) for event in events] for events in (shown.Scalars(tag), own.Scalars(of))
            ]
            assert pairs[0] == pairs[1], tag
        percents = [event.value for event in shown.Scalars("whole run/progress (%)")]
        assert (len(percents), percents[0], percents[-1]) == (12, pytest.approx(100 / 12), 100)
        assert {event.value for event in shown.Scalars("whole run/restarts")} == {0}


def test_logged_step_is_one_object(trained: Any) -> None:
    for phase, module in (("pretrain", None), ("incubate", 1)):
        steps = [row["step"] for row in trained.log(phase, module)]
        assert steps == sorted(set(steps))


def test_tensorboard_has_the_settings_and_inputs(trained: Any) -> None:
    reader = trained.events("incubate", 1)
    (text,) = reader.Tensors("recipe/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert "label_smoothing = 0.1" in shown
    assert "embed_dim = 24" in shown
    assert reader.Tags()["images"] == ["visual inputs/augmented"]
    (grid,) = reader.Images("visual inputs/augmented")
    assert grid.step == 0
    assert grid.width * grid.height >= 8 * 64 * 64  # eight of them, enlarged to be seen


def test_logged_rate_is_the_schedules(trained: Any, harness: Harnesses) -> None:
    rates = [row["train/lr"] for row in trained.log("pretrain")]
    expected = [1e-6 + 0.5 * (2e-3 - 1e-6) * (1 + math.cos(math.pi * step / 12)) for step in range(12)]
    assert rates == pytest.approx(expected)
    layered = harness("optim.layer_decay=0.5", "log.every_steps=1", "train.max_steps=2")
    layered.train("pretrain")
    assert layered.log("pretrain")[0]["train/lr"] == pytest.approx(2e-3)  # not that of the lowest layer


def test_result_has_what_the_summary_shows(trained: Any) -> None:
    result = trained.run.phase("pretrain").result
    assert result["metrics"].keys() == {"top1", "top5", "loss"}
    assert result.keys() >= {"metrics", "headline", "unit", "seconds", "seen", "flops", "steps"}
    assert (result["steps"], result["seen"], result["unit"], result["headline"]) == (12, 384, "images", "top1")
    flops = next(row for row in trained.rows if row.key == "pretrain").cost.training_flops
    assert result["flops"] == 384 * flops
    assert result["samples"] == trained.data.samples["val"]
    summary = trained.run.update_summary()
    assert summary["meta"] == result
    assert json.loads((trained.run.path / "summary.json").read_text()) == summary


def test_same_seed_same_bits_other_seed_other_bits(trained: Any, harness: Harnesses) -> None:
    sets = [*LOUD, "incubate.drop_path.ramp_over=hybrid"]
    again, other = harness(*sets), harness(*sets, "train.seed=1")
    for each in (again, other):
        each.train("pretrain")
        each.train("incubate", 1)
    assert same(again.weights("pretrain"), trained.weights("pretrain"))
    assert same(again.weights("incubate", 1), trained.weights("incubate", 1))
    assert not same(other.weights("pretrain"), trained.weights("pretrain"))


def test_workers_change_nothing(trained: Any, harness: Harnesses) -> None:
    worked = harness(*LOUD, "data.workers=2")
    worked.train("pretrain")
    assert same(worked.weights("pretrain"), trained.weights("pretrain"))


def test_artifact_keeps_the_settings_of_the_task(harness: Harnesses) -> None:
    made = harness("train.max_steps=1", "log.every_steps=1", 'task.args={note="kept"}')
    made.train("pretrain")
    assert load_manifest(made.run.phase("pretrain").artifact).model.task.args == {"note": "kept"}
