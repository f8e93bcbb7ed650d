"""Every strategy on two real ranks against one process: the same losses, the same artifact, and checkpoints that any
other strategy takes up."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distributed import LOUD, RANKS, digest, environment, torchrun, words

from bigincubate.config import Sharding, Train, load_recipe
from bigincubate.errors import ConfigError

Labs = Callable[..., Any]
STRATEGIES = ["fsdp2", "oss"]
OPTIMIZERS = {"adamw": [], "lamb": ["optim.name=lamb", "train.lr=1e-2"]}
PHASES = [("pretrain", None), ("incubate", 1), ("incubate", 0), ("finetune", None)]
CASES = [(strategy, optimizer) for strategy in STRATEGIES for optimizer in OPTIMIZERS]
HANDOVERS = [("ddp", "fsdp2"), ("fsdp2", "oss"), ("oss", "ddp")]


def using(strategy: str) -> list[str]:
    return ["--set", f"sharding.strategy={strategy}", "--set", "train.micro_batch=8"]


class Spread:
    """All that two ranks do in this file, in one launch."""

    def __init__(self, lab: Labs, folder: Path) -> None:
        self.single = {name: lab(*LOUD, *sets) for name, sets in OPTIMIZERS.items()}
        for one in self.single.values():
            for phase, module in PHASES:
                one.train(phase, module)
        self.double = {(strategy, name): lab(*LOUD, *OPTIMIZERS[name]) for strategy, name in CASES}
        self.handed = {pair: lab(*LOUD, *OPTIMIZERS["lamb"]) for pair in HANDOVERS}
        jobs: dict[Any, dict[str, Any]] = {}
        for (strategy, name), double in self.double.items():
            for phase, module in PHASES:
                jobs[strategy, name, phase, module] = words(double, phase, module, *using(strategy))
        for (first, second), double in self.handed.items():
            stopped = {**words(double, "pretrain", None, *using(first)), "spoiled_rank": 0, "signal_at": 6}
            jobs[first, second, 0] = stopped
            jobs[first, second, 1] = words(double, "pretrain", None, *using(second))
        file = folder / "jobs.json"
        file.write_text(json.dumps(list(jobs.values())))
        ended = subprocess.run(
            torchrun(RANKS, file), env=environment(), capture_output=True, text=True, timeout=900, check=False
        )
        assert ended.returncode == 0, ended.stderr
        outcomes = [json.loads((folder / f"jobs.{rank}.json").read_text()) for rank in (0, 1)]
        self.outcomes = {name: [each[index] for each in outcomes] for index, name in enumerate(jobs)}


@pytest.fixture(scope="module")
def spread(lab: Labs, tmp_path_factory: pytest.TempPathFactory) -> Spread:
    return Spread(lab, tmp_path_factory.mktemp("spread"))


@pytest.mark.parametrize(("phase", "module"), PHASES)
@pytest.mark.parametrize(("strategy", "optimizer"), CASES)
def test_losses_and_norms_are_those_of_one_process(
    spread: Spread, strategy: str, optimizer: str, phase: str, module: int | None
) -> None:
    """With augmentation, repeats, mixing, stochastic depth, clipping and two micro-batches a step."""
    outcomes = spread.outcomes[strategy, optimizer, phase, module]
    assert [outcome["code"] for outcome in outcomes] == [0, 0], outcomes
    single, double = spread.single[optimizer], spread.double[strategy, optimizer]
    expected, found = single.log(phase, module), double.log(phase, module)
    assert len(found) == 12
    for key in ("train/loss", "train/lr", "train/grad_norm"):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in expected], rel=1e-5), key
    weights = double.weights(phase, module)
    for name, tensor in single.weights(phase, module).items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("module", [0, 1])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frozen_tensors_keep_their_bits_on_every_rank(spread: Spread, strategy: str, module: int) -> None:
    double = spread.double[strategy, "adamw"]
    trainer = double.trainer("incubate", module)
    frozen = [name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad]
    before = trainer.model.state_dict()
    assert len(frozen) > 10
    for outcome in spread.outcomes[strategy, "adamw", "incubate", module]:
        assert {name: outcome["weights"][name] for name in frozen} == {name: digest(before[name]) for name in frozen}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_rank_writes_its_share_and_no_more(spread: Spread, strategy: str) -> None:
    folder = spread.double[strategy, "adamw"].run.phase("finetune").checkpoints / "step-00000012"
    sizes = sorted(file.stat().st_size for file in folder.glob("rank-*.safetensors"))
    assert len(sizes) == 2
    whole = spread.single["adamw"].run.phase("finetune").checkpoints / "step-00000012" / "rank-00000.safetensors"
    assert sum(sizes) == pytest.approx(whole.stat().st_size, rel=0.1)
    assert sizes[1] < 0.65 * whole.stat().st_size


@pytest.mark.parametrize(("first", "second"), HANDOVERS)
def test_another_strategy_goes_on_from_a_checkpoint(spread: Spread, first: str, second: str) -> None:
    """LAMB, whose trust ratios need whole parameters, with its counts and a moving average."""
    codes = [[outcome["code"] for outcome in spread.outcomes[first, second, turn]] for turn in (0, 1)]
    assert codes == [[75, 75], [0, 0]]
    found, expected = spread.handed[first, second].log("pretrain"), spread.single["lamb"].log("pretrain")
    assert [row["step"] for row in found] == list(range(1, 13))
    assert [row["train/loss"] for row in found] == pytest.approx([row["train/loss"] for row in expected], rel=1e-5)


def test_modules_of_different_strategies_assemble(spread: Spread, lab: Labs) -> None:
    import shutil

    mixed = spread.single["adamw"].copy(spread.single["adamw"].run.path.with_name("mixed"))
    meta = spread.single["adamw"].run.phase("pretrain").artifact
    for module, strategy in enumerate(STRATEGIES):
        # the same meta model bit by bit is asked for: its manifest's digest is in each module's
        source = spread.double[strategy, "adamw"].run.phase("incubate", module).artifact
        manifest = json.loads((source / "manifest.json").read_text())
        manifest["meta"] = json.loads((meta / "manifest.json").read_text())["digest"]
        target = mixed.run.phase("incubate", module).artifact
        shutil.rmtree(target)
        shutil.copytree(source, target)
        (target / "manifest.json").write_text(json.dumps(manifest))
    for folder in (mixed.run.phase("finetune").path, mixed.run.assembled.path):
        shutil.rmtree(folder)
    result = mixed.train("finetune")
    assert result["top1"] == spread.single["adamw"].run.phase("finetune").result["top1"]


def test_none_is_for_one_process() -> None:
    from bigincubate.cluster.env import RunEnv
    from bigincubate.sharding import make_sharding

    with pytest.raises(ConfigError, match='"none" with 2 ranks'):
        make_sharding(Sharding(strategy="none"), Train(), RunEnv(world=2))
    with pytest.raises(ConfigError, match="Input should be 'none', 'ddp'"):
        load_recipe("digits", ["sharding.strategy=fsdp1"])
