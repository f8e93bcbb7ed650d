"""Every phase on the device: losses, bits, memory, and one rank of every sharding strategy.

``--device cpu`` runs the same at toy size. On a GPU the model sees 197 tokens, where attention and reductions are split
over thread blocks, which is where bits could differ from run to run.
"""

from __future__ import annotations

import gzip
import json
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launching import LOUD, PHASES
from parity import Case as ParityCase
from parity import Parity
from small_models import Case, each_case

from bigincubate.errors import ConfigError, Preempted
from bigincubate.training import builder
from bigincubate.training.determinism import deterministic_algorithms

pytestmark = pytest.mark.gpu

Harnesses = Callable[..., Any]
STEPS = 6
SETS = [*LOUD, f"train.max_steps={STEPS}", "checkpoint.every_steps=3"]
KERNELS = [
    "train.subset_drop_path=true",
    "train.last_block_cls_only=true",
    'loss.name="bigincubate.experimental.fused_loss:soft_cross_entropy_loss"',
]
COMPILE, BF16 = "train.compile=true", 'train.precision="bf16"'
WAYS: dict[str, tuple[list[str], float]] = {  # what differs from eager fp32, and by how much its losses may
    "fp32-compiled": ([COMPILE], 2e-3),
    "bf16": ([BF16], 3e-2),
    "bf16-compiled": ([BF16, COMPILE], 3e-2),
    "fp32-kernels": (KERNELS, 2e-3),
    "bf16-kernels-compiled": ([*KERNELS, BF16, COMPILE], 3e-2),
}
STRATEGIES = ["fsdp2", "oss", "zero1", "zero2", "zero3"]


@pytest.fixture(scope="session")
def size(device: torch.device) -> list[str]:
    """Settings for the size of the model: 196 patches of 2x2 pixels on a GPU, 16 on a CPU."""
    return ["model.img_size=28"] if device.type == "cuda" else []


@pytest.fixture(scope="module")
def plain(harness: Harnesses, size: list[str]) -> Any:
    """A whole run in fp32, without compilation."""
    return trained(harness(*SETS, *size))


def trained(made: Any) -> Any:
    for phase, module in PHASES:
        made.train(phase, module)
    return made


def losses(made: Any) -> list[float]:
    """Return the losses of all steps of all phases."""
    found = [row["train/loss"] for phase, module in PHASES for row in made.log(phase, module)]
    assert len(found) == len(PHASES) * STEPS
    assert all(map(math.isfinite, found))
    return found


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Return the tensors of two artifacts whose bits differ."""
    assert one.keys() == other.keys()
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]


# ------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("way", WAYS)
def test_phases_have_the_losses_of_eager_fp32(
    way: str, plain: Any, harness: Harnesses, size: list[str], device: torch.device
) -> None:
    sets, rel = WAYS[way]
    torch._dynamo.reset()
    assert losses(trained(harness(*SETS, *size, *sets))) == pytest.approx(losses(plain), rel=rel)


@pytest.mark.gpus(1)
def test_phase_has_the_losses_of_the_cpu(
    bigincubate: Callable[..., Any], plain: Any, fast: Path, size: list[str], tmp_path: Path
) -> None:
    words = [word for value in [*SETS, *size] for word in ("--set", value)]
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "4"}
    ended = bigincubate("train", fast, "--run-dir", tmp_path, "--phase", "pretrain", *words, env=environment)
    assert ended.returncode == 0, ended.stderr
    on_cpu = [json.loads(line) for line in (tmp_path / "meta" / "metrics.jsonl").read_text().splitlines()]
    on_gpu = plain.log("pretrain")
    assert "CPU" not in plain.run.phase("pretrain").read_attempts()[0]["device"]
    # convolutions may use TF32 on a GPU
    assert [row["train/loss"] for row in on_gpu] == pytest.approx([row["train/loss"] for row in on_cpu], rel=1e-2)


# ------------------------------------------------------------------------------------------------ bits


@pytest.mark.parametrize("way", ["fp32", "bf16", "bf16-kernels-compiled"])
def test_same_phase_twice_and_resumed_gives_the_same_bits(
    way: str, plain: Any, harness: Harnesses, size: list[str], tmp_path: Path, device: torch.device
) -> None:
    """A module, whose hybrid has frozen blocks before and after it; once more with an interruption after step 4."""
    sets = [] if way == "fp32" else WAYS[way][0]
    torch._dynamo.reset()
    first = harness(*SETS, *size, *sets)
    first.train("pretrain")
    again, resumed = first.copy(tmp_path / "again"), first.copy(tmp_path / "resumed")
    for made in (first, again):
        made.train("incubate", 0)
    trainer = resumed.trainer("incubate", 0)
    trainer.stop = StopAt(trainer, 4)
    with pytest.raises(Preempted):
        trainer.run()
    resumed.train("incubate", 0)
    expected = first.weights("incubate", 0)
    rows = [[row["train/loss"] for row in made.log("incubate", 0)] for made in (first, again, resumed)]
    assert rows[1] == rows[0]
    assert differing(again.weights("incubate", 0), expected) == []
    assert rows[2] == rows[0]
    assert differing(resumed.weights("incubate", 0), expected) == []


@each_case
def test_every_family_has_deterministic_kernels(case: Case, device: torch.device) -> None:
    """The gradients of a family are the same bits twice, and no operator is refused."""
    model, images = case.build(case.target).to(device), case.images().to(device)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        with deterministic_algorithms(device, True):
            model(images).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.gpus(1)
def test_operator_without_a_deterministic_kernel_is_refused_by_name(device: torch.device) -> None:
    image = torch.randn(1, 1, 8, 8, device=device, requires_grad=True)
    with (
        pytest.raises(ConfigError, match=r"^upsample_bicubic2d_backward_out_cuda has no .* train.deterministic=false$"),
        deterministic_algorithms(device, True),
    ):
        torch.nn.functional.interpolate(image, size=(4, 4), mode="bicubic").sum().backward()
    assert not torch.are_deterministic_algorithms_enabled()


class StopAt:
    """Takes the place of a stop signal that arrives in a step."""

    def __init__(self, trainer: Any, step: int) -> None:
        self.trainer, self.step = trainer, step

    def __bool__(self) -> bool:
        return bool(self.trainer.state.step == self.step)


# ------------------------------------------------------------------------------------------------ batches and memory


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_pinned_and_arrive_unchanged(
    workers: int, plain: Any, harness: Harnesses, size: list[str], device: torch.device
) -> None:
    trainer = harness(*SETS, *size, f"data.workers={workers}").trainer("pretrain")
    batches = trainer.parts.train_stream.batches(0)
    batch = next(batches)
    batches.close()
    expected = next(plain.copy(trainer.run_dir.path / "plain").trainer("pretrain").parts.train_stream.batches(0))
    moved = batch.to(trainer.env.device)
    for name, column in batch.columns.items():
        assert column.is_pinned() == (device.type == "cuda")
        assert moved[name].device.type == device.type
        assert torch.equal(moved[name].cpu(), expected[name])


def test_profiled_steps_have_kernels_and_memory_and_the_same_bits(
    harness: Harnesses, plain: Any, size: list[str], device: torch.device
) -> None:
    profiled = harness(*SETS, *size, "train.profile=[3, 4]")
    profiled.train("pretrain")
    assert differing(plain.weights("pretrain"), profiled.weights("pretrain")) == []
    files = {file.name: file for file in (profiled.run.phase("pretrain").path / "profile").iterdir()}
    with gzip.open(files.pop("steps-3-4-rank-0.json.gz")) as stream:
        categories = {event.get("cat") for event in json.load(stream)["traceEvents"]}
    assert ("kernel" in categories) == (device.type == "cuda")
    assert [*files] == (["steps-3-4-rank-0.memory.pickle"] if device.type == "cuda" else [])
    for file in files.values():
        assert pickle.loads(file.read_bytes())["segments"]


def test_metrics_have_peak_memory_and_utilization(plain: Any, device: torch.device) -> None:
    rows = [row for phase, module in PHASES for row in plain.log(phase, module)]
    if device.type == "cpu":
        assert all(row["memory/peak_gib"] > 0 for row in rows)
        assert not any("perf/mfu" in row for row in rows)
        return
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    assert all(0 < row["memory/peak_gib"] < total for row in rows)
    if any(name in torch.cuda.get_device_name(device) for name in ("H200", "H100", "A100")):
        assert all(0 < row["perf/mfu"] < 1 for row in rows)


# ------------------------------------------------------------------------------------------------ strategies


@pytest.fixture(scope="module")
def process_group(device: torch.device) -> Iterator[None]:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategy_on_one_rank_has_the_losses_of_replicated_training(
    strategy: str,
    plain: Any,
    size: list[str],
    process_group: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    """The trainer replaces every strategy by the simplest one where there is one rank, so this test puts it back."""
    pytest.importorskip("fairscale" if strategy == "oss" else "deepspeed" if strategy.startswith("zero") else "torch")
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)  # ZeRO-3 puts its own there
    monkeypatch.setattr(builder, "make_sharding", lambda settings, env, count: one_rank(strategy, settings, env, count))
    rel = 1e-5 if device.type == "cpu" else 1e-3
    for phase, module, needed in (("incubate", 1, ["meta"]), ("finetune", None, ["meta", "modules"])):
        made = plain.copy(tmp_path / phase, needed)
        made.train(phase, module)
        for key in ("train/loss", "train/grad_norm"):
            found, expected = ([row[key] for row in run.log(phase, module)] for run in (made, plain))
            assert found == pytest.approx(expected, rel=rel), (phase, key)


def one_rank(strategy: str, settings: Any, env: Any, micro_batches: int) -> Any:
    """Return a strategy that really shards, over a world of one."""
    if strategy == "fsdp2":
        from bigincubate.sharding.fsdp2 import FullyShard

        return FullyShard(env, settings.sharding.fsdp2, settings.train.precision)
    if strategy == "oss":
        from bigincubate.sharding.oss import OptimizerStateSharding

        return OptimizerStateSharding(env)
    from bigincubate.sharding.zero import Zero
    from bigincubate.sharding.zero_config import deepspeed_config

    sharding = settings.sharding.model_copy(update={"strategy": strategy})
    chosen = settings.model_copy(update={"sharding": sharding})
    return Zero(env, deepspeed_config(chosen, world=1, micro_batches=micro_batches))


@pytest.mark.gpus(2)
def test_strategies_on_two_ranks_have_the_losses_of_one(
    harness: Harnesses, tmp_path: Path, size: list[str], device: torch.device
) -> None:
    cases = [ParityCase(strategy, "incubate") for strategy in ("ddp", *STRATEGIES)]
    cases += [ParityCase("fsdp2", "finetune", precision="bf16"), ParityCase("zero2", "finetune", "lamb", "bf16")]
    parity = Parity(harness, tmp_path, cases, sets=size)
    for case in cases:
        parity.check(case, 1e-2 if case.precision == "fp32" else 3e-2)
