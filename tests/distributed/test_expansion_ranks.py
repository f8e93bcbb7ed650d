"""Phases that start from a meta model, a finished model or an initialization, on two gloo ranks under FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from launching import LOUD, launch, words

THREE_MODULES = ("plan.target_depths=[2, 2, 3]", "plan.meta_depths=[1, 1, 1]")
CASES: dict[str, tuple[tuple[str, ...], list[tuple[str, int | None]]]] = {  # settings, and the phases; the last counts
    "expanded": (("plan.incubate=none",), [("pretrain", None), ("finetune", None)]),
    "partly": (
        (*THREE_MODULES, "plan.incubate=[1]", "expand.init=g_stack"),
        [("pretrain", None), ("incubate", 1), ("finetune", None)],
    ),
    "finished": (("finetune.init={done}", "train.max_steps=8"), [("finetune", None)]),
    "mimetic": (("end_to_end.init=mimetic",), [("end_to_end", None)]),
}


@pytest.fixture(scope="module")
def trained(
    harness: Callable[..., Any], done: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Any, Any, list[dict[str, Any]]]]:
    """Each case by one process and by two ranks, and what the ranks ended with."""
    folder = tmp_path_factory.mktemp("ranks")
    made, jobs = {}, []
    for name, (sets, phases) in CASES.items():
        single = harness(*LOUD, "train.max_steps=6", *(each.replace("{done}", str(done.run.path)) for each in sets))
        for phase, module in phases[:-1]:
            single.train(phase, module)
        double = single.copy(folder / name)
        single.train(*phases[-1])
        more = ["--set", "sharding.strategy=fsdp2", "--set", "train.micro_batch=8"]
        jobs.append(words(double, *phases[-1], *more))
        made[name] = (single, double)
    ended = launch(folder, jobs)
    return {name: (*made[name], outcomes) for name, outcomes in zip(made, ended, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_under_fsdp2_have_the_losses_of_one(trained: dict[str, Any], name: str) -> None:
    single, double, outcomes = trained[name]
    phase = CASES[name][1][-1][0]
    assert [outcome["code"] for outcome in outcomes] == [0, 0], outcomes
    expected, found = single.log(phase), double.log(phase)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    assert len(found) > 6  # also the FLOPs of modules that are not incubated, or of the whole incubation
    for key in ("train/loss", "train/lr", "train/grad_norm"):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in expected], rel=1e-5), key
    losses = [one.run.phase(phase).result["metrics"]["loss"] for one in (single, double)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
