"""Mixing: timm's formula, drawn once for the global batch, the same however the batch is cut."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import Mixup as TimmMixup
from torch import Tensor

from bigincubate.config import MixupConfig
from bigincubate.data.micro_batches import check_mixing_layout
from bigincubate.data.rng import seeded_rng
from bigincubate.errors import ConfigError
from bigincubate.tasks.image_classification.mixup import blend, draw

BOTH = MixupConfig(mixup=0.8, cutmix=1.0)
CLASSES = 7


def batch(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 3, 8, 8, generator=generator), torch.randint(CLASSES, (rows,), generator=generator)


def mixed(images: Tensor, labels: Tensor, step: int, mixup: MixupConfig = BOTH, seed: int = 0) -> tuple[Tensor, Tensor]:
    images, targets = blend(images, labels, mixup=mixup, seed=seed, step=step)
    return images, targets.dense(CLASSES, smoothing=0.1)


@pytest.mark.parametrize(
    "mixup", [BOTH, MixupConfig(mixup=0.4), MixupConfig(cutmix=1.0), MixupConfig(mixup=0.2, cutmix=0.5, prob=0.5)]
)
def test_two_rows_are_mixed_as_timm_mixes_them(mixup: MixupConfig) -> None:
    """Of two rows each is the other's partner, here as in timm."""
    rule = TimmMixup(mixup.mixup, mixup.cutmix, prob=mixup.prob, label_smoothing=0.1, num_classes=CLASSES)
    changed = 0
    for step in range(20):
        images, labels = batch(2)
        with seeded_rng("mix", 0, step):
            expected = rule(images.clone(), labels)
        found = mixed(images, labels, step, mixup)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        changed += not torch.equal(found[0], images)
    assert changed > 2


def test_row_is_mixed_with_the_row_half_a_batch_away() -> None:
    images, labels = batch(8)
    images, labels = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 8, 8).contiguous(), torch.arange(8) % CLASSES
    for step in range(10):
        ratio, box = draw(BOTH, images.shape, seed=0, step=step)
        found, targets = mixed(images, labels, step)
        share = found.mean((1, 2, 3))
        assert torch.allclose(
            share, images[:, 0, 0, 0] * ratio + images.roll(4, 0)[:, 0, 0, 0] * (1 - ratio), atol=1e-5
        )
        assert (found.std((1, 2, 3)) > 0).all() == (box is not None)
        assert torch.allclose(targets.sum(1), torch.ones(8))
        assert targets.dtype == torch.float32


@pytest.mark.parametrize(("world", "micro_batches"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_mixing_every_slice_is_mixing_the_global_batch(world: int, micro_batches: int) -> None:
    images, labels = batch(16)
    position = torch.arange(16)
    for step in range(8):
        whole, targets = mixed(images, labels, step)
        for rank in range(world):
            for micro in range(micro_batches):
                rows = (position % world == rank) & (position // world % micro_batches == micro)
                part, part_targets = mixed(images[rows], labels[rows], step)
                assert torch.equal(part, whole[rows])
                assert torch.equal(part_targets, targets[rows])


def test_drawn_parameters_depend_on_seed_and_step_alone() -> None:
    def drawn(seed: int) -> list[Any]:
        return [draw(BOTH, torch.Size((4, 3, 8, 8)), seed=seed, step=step) for step in range(12)]

    first = drawn(0)
    np.random.seed(3), random.seed(3), torch.manual_seed(3)
    state = np.random.rand()
    np.random.seed(3)
    assert drawn(0) == first
    assert np.random.rand() == state
    assert drawn(1) != first
    assert len({str(d) for d in first}) == 12
    assert {box is None for _, box in first} == {True, False}  # both kinds occur


def test_targets_without_mixing_are_smoothed_labels() -> None:
    images, labels = batch(5)
    found, targets = mixed(images, labels, 0, MixupConfig())
    assert found is images
    expected = torch.full((5, CLASSES), 0.1 / CLASSES)
    expected[torch.arange(5), labels] = 0.9 + 0.1 / CLASSES
    assert torch.allclose(targets, expected)


def test_layout_that_parts_partners_is_refused() -> None:
    check_mixing_layout(BOTH, batch_size=48, world=2, micro_batches=4)
    check_mixing_layout(MixupConfig(), batch_size=6, world=2, micro_batches=3)
    with pytest.raises(ConfigError, match=r"= 24 must be a multiple of 16 \(2 x 2 ranks x 4 micro-batches\)"):
        check_mixing_layout(BOTH, batch_size=24, world=2, micro_batches=4)
