"""AdaScale: the paper's gain, the same on one process and on ranks under DDP and OSS, kept over a resume."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import LOUD, launch, words
from torch import Tensor, nn

from bigincubate.config import OptimConfig, Settings, TrainConfig
from bigincubate.distributed.process_group import DistributedContext
from bigincubate.errors import ConfigError, Preempted
from bigincubate.experimental.adascale import AdaScale
from bigincubate.optim.optimizer import make_optimizer
from bigincubate.sharding.ddp import Replicated
from bigincubate.training import trainer as trainer_module

Harnesses = Callable[..., Any]
STRATEGIES = ["ddp", "oss"]
STEPS = 6
# two gradients a step in pre-training, with SGD; four in incubation, with AdamW and frozen blocks
ADASCALE = "bigincubate.experimental.adascale:AdaScale"
SETS = [*LOUD, f"optim.lr_scaling={ADASCALE}", f"train.max_steps={STEPS}", "schedule.name=constant"]
SETS += ["train.lr=0.02", "optim.name=sgd", "pretrain.train.micro_batch=16"]
SETS += ["incubate.train.lr=1e-3", "incubate.optim.name=adamw", "incubate.train.micro_batch=8"]
PHASES = [("pretrain", None), ("incubate", 1)]


def by_the_paper(steps: Sequence[Tensor]) -> list[float]:
    """r of each step, from gradients [S, n] a step: appendix B.3, averages free of their start, in float64."""
    gains, average, weight = [], torch.zeros(2, dtype=torch.float64), 0.0
    for gradients in steps:
        each = gradients.double()
        count, mean = len(each), each.mean(0)
        variance = (each.square().sum() - count * mean.square().sum()) / (count - 1)
        square = mean.square().sum() - variance / count
        keep = max(1 - count / 1000, 0)
        average = keep * average + (1 - keep) * torch.stack([variance, square]).clamp(min=0)
        weight = keep * weight + (1 - keep)
        var, sqr = (average / weight).tolist()
        gains.append((var + sqr) / (var / count + sqr))
    return gains


# ------------------------------------------------------------------------------------------------ the formula


def accumulated(gradients: Tensor, name: str = "sgd") -> tuple[list[float], list[float]]:
    """Gains and learning rates (0.1 without) of a model whose gradients [steps, S, n] are given."""
    model = nn.Linear(gradients.shape[2], 1, bias=False)
    settings = Settings(train=TrainConfig(lr=0.1), optim=OptimConfig(name=name, lr_scaling=ADASCALE))
    sharding = Replicated(DistributedContext())
    scale = AdaScale(model, settings, sharding, DistributedContext(), gradients.shape[1])
    sharding.prepare(model, [], lambda m: make_optimizer(m, settings))
    gains, rates = [], []
    for step in gradients:
        for group in sharding.optimizer.param_groups:
            group["lr"] = 0.1
        for gradient in step:
            sharding.backward((model.weight * gradient).sum() / len(step))
        sharding.step(1.0)
        gains.append(scale.gain)
        rates.append(sharding.optimizer.param_groups[0]["lr"])
    return gains, rates


@pytest.fixture
def gradients() -> Tensor:
    """Of 20 steps, 4 in each, with more noise in each than in the one before."""
    torch.manual_seed(0)
    return torch.randn(20, 1, 50) + torch.linspace(0.1, 5, 20).view(20, 1, 1) * torch.randn(20, 4, 50)


def test_gain_is_the_papers(gradients: Tensor) -> None:
    expected = by_the_paper(list(gradients))
    gains, rates = accumulated(gradients)
    assert 1 < min(expected) < 1.1 < 2.5 < max(expected) < 4
    assert gains == pytest.approx(expected, rel=1e-5)
    assert rates == pytest.approx([0.1 * gain for gain in gains])


def test_gain_is_fairscales(gradients: Tensor) -> None:
    adascale = pytest.importorskip("fairscale.optim.adascale")
    weight = nn.Parameter(torch.zeros(50))
    optimizer = adascale.AdaScale(torch.optim.SGD([weight], lr=0.1), world_size=1, num_gradients_to_accumulate=4)
    expected = []
    for step in gradients:
        optimizer.zero_grad()
        for gradient in step:
            ((weight * gradient).sum() / 4).backward()
        expected.append(optimizer.gain())
    assert accumulated(gradients)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("name", "power"), [("sgdw", 1.0), ("adamw", 0.5), ("lamb", 0.5)])
def test_noise_gains_all_and_agreement_nothing(name: str, power: float) -> None:
    torch.manual_seed(0)
    noise = torch.randn(3, 8, 10_000)
    assert accumulated(noise, name)[0] == pytest.approx([8**power] * 3, rel=0.02)
    for size in (1.0, 1e-6):
        same = size * torch.randn(3, 1, 100).expand(3, 8, 100)
        assert accumulated(same, name)[0] == pytest.approx([1.0] * 3, rel=1e-5)
    assert accumulated(torch.zeros(2, 2, 10), name)[0] == [1.0, 1.0]


def test_step_that_is_not_finite_changes_no_average(gradients: Tensor) -> None:
    spoiled = torch.cat([gradients[:5], torch.full((1, 4, 50), float("nan")), gradients[5:]])
    gains, _ = accumulated(spoiled)
    assert gains[5] == gains[4]
    assert gains[:5] + gains[6:] == accumulated(gradients)[0]


# ------------------------------------------------------------------------------------------------ in training


class Spread:
    """All that two ranks do in this file, in one launch."""

    def __init__(self, harness: Harnesses, folder: Path) -> None:
        self.single = harness(*SETS)
        for phase, module in PHASES:
            self.single.train(phase, module)
        self.double, self.stopped = ({strategy: harness(*SETS) for strategy in STRATEGIES} for _ in range(2))
        jobs: dict[Any, dict[str, Any]] = {}
        for strategy in STRATEGIES:
            using = ["--set", f"sharding.strategy={strategy}"]
            for phase, module in PHASES:
                jobs[strategy, phase] = words(self.double[strategy], phase, module, *using)
            again = words(self.stopped[strategy], "pretrain", None, *using)
            jobs[strategy, "stopped"] = {**again, "spoiled_rank": 0, "signal_at": 2}
            jobs[strategy, "again"] = again
        refused = harness(*SETS)
        for strategy in ("fsdp2", "zero2"):
            jobs[strategy] = words(refused, "pretrain", None, "--set", f"sharding.strategy={strategy}")
        self.outcomes = dict(zip(jobs, launch(folder, list(jobs.values())), strict=True))

    def codes(self, *name: str) -> list[int]:
        return [outcome["code"] for outcome in self.outcomes[name if len(name) > 1 else name[0]]]


@pytest.fixture(scope="module")
def spread(harness: Harnesses, tmp_path_factory: pytest.TempPathFactory) -> Spread:
    return Spread(harness, tmp_path_factory.mktemp("adascale"))


@pytest.mark.parametrize(("phase", "module", "power"), [("pretrain", None, 1.0), ("incubate", 1, 0.5)])
def test_training_step_has_the_gain_of_its_micro_batches(
    spread: Spread, monkeypatch: pytest.MonkeyPatch, phase: str, module: int | None, power: float
) -> None:
    """Against their gradients, caught one by one; with frozen blocks, clipping and groups with and without decay."""
    trainer = spread.single.trainer(phase, module)
    named = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    caught: list[list[Tensor]] = []
    backward = trainer.sharding.backward

    def held() -> Tensor:
        return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in named]).double()

    def catching(loss: Tensor) -> None:
        before = held()
        backward(loss)
        caught[-1].append((held() - before) * trainer.parts.micro_batches)

    monkeypatch.setattr(trainer.sharding, "backward", catching)
    batches = trainer.parts.train_stream.batches(0)
    rows = []
    for _ in range(STEPS):
        caught.append([])
        trainer.step(next(batches))
        trainer.state.step += 1
        rows.append((trainer.parts.lr_hook.gain, [group["lr"] for group in trainer.sharding.optimizer.param_groups]))
    expected = [gain**power for gain in by_the_paper([torch.stack(step) for step in caught])]
    assert [gain for gain, _ in rows] == pytest.approx(expected, rel=1e-4)
    assert 1 < min(expected) < 0.97 * trainer.parts.micro_batches**power
    for gain, rates in rows:
        assert rates == pytest.approx([gain * trainer.settings.train.lr] * 2)


@pytest.mark.parametrize(("phase", "module"), PHASES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gains_are_those_of_one_process(spread: Spread, strategy: str, phase: str, module: int | None) -> None:
    """Two ranks of one or two micro-batches against two or four micro-batches: the same samples in each gradient."""
    assert spread.codes(strategy, phase) == [0, 0]
    expected, found = spread.single.log(phase, module), spread.double[strategy].log(phase, module)
    assert len(found) == STEPS
    for key in ("train/gain", "train/lr", "train/loss"):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in expected], rel=1e-5), key
    weights = [outcome["weights"] for outcome in spread.outcomes[strategy, phase]]
    assert weights[0] == weights[1]


def test_gain_is_logged_and_the_rate_is_the_one_used(spread: Spread) -> None:
    for phase, module in PHASES:
        rate = spread.single.recipe.settings(phase).train.lr
        rows = spread.single.log(phase, module)
        assert [row["train/lr"] for row in rows] == pytest.approx([rate * row["train/gain"] for row in rows])
        shown = spread.single.events(phase, module).Scalars("train/step: AdaScale gain")
        assert [event.value for event in shown] == pytest.approx([row["train/gain"] for row in rows])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resume_goes_on_with_the_same_bits(spread: Spread, strategy: str) -> None:
    assert spread.codes(strategy, "stopped") == [75, 75]
    assert spread.codes(strategy, "again") == [0, 0]
    assert spread.outcomes[strategy, "again"][0]["weights"] == spread.outcomes[strategy, "pretrain"][0]["weights"]
    expected, found = spread.double[strategy].log("pretrain"), spread.stopped[strategy].log("pretrain")
    assert [row["train/gain"] for row in found] == [row["train/gain"] for row in expected]


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2"])
def test_strategies_that_show_no_gradients_are_refused_on_every_rank(spread: Spread, strategy: str) -> None:
    assert spread.codes(strategy) == [2, 2]
    for outcome in spread.outcomes[strategy]:
        assert outcome["err"].startswith("bigincubate: optim.lr_scaling: a learning-rate hook")
        assert f'sharding.strategy = "{strategy}"' in outcome["err"]
        assert outcome["err"].count("\n") == 1


def test_one_gradient_a_step_is_refused(harness: Harnesses) -> None:
    alone = harness(*SETS, "pretrain.train.micro_batch=32")
    with pytest.raises(ConfigError, match=r"a step has only one; use .* train\.micro_batch <= 16$"):
        alone.trainer("pretrain")


def test_resume_with_another_number_of_gradients_is_refused(
    harness: Harnesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = harness(*SETS)
    step = trainer_module.Trainer.step

    def stopping(self: Any, batch: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "step", stopping)
        with pytest.raises(Preempted):
            stopped.train("pretrain")
    four = harness(*SETS, "pretrain.train.micro_batch=8", folder=stopped.run.path)
    with pytest.raises(ConfigError, match=r"averaged 2 gradients .* and now 4"):
        four.train("pretrain")
    stopped.train("pretrain")
