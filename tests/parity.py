"""Many phases on several ranks in one launch, each against one process that does the same.

A `Case` says what runs; `Parity` trains the one-process references here, hands each case a copy of them up to its
phase, and launches the ranks once for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from launching import LOUD, PHASES, launch, words

Harnesses = Callable[..., Any]
OPTIMIZERS = {"adamw": [], "lamb": ["optim.name=lamb", "train.lr=1e-2"]}
EARLIER = {"pretrain": [], "incubate": ["meta"], "finetune": ["meta", "modules"]}
MICRO = ["train.micro_batch=4"]


@dataclass(frozen=True)
class Case:
    """A phase under a strategy. ``more``: further settings of where and how, which change nothing that is computed."""

    strategy: str
    phase: str = "incubate"
    optimizer: str = "adamw"
    precision: str = "fp32"
    more: tuple[str, ...] = ()

    @property
    def module(self) -> int | None:
        return 1 if self.phase == "incubate" else None

    def __str__(self) -> str:
        return "-".join([self.strategy, self.phase, self.optimizer, self.precision, *self.more])


class Parity:
    """The cases' logs, weights and outcomes beside those of one process."""

    def __init__(
        self,
        harness: Harnesses,
        folder: Path,
        cases: Iterable[Case],
        *,
        world: int = 2,
        sets: Iterable[str] = (),
        single: dict[tuple[str, str], Any] | None = None,
        loud: Iterable[str] = LOUD,
    ) -> None:
        self.cases, self.world = list(cases), world
        self.single = dict(single or {})
        for kind in dict.fromkeys((case.optimizer, case.precision) for case in self.cases):
            if kind not in self.single:
                one = self.single[kind] = harness(*loud, *OPTIMIZERS[kind[0]], f"train.precision={kind[1]}", *sets)
                for phase, module in PHASES:
                    one.train(phase, module)
        self.spread = {}
        jobs = []
        for index, case in enumerate(self.cases):
            reference = self.single[case.optimizer, case.precision]
            double = self.spread[case] = reference.copy(folder / str(index), EARLIER[case.phase])
            given = [f"sharding.strategy={case.strategy}", *MICRO, *case.more]
            more = [word for item in given for word in ("--set", item)]
            jobs.append(words(double, case.phase, case.module, *more))
        self.outcomes = dict(zip(self.cases, launch(folder, jobs, world), strict=True))

    def check(self, case: Case, rel: float) -> None:
        """Losses, norms and learning rates of all steps, to ``rel`` relative; and the weights at the end."""
        outcomes = self.outcomes[case]
        assert [outcome["code"] for outcome in outcomes] == [0] * self.world, outcomes
        single, spread = self.single[case.optimizer, case.precision], self.spread[case]
        expected, found = single.log(case.phase, case.module), spread.log(case.phase, case.module)
        assert [row["step"] for row in found] == [row["step"] for row in expected]
        assert len(found) >= 12
        for key in ("train/loss", "train/lr", "train/grad_norm"):
            assert [row[key] for row in found] == pytest.approx([row[key] for row in expected], rel=rel), key
        scores = [one.run.phase(case.phase, case.module).result["metrics"] for one in (single, spread)]
        assert scores[1]["loss"] == pytest.approx(scores[0]["loss"], rel=10 * rel)
