"""Properties of the order of data: any ranks, workers and cuts give the rows of one uninterrupted process."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_streams import AUGMENT, SAMPLES, data, info, stream, take

from bigincubate.data.epoch_layout import EpochLayout

fixtures = (data, info)


@given(st.data())
def test_epoch_layout_of_any_world_and_workers_is_that_of_one_process(data: st.DataObject) -> None:
    world, share = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8))
    repeats, samples = data.draw(st.integers(1, 4)), data.draw(st.integers(256, 1500))
    batch_size = world * share
    one = EpochLayout(samples, batch_size, repeats)
    positions, numbers = one.select(0)[np.arange(one.steps * batch_size)]
    assert len(one.select(0)) == len(positions)
    assert len(positions) == one.steps * batch_size
    assert samples - len(positions) < 256 + batch_size
    assert len(positions) == 0 or positions.max() < samples
    assert len(set(zip(positions.tolist(), numbers.tolist(), strict=True))) == len(positions)  # no view twice

    first = data.draw(st.integers(0, one.steps))
    workers = data.draw(st.integers(1, 4))
    found = np.full((2, one.steps - first, batch_size), -1)
    for rank in range(world):
        layout = EpochLayout(samples, batch_size, repeats, rank, world)
        assert layout.steps == one.steps
        for worker in range(workers):
            rows = layout.select(first, worker, workers)
            for row, values in enumerate(rows[np.arange(len(rows))]):
                found[row, worker::workers, rank::world] = values.reshape(-1, share)
    assert np.array_equal(found[0].ravel(), positions[first * batch_size :])
    assert np.array_equal(found[1].ravel(), numbers[first * batch_size :])


@given(st.data())
@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
def test_stream_of_any_world_resumes_where_another_stopped(info: Any, data: st.DataObject) -> None:
    """The batches after a cut, of any ranks and workers, are those of one rank without workers that was not cut."""
    world, share = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 40))
    augment = AUGMENT.model_copy(update={"repeated_aug": data.draw(st.integers(1, 3))})
    options: dict[str, Any] = {"augment": augment, "batch_size": world * share, "seed": data.draw(st.integers(0, 3))}
    options["shuffle"] = data.draw(st.sampled_from(["py1e", "py1s", "py1br"]))
    whole = stream(info, **options)
    step = data.draw(st.integers(0, 2 * whole.steps_per_epoch))
    expected = take(whole, 3, max(0, step - 1))[step > 0 :][:2]
    assert world * share < SAMPLES
    ranks = [
        take(stream(info, data.draw(st.integers(0, 2)), rank=rank, world=world, **options), 2, step)
        for rank in range(world)
    ]
    for shares, batch in zip(zip(*ranks, strict=True), expected, strict=True):
        for rank, found in enumerate(shares):
            for name in ("images", "labels"):
                assert torch.equal(found[name], batch[name][rank::world])
            for name in ("sample_ids", "global_position"):
                assert torch.equal(getattr(found, name), getattr(batch, name)[rank::world])
