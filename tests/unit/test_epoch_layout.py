"""Layout of an epoch: with repeats it is DeiT's `RASampler`, row by row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bigincubate.data.epoch_layout import EpochLayout
from bigincubate.errors import ConfigError


def deit_indices(shuffled: list[int], repeats: int, rank: int, world: int) -> list[int]:
    """Return the indices of an epoch as ``RASampler.__iter__`` of facebookresearch/deit (samplers.py) does."""
    num_samples = math.ceil(len(shuffled) * repeats / world)
    total_size = num_samples * world
    num_selected_samples = math.floor(len(shuffled) // 256 * 256 / world)
    indices = torch.repeat_interleave(torch.tensor(shuffled), repeats=repeats, dim=0).tolist()
    padding_size = total_size - len(indices)
    if padding_size > 0:
        indices += indices[:padding_size]
    assert len(indices) == total_size
    indices = indices[rank:total_size:world]
    assert len(indices) == num_samples
    return indices[:num_selected_samples]


def all_rows(layout: EpochLayout) -> tuple[np.ndarray, np.ndarray]:
    rows = layout.select(0)
    return rows[np.arange(len(rows))]


@pytest.mark.parametrize("samples", [256, 1003, 1437, 2815])
@pytest.mark.parametrize("repeats", [2, 3, 4])
@pytest.mark.parametrize(("world", "batch_size"), [(1, 64), (2, 64), (3, 48), (4, 256), (7, 70), (8, 32)])
def test_repeated_rows_are_those_of_deits_sampler(samples: int, repeats: int, world: int, batch_size: int) -> None:
    shuffled = torch.randperm(samples, generator=torch.Generator().manual_seed(samples)).tolist()
    share = batch_size // world
    for rank in range(world):
        layout = EpochLayout(samples, batch_size, repeats, rank, world)
        expected = deit_indices(shuffled, repeats, rank, world)
        expected = expected[: len(expected) // share * share]  # DeiT's loader drops an incomplete batch
        positions, numbers = all_rows(layout)
        assert [shuffled[position] for position in positions] == expected
        assert layout.steps == len(expected) // share
        assert numbers.tolist() == [(row * world + rank) % repeats for row in range(len(expected))]


def test_epoch_with_three_repeats_shows_a_third_of_the_samples() -> None:
    layout = EpochLayout(1281167, 2048, 3)
    plain = EpochLayout(1281167, 2048)
    assert layout.steps == plain.steps == 625
    assert len(set(all_rows(layout)[0].tolist())) == math.ceil(625 * 2048 / 3)
    assert len(set(all_rows(plain)[0].tolist())) == 625 * 2048


@pytest.mark.parametrize("samples", [15, 255])
def test_epoch_without_a_batch_is_refused(samples: int) -> None:
    with pytest.raises(ConfigError, match=rf"train\.batch_size = 16, but .* {samples} samples.*multiple"):
        EpochLayout(samples, 16, 3).check()
    EpochLayout(16, 16).check()
