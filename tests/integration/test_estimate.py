"""How long a recipe takes: GPUs are shared out by FLOPs, and a prediction is held against a real run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigincubate.config import load_recipe
from bigincubate.errors import ConfigError
from bigincubate.planning.cost import cost_plan
from bigincubate.planning.phases import make_plan
from bigincubate.planning.walltime import (
    critical_path_seconds,
    estimate_walltime,
    measured_flops_per_second,
    parse_cluster,
)

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def rows() -> list[Any]:
    recipe = load_recipe("imagenet-vit-b")
    return cost_plan(recipe, make_plan(recipe), 1_281_167)


def test_gpus_go_where_the_flops_are(rows: list[Any]) -> None:
    cluster = parse_cluster("nodes=8,gpus=8,tflops=100")
    found = {each.key: each for each in estimate_walltime(rows, cluster, lambda row, ranks: True)}
    shares = [found[f"incubate/{k}"].gpus for k in range(4)]
    assert sum(shares) == 64
    assert shares == sorted(shares, reverse=True)  # module 0 computes most
    assert shares[0] > shares[3]
    times = [found[f"incubate/{k}"].seconds for k in range(4)]
    assert max(times) < 1.1 * min(times)
    planned = {row.key: row for row in rows}
    assert found["pretrain"].gpus == found["finetune"].gpus == 64
    assert found["pretrain"].seconds == pytest.approx(planned["pretrain"].total_flops / 100e12 / 64)
    path = critical_path_seconds([found[key] for key in found if key != "end_to_end"], 64)
    assert path == pytest.approx(found["pretrain"].seconds + max(times) + found["finetune"].seconds)


def test_batch_that_cannot_be_cut_so_leaves_gpus_idle(rows: list[Any]) -> None:
    cluster = parse_cluster("nodes=1,gpus=24,tflops=100")
    found = {
        each.key: each for each in estimate_walltime(rows, cluster, lambda row, ranks: row.batch_size % ranks == 0)
    }
    assert found["pretrain"].gpus == 16  # of 24, for a batch of 2048
    assert [found[f"incubate/{k}"].gpus for k in range(4)] == [8, 8, 4, 4]


def test_modules_take_turns_on_fewer_gpus(rows: list[Any]) -> None:
    cluster = parse_cluster("gpus=2,tflops=100")
    found = estimate_walltime(rows[:-1], cluster, lambda row, ranks: True)
    seconds = {each.key: each.seconds for each in found}
    alone = [seconds[f"incubate/{k}"] for k in range(4)]
    path = critical_path_seconds(found, 2) - seconds["pretrain"] - seconds["finetune"]
    assert max(path, sum(alone) / 2) == path
    assert path == pytest.approx(alone[0] + alone[3])  # the longest first: 0 and 1, then 2 and 3
    assert (
        critical_path_seconds(estimate_walltime(rows[:-1], parse_cluster("gpus=1,tflops=100"), lambda *_: True), 1)
        > path
    )


@pytest.mark.parametrize(
    "text", ["", "64", "nodes=0,tflops=1", "nodes=1", "tflops=1,rates=x", "gpus=2,flops=1", "tflops=-1"]
)
def test_impossible_gpus_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match="expected nodes=N,gpus=N and tflops=X"):
        parse_cluster(text)


def test_rates_are_those_of_a_run(harness: Any, tmp_path: Path, bigincubate: Command) -> None:
    one = harness()
    one.train("pretrain", None)
    run = one.run
    result = run.phase("pretrain").result
    assert measured_flops_per_second(run) == {"pretrain": result["flops"] / result["seconds"]}
    ended = bigincubate("plan", str(run.recipe_file), "--cluster", f"gpus=1,rates={run.path}", "--json")
    assert ended.returncode == 0, ended.stderr
    phases = {each["key"]: each for each in json.loads(ended.stdout)["cluster"]["phases"]}
    assert phases["pretrain"]["seconds"] == pytest.approx(result["seconds"])
    ended = bigincubate("plan", str(run.recipe_file), "--cluster", f"gpus=1,rates={tmp_path}")
    assert ended.returncode == 4
    assert "is not a run directory" in ended.stderr
