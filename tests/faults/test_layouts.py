"""A phase that was stopped in any layout, and goes on in any other: the same state, the same losses."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import LOUD, launch
from test_sharding import STRATEGIES
from trial_log import TrialLog

from bigincubate.storage.sharded_tensors import ShardedTensorReader

pytest.importorskip("deepspeed")
pytest.importorskip("fairscale")

Harnesses = Callable[..., Any]
STEPS, HALF = 50, 25
LAYOUTS = [("none", 1), *itertools.product(STRATEGIES, (2, 4))]
SETS = [*LOUD, f"train.max_steps={STEPS}", "ema.decay=0.9", f"checkpoint.every_steps={STEPS}"]


def words(harness: Any, strategy: str) -> list[str]:
    return [str(word) for word in harness.command("pretrain", None, "--set", f"sharding.strategy={strategy}")]


def tensors(checkpoints: Path) -> dict[str, torch.Tensor]:
    return dict(ShardedTensorReader(sorted((checkpoints / f"step-{HALF:08d}").glob("*.safetensors"))))


@pytest.fixture
def stopped(harness: Harnesses, tmp_path: Path) -> dict[tuple[str, int], Any]:
    """A run in each layout, stopped half-way."""
    labs = {layout: harness(*SETS) for layout in LAYOUTS}
    for world in (1, 2, 4):
        mine = [layout for layout in LAYOUTS if layout[1] == world]
        jobs = [{"words": words(labs[layout], layout[0]), "spoiled_rank": 0, "signal_at": HALF - 1} for layout in mine]
        (tmp_path / str(world)).mkdir()
        outcomes = launch(tmp_path / str(world), jobs, world)
        assert [[outcome["code"] for outcome in each] for each in outcomes] == [[75] * world] * len(mine), outcomes
    return labs


@pytest.mark.faults
@pytest.mark.scenario("layouts")
def test_layout_may_change_at_any_step(
    trial_log: TrialLog, harness: Harnesses, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    assert trial_log.scenario.full == len(LAYOUTS)
    single = harness(*SETS)
    single.train("pretrain")
    sources = request.getfixturevalue("stopped")
    for trial in trial_log.trials():
        with trial_log.keep(trial):
            strategy, world = LAYOUTS[trial.number]
            folder = tmp_path / f"{strategy}-{world}"
            folder.mkdir()
            heirs = {source: made.copy(folder / "-".join(map(str, source))) for source, made in sources.items()}
            again = [f"{heir.run.path}-again" for heir in heirs.values()]
            jobs = [
                {"words": words(heir, strategy), "write_again": place}
                for heir, place in zip(heirs.values(), again, strict=True)
            ]
            outcomes = launch(folder, jobs, world)
            worst = 0.0
            for (source, heir), place, each in zip(heirs.items(), again, outcomes, strict=True):
                assert [outcome["code"] for outcome in each] == [0] * world, (source, each)
                old, new = tensors(sources[source].run.phase("pretrain").checkpoints), tensors(Path(place))
                assert old.keys() == new.keys(), source
                assert all(torch.equal(new[name], tensor) for name, tensor in old.items()), f"{source}: other bits"
                worst = max(worst, compare(heir.log("pretrain"), single.log("pretrain"), source))
            trial.note(pairs=len(heirs), relative_error_of_a_loss=float(f"{worst:.1e}"))
            shutil.rmtree(folder)
    trial_log.check()


def compare(found: list[dict[str, Any]], expected: list[dict[str, Any]], source: tuple[str, int]) -> float:
    """The largest relative error of a loss; none of a loss or a norm may exceed 1e-5."""
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    errors = {
        key: max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(found, expected, strict=True))
        for key in ("train/loss", "train/grad_norm")
    }
    assert max(errors.values()) <= 1e-5, (source, errors)
    return errors["train/loss"]
