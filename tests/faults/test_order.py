"""The order of the data: cut anywhere, by any number of ranks and workers, it goes on as if it had not been."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from test_streams import EPOCH, data, info, same, stream, take, whole
from trial_log import TrialLog

fixtures = (data, info, whole)
EDGES = (0, EPOCH - 1, EPOCH, EPOCH + 1)
CUTS = (*EDGES, *random.Random(0).sample(range(2, 2 * EPOCH), 20))
CASES = tuple(itertools.product(CUTS, (1, 2, 4), (0, 2)))


@pytest.mark.faults
@pytest.mark.scenario("order")
def test_checkpoint_calls_keep_their_order(trial_log: TrialLog, info: Any, whole: Any) -> None:
    assert trial_log.scenario.full == len(CASES)
    for trial in trial_log.trials():
        with trial_log.keep(trial):
            trial.note(batches=check(info, whole, *CASES[trial.number]))
    trial_log.check()


def check(info: Any, whole: Any, cut: int, world: int, workers: int) -> int:
    count = min(5, len(whole) - cut)
    ranks = [take(stream(info, workers, rank=rank, world=world), count, cut) for rank in range(world)]
    if world == 1:
        assert same(ranks[0], whole[cut : cut + count])
    for shares, expected in zip(zip(*ranks, strict=True), whole[cut : cut + count], strict=True):
        for rank, share in enumerate(shares):
            assert share.columns.keys() == expected.columns.keys() == {"images", "labels"}
            for name in share.columns:
                assert torch.equal(share[name], expected[name][rank::world]), (name, rank)
            for name in ("sample_ids", "global_position"):
                assert torch.equal(getattr(share, name), getattr(expected, name)[rank::world]), (name, rank)
    return count * world
