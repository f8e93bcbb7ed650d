"""Every strategy on real ranks against one process: the same losses, the same artifact, and checkpoints that any other
strategy takes up. A part of the matrix here, all of it with `make test-full`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from launching import LOUD, digest, launch, words
from parity import OPTIMIZERS, Case, Parity

from bigincubate.config import Fsdp2Config, Settings, ShardingConfig, TrainConfig, load_recipe
from bigincubate.errors import ConfigError

pytest.importorskip("deepspeed")
pytest.importorskip("fairscale")

Harnesses = Callable[..., Any]
STRATEGIES = ["ddp", "fsdp2", "oss", "zero1", "zero2", "zero3"]
PHASES = ["pretrain", "incubate", "finetune"]
# fp32: another order of the same additions. bf16, whose 8 bits carry 4e-3: products of other shapes round elsewhere.
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}


def tolerance(case: Case) -> float:
    """Weights gathered as bf16: those of norms too, and what flows between blocks."""
    return TOLERANCE[case.precision] * (4 if "sharding.fsdp2.gather_bf16=true" in case.more else 1)


SKIPPING = ("train.subset_drop_path=true", "train.last_block_cls_only=true")
CHECKPOINTING = "sharding.activation_checkpointing"
THINNED = [
    case
    for strategy in STRATEGIES
    for case in (
        Case(strategy, "pretrain", "lamb"),
        Case(strategy, "incubate", "adamw"),
        Case(strategy, "finetune", "lamb", "bf16"),
    )
] + [
    Case("ddp", more=(f"{CHECKPOINTING}=full",)),
    Case("fsdp2", more=("sharding.fsdp2.shard_frozen=true", f"{CHECKPOINTING}=selective")),
    Case("fsdp2", more=("sharding.fsdp2.reshard_after_forward=false", "sharding.fsdp2.cpu_offload=true")),
    Case("fsdp2", "incubate", "lamb", "bf16", more=("sharding.fsdp2.gather_bf16=true",)),
    Case("ddp", more=SKIPPING),
    Case("fsdp2", "finetune", more=(*SKIPPING, f"{CHECKPOINTING}=full")),
    Case("zero3", more=("sharding.deepspeed_config=zero3_offload", f"{CHECKPOINTING}=full")),
]
FULL = (
    [
        Case(strategy, phase, optimizer, precision)
        for strategy, phase, optimizer, precision in itertools.product(STRATEGIES, PHASES, OPTIMIZERS, TOLERANCE)
    ]
    + [
        Case(strategy, phase, more=(f"{CHECKPOINTING}={how}",))
        for strategy, phase, how in itertools.product(STRATEGIES, PHASES, ("full", "selective"))
        if (strategy, how) != ("zero3", "selective")
    ]
    + [
        Case("fsdp2", phase, optimizer, "bf16", more=("sharding.fsdp2.gather_bf16=true",))
        for phase, optimizer in itertools.product(PHASES, OPTIMIZERS)
    ]
)
FOUR = [
    Case("fsdp2", "pretrain", "lamb", more=("sharding.fsdp2.replicas=2",)),
    Case("fsdp2", "incubate", more=("sharding.fsdp2.replicas=2", "sharding.fsdp2.shard_frozen=true")),
    Case("zero2", "incubate", "lamb"),
    Case("oss", "finetune"),
    Case("zero3", "finetune", "lamb"),
]
CHAIN = ["ddp", "zero1", "fsdp2", "zero3", "oss", "zero2", "ddp"]


@pytest.fixture(scope="module")
def parity(harness: Harnesses, tmp_path_factory: pytest.TempPathFactory) -> Parity:
    return Parity(harness, tmp_path_factory.mktemp("parity"), THINNED)


@pytest.fixture(scope="module")
def full(harness: Harnesses, tmp_path_factory: pytest.TempPathFactory) -> Parity:
    return Parity(harness, tmp_path_factory.mktemp("full"), FULL, sets=["train.max_steps=20"])


@pytest.fixture(scope="module")
def four(harness: Harnesses, parity: Parity, tmp_path_factory: pytest.TempPathFactory) -> Parity:
    return Parity(harness, tmp_path_factory.mktemp("four"), FOUR, world=4, single=parity.single)


@pytest.mark.parametrize("case", THINNED, ids=str)
def test_losses_and_norms_are_those_of_one_process(parity: Parity, case: Case) -> None:
    """With augmentation, repeats, mixing, stochastic depth, clipping and four micro-batches a step."""
    parity.check(case, tolerance(case))


@pytest.mark.full
@pytest.mark.parametrize("case", FULL, ids=str)
def test_twenty_steps_of_every_strategy_have_the_same_losses(full: Parity, case: Case) -> None:
    full.check(case, tolerance(case))


@pytest.mark.parametrize("case", FOUR, ids=str)
def test_losses_of_four_ranks_are_those_of_one_process(four: Parity, case: Case) -> None:
    four.check(case, TOLERANCE["fp32"])


@pytest.mark.parametrize("case", [case for case in THINNED if case.phase == "incubate"], ids=str)
def test_frozen_tensors_keep_their_bits_on_every_rank(parity: Parity, case: Case) -> None:
    trainer = parity.single[case.optimizer, case.precision].trainer("incubate", 1)
    frozen = [name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad]
    before = trainer.model.state_dict()
    assert len(frozen) > 10
    for outcome in parity.outcomes[case]:
        assert {name: outcome["weights"][name] for name in frozen} == {name: digest(before[name]) for name in frozen}


@pytest.mark.parametrize("case", [case for case in THINNED if case.phase == "pretrain"][1:], ids=str)
def test_rank_writes_only_its_own_shards(parity: Parity, case: Case) -> None:
    written = [
        sorted(file.stat().st_size for file in folder.glob("rank-*.safetensors"))
        for one in (parity.spread[case], parity.single["lamb", "fp32"])
        for folder in [one.run.phase("pretrain").checkpoints / "step-00000012"]
    ]
    assert len(written[0]) == 2
    assert sum(written[0]) == pytest.approx(sum(written[1]), rel=0.25)  # a small model: names weigh something
    assert written[0][1] < 0.68 * sum(written[1])


def test_replicated_tensors_are_written_once(four: Parity) -> None:
    folder = four.spread[FOUR[0]].run.phase("pretrain").checkpoints / "step-00000012"
    sizes = [file.stat().st_size for file in sorted(folder.glob("rank-*.safetensors"))]
    assert max(sizes[2:], default=0) < 100 < 10_000 < min(sizes[:2])


def test_strategy_resumes_from_the_checkpoint_of_another(
    parity: Parity, harness: Harnesses, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """LAMB, whose trust ratios need whole parameters, with its counts and a moving average, through all of them."""
    handed = harness(*LOUD, *OPTIMIZERS["lamb"])
    jobs = []
    for turn, strategy in enumerate(CHAIN):
        using = ["--set", f"sharding.strategy={strategy}", "--set", "train.micro_batch=8"]
        # it stops after step 1, 3, 5, …; the last runs to the end
        stop = {"spoiled_rank": 0, "signal_at": 2 * turn} if turn < len(CHAIN) - 1 else {}
        jobs.append({**words(handed, "pretrain", None, *using), **stop})
    outcomes = launch(tmp_path_factory.mktemp("chain"), jobs)
    assert [[outcome["code"] for outcome in each] for each in outcomes] == [[75, 75]] * 6 + [[0, 0]]
    assert all(outcome["err"].count("\n") <= 1 for each in outcomes for outcome in each), outcomes
    found, expected = handed.log("pretrain"), parity.single["lamb", "fp32"].log("pretrain")
    assert [row["step"] for row in found] == list(range(1, 13))
    for key in ("train/loss", "train/grad_norm"):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in expected], rel=1e-5), key


@pytest.mark.full
def test_checkpoint_of_four_ranks_resumes_on_two_and_on_one(
    harness: Harnesses, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each strategy starts, the one after it goes on with half the ranks, and one process ends."""
    single = harness(*LOUD, *OPTIMIZERS["lamb"])
    single.train("pretrain")
    runs = {strategy: harness(*LOUD, *OPTIMIZERS["lamb"]) for strategy in STRATEGIES}
    for world, turn in ((4, 0), (2, 1)):
        jobs = []
        for index, handed in enumerate(runs.values()):
            chosen = f"sharding.strategy={STRATEGIES[(index + turn) % len(STRATEGIES)]}"
            stop = {"spoiled_rank": 0, "signal_at": 4 * turn + 3}
            jobs.append({**words(handed, "pretrain", None, "--set", chosen), **stop})
        outcomes = launch(tmp_path_factory.mktemp(str(world)), jobs, world)
        assert [[outcome["code"] for outcome in each] for each in outcomes] == [[75] * world] * len(runs), outcomes
    for handed in runs.values():
        handed.train("pretrain")
        found, expected = handed.log("pretrain"), single.log("pretrain")
        assert [row["step"] for row in found] == list(range(1, 13))
        assert [row["train/loss"] for row in found] == pytest.approx([r["train/loss"] for r in expected], rel=1e-5)


def test_modules_of_different_strategies_assemble(harness: Harnesses, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Four modules, four strategies, one meta model; then fine-tuning under a fifth."""
    sets = ["plan.target_depths=[2, 2, 2, 2]", "plan.meta_depths=[1, 1, 1, 1]", "train.max_steps=3"]
    mixed, single = harness(*sets), harness(*sets)
    phases = [("pretrain", None), *[("incubate", module) for module in range(4)], ("finetune", None)]
    strategies = ["ddp", "oss", "fsdp2", "zero1", "zero3", "zero2"]
    jobs = []
    for (phase, module), strategy in zip(phases, strategies, strict=True):
        single.train(phase, module)
        jobs.append(words(mixed, phase, module, "--set", f"sharding.strategy={strategy}"))
    for outcomes in launch(tmp_path_factory.mktemp("mixed"), jobs):
        assert [outcome["code"] for outcome in outcomes] == [0, 0], outcomes
    for name, tensor in single.weights("finetune").items():
        torch.testing.assert_close(mixed.weights("finetune")[name], tensor, atol=1e-4, rtol=1e-3)


def test_impossible_settings_are_refused() -> None:
    from bigincubate.distributed.process_group import DistributedContext
    from bigincubate.sharding import make_sharding

    with pytest.raises(ConfigError, match='"none" with 2 ranks'):
        make_sharding(Settings(sharding=ShardingConfig(strategy="none")), DistributedContext(world=2))
    pairs = Settings(sharding=ShardingConfig(strategy="fsdp2", fsdp2=Fsdp2Config(replicas=2)))
    with pytest.raises(ConfigError, match="replicas = 2 does not divide 3 ranks"):
        make_sharding(pairs, DistributedContext(world=3))
    with pytest.raises(ConfigError, match=r"zero3.*train\.compile"):
        make_sharding(
            Settings(sharding=ShardingConfig(strategy="zero3"), train=TrainConfig(compile=True)),
            DistributedContext(world=2),
        )
    for key in ("subset_drop_path", "last_block_cls_only"):
        settings = Settings(sharding=ShardingConfig(strategy="zero3"), train=TrainConfig.model_validate({key: True}))
        with pytest.raises(ConfigError, match=rf"zero3.*train\.{key}"):
            make_sharding(settings, DistributedContext(world=2))
    half = Settings(sharding=ShardingConfig(strategy="zero3", activation_checkpointing="selective"))
    with pytest.raises(ConfigError, match=r"zero3.*selective"):
        make_sharding(half, DistributedContext(world=2))
    with pytest.raises(ConfigError, match="Input should be 'none', 'ddp'"):
        load_recipe("digits", ["sharding.strategy=fsdp1"])


def test_phase_may_have_a_strategy_of_its_own() -> None:
    recipe = load_recipe("digits", ["sharding.strategy=ddp", "finetune.sharding.strategy=fsdp2"])
    assert recipe.settings("finetune").sharding.strategy == "fsdp2"
    assert recipe.settings("incubate").sharding.strategy == "ddp"
    assert recipe.identity == load_recipe("digits").identity
