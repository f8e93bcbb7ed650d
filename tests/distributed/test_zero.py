"""DeepSpeed's ZeRO on two real ranks against one process: the same losses, every rank a share, and files refused that
contradict the recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import LOUD, environment, launch, words

from bigincubate.config import Settings, ShardingConfig, TrainConfig, load_recipe
from bigincubate.distributed.process_group import DistributedContext
from bigincubate.errors import ConfigError
from bigincubate.sharding import make_sharding
from bigincubate.sharding.zero_config import deepspeed_config, shipped_config_path

pytest.importorskip("deepspeed")

Harnesses = Callable[..., Any]
STRATEGIES = ["zero1", "zero2", "zero3"]
AVERAGED = [*LOUD, 'pretrain.export="ema"', "log.eval_every_epochs=1", "train.batch_size=128", "train.max_steps=20"]


def using(strategy: str, file: Path | None = None, micro_batch: int = 8) -> list[str]:
    sets = ["--set", f"sharding.strategy={strategy}", "--set", f"train.micro_batch={micro_batch}"]
    return [*sets, *(["--set", f"sharding.deepspeed_config={file}"] if file else [])]


class Spread:
    """All that two ranks do in this file, in one launch."""

    def __init__(self, harness: Harnesses, folder: Path) -> None:
        # in a model as small as this one, stage 3 would keep every parameter whole
        cut = json.loads(shipped_config_path("zero3").read_text())
        cut["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        cut["gradient_clipping"] = "auto"
        every = folder / "every.json"
        every.write_text(json.dumps(cut))
        contrary = folder / "contrary.json"
        contrary.write_text('{"gradient_clipping": 0.5}')
        files = {"zero3": every}

        self.averaged = harness(*AVERAGED)
        self.averaged.train("pretrain")
        self.means = {strategy: harness(*AVERAGED) for strategy in STRATEGIES}
        self.poisoned = {strategy: harness(*LOUD, "train.max_steps=4") for strategy in ["ddp", *STRATEGIES]}
        jobs: dict[Any, dict[str, Any]] = {}
        for strategy, double in self.means.items():
            jobs["averaged", strategy] = words(double, "pretrain", None, *using(strategy, files.get(strategy), 32))
        poison = {"spoiled_rank": 1, "poison": [2]}
        for strategy, double in self.poisoned.items():
            jobs["poisoned", strategy] = {**words(double, "pretrain", None, *using(strategy)), **poison}
        jobs["contrary"] = words(harness(*LOUD), "pretrain", None, *using("zero2", contrary))
        jobs["whole"] = words(harness(*LOUD, "optim.name=lars"), "pretrain", None, *using("zero1"))
        jobs["compiled"] = words(harness(*LOUD), "pretrain", None, *using("zero3"), "--set", "train.compile=true")
        self.outcomes = dict(zip(jobs, launch(folder, list(jobs.values())), strict=True))

    def codes(self, *name: Any) -> list[int]:
        return [outcome["code"] for outcome in self.outcomes[name if len(name) > 1 else name[0]]]


@pytest.fixture(scope="module")
def spread(harness: Harnesses, tmp_path_factory: pytest.TempPathFactory) -> Spread:
    return Spread(harness, tmp_path_factory.mktemp("zero"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ema_is_evaluated_and_published_without_changing_training(spread: Spread, strategy: str) -> None:
    assert spread.codes("averaged", strategy) == [0, 0]
    single, double = spread.averaged, spread.means[strategy]
    expected, found = single.log("pretrain"), double.log("pretrain")
    assert len([row for row in found if "val/loss" in row]) > 1
    for row, other in zip(found, expected, strict=True):
        for key in other.keys() & {"val/loss", "train/loss"}:
            assert row[key] == pytest.approx(other[key], rel=1e-4), (key, row["step"])
    weights = double.weights("pretrain")
    for name, tensor in single.weights("pretrain").items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_step_not_finite_on_one_rank_is_skipped_on_both(spread: Spread, strategy: str) -> None:
    assert spread.codes("poisoned", strategy) == [0, 0]
    expected, found = (spread.poisoned[name].log("pretrain") for name in ("ddp", strategy))
    assert [row["train/skipped"] for row in found] == [0.0] * 2 + [1.0] * 2
    for row, other in zip(found, expected, strict=True):
        if row["step"] != 3:
            assert row["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5), row["step"]


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("contrary", "gradient_clipping = 0.5"),
        ("whole", "Lars needs whole tensors"),
        ("compiled", "fails or hangs with train.compile"),
    ],
)
def test_impossible_settings_give_one_line_on_every_rank(spread: Spread, name: str, word: str) -> None:
    assert spread.codes(name) == [2, 2]
    for outcome in spread.outcomes[name]:
        assert outcome["err"].startswith("bigincubate: ")
        assert outcome["err"].count("\n") == 1
        assert word in outcome["err"]


def test_deepspeed_prints_nothing(spread: Spread) -> None:
    for name, outcomes in spread.outcomes.items():
        if "poisoned" not in name:
            assert all(outcome["err"].count("\n") <= 1 for outcome in outcomes), name


REFUSED = {
    "train_batch_size": (64, "train.batch_size"),
    "train_micro_batch_size_per_gpu": (4, "train.micro_batch"),
    "gradient_accumulation_steps": (1, "train.micro_batch"),
    "gradient_clipping": (0.0, "train.clip_grad"),
    "zero_optimization": ({"stage": 1}, "sharding.strategy"),
    "torch_autocast": ({"enabled": True}, "train.precision"),
    "bf16": ({"enabled": True}, "frozen parameters into bf16"),
    "fp16": ({"enabled": True}, "frozen parameters into fp16"),
    "optimizer": ({"type": "Adam"}, "[optim]"),
    "scheduler": ({"type": "WarmupLR"}, "[schedule]"),
}


def configured(file: Path, **train: Any) -> dict[str, Any]:
    sharding = ShardingConfig(strategy="zero2", deepspeed_config=str(file))
    settings = Settings(sharding=sharding, train=TrainConfig(batch_size=32, **train))
    return deepspeed_config(settings, world=2, micro_batches=2)


@pytest.mark.parametrize("key", REFUSED)
def test_config_file_that_contradicts_the_recipe_is_refused(tmp_path: Path, key: str) -> None:
    file = tmp_path / "mine.json"
    value, word = REFUSED[key]
    file.write_text(json.dumps({key: value}))
    with pytest.raises(ConfigError) as refusal:
        configured(file)
    text = str(refusal.value)
    assert text.startswith(f"{file}: {key}")
    assert word in text
    assert "\n" not in text


def test_config_file_may_repeat_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    agreeing: dict[str, Any] = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
    }
    agreeing |= {"gradient_clipping": "auto", "bf16": {"enabled": False}, "zero_optimization": {"stage": 2, "a": 1}}
    file.write_text(json.dumps(agreeing))
    assert configured(file)["zero_optimization"] == {"stage": 2, "a": 1}
    assert configured(file, clip_grad=0.0)["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("text", "word"),
    [("{", "not valid JSON"), ("[]", "expected a JSON object"), ('{"bf16": 1}', "bf16 must be a JSON object")],
)
def test_invalid_config_file_is_refused(tmp_path: Path, text: str, word: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=word):
        configured(file)
    with pytest.raises(ConfigError, match=r"none\.json: No such file.*sharding\.deepspeed_config"):
        configured(tmp_path / "none.json")


def test_config_file_is_checked_in_one_process_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"gradient_clipping": 3}')
    with pytest.raises(ConfigError, match="gradient_clipping"):
        make_sharding(
            Settings(sharding=ShardingConfig(strategy="zero1", deepspeed_config=str(file))), DistributedContext()
        )


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "rmsprop", "lion"])
def test_allowed_optimizers_are_elementwise(name: str) -> None:
    """One tensor or two halves of it laid into one slice with another: the same bits."""
    from timm.optim import create_optimizer_v2

    torch.manual_seed(0)
    start, gradients = torch.randn(12), torch.randn(4, 12)
    whole, halves = [torch.nn.Parameter(start.clone())], [torch.nn.Parameter(part.clone()) for part in start.split(6)]
    from bigincubate.sharding.flat_lamb import flat_slice_optimizer

    for parameters in (whole, halves):
        optimizer = flat_slice_optimizer(create_optimizer_v2(parameters, opt=name, lr=0.1, weight_decay=0.1))
        for gradient in gradients:
            for parameter, part in zip(parameters, gradient.split(12 // len(parameters)), strict=True):
                parameter.grad = part.clone()
            optimizer.step()
    assert torch.equal(whole[0], torch.cat([half.detach() for half in halves]))


@pytest.mark.parametrize("name", ["lars", "adafactor", "clamb", "cadamw", "muon"])
def test_optimizers_that_need_whole_tensors_are_refused(name: str) -> None:
    from timm.optim import create_optimizer_v2

    from bigincubate.sharding.flat_lamb import flat_slice_optimizer

    with pytest.raises(ConfigError, match="whole tensors"):
        flat_slice_optimizer(create_optimizer_v2(torch.nn.Linear(3, 3), opt=name, lr=0.1))


def test_missing_deepspeed_gives_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from bigincubate.compat.deepspeed import import_deepspeed
    from bigincubate.errors import MissingDependencyError

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'bigincubate\[deepspeed\]'"):
        import_deepspeed("cpu")


def test_deepspeed_is_imported_only_where_it_is_chosen(harness: Harnesses) -> None:
    code = "import sys, bigincubate.training.trainer, bigincubate.sharding.zero; print('deepspeed' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "False"


def test_recipe_schema_has_the_strategies() -> None:
    for strategy in STRATEGIES:
        assert load_recipe("digits", [f"sharding.strategy={strategy}"]).sharding.strategy == strategy
