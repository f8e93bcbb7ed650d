"""Streams: samples, their order and their augmentation are a function of the step."""

from __future__ import annotations

import multiprocessing
import os
import random
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bigincubate.config import AugmentConfig, DataConfig
from bigincubate.data import prepare as preparing
from bigincubate.data import shards
from bigincubate.data.batch import Batch
from bigincubate.data.dataset import DatasetInfo, open_dataset
from bigincubate.data.streams import EvalStream, TrainStream
from bigincubate.errors import ConfigError
from bigincubate.tasks.image_classification import views
from bigincubate.tasks.image_classification.views import EvalTransform, TrainTransform

FORK = multiprocessing.get_context("fork")
SAMPLES, HELD_OUT = 1003, 37  # primes: multiples of nothing
BATCH = 16
EPOCH = SAMPLES // BATCH
BOOKKEEPING = ("sample_ids", "global_position", "rank_sample_index")
AUGMENT = AugmentConfig(crop="pad", pad=1, erase=0.25, color_jitter=0.2, eval_crop=1.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random images of five classes in eight shards."""
    root = tmp_path_factory.mktemp("streams")
    pixels = np.random.default_rng(0).integers(0, 256, (SAMPLES + HELD_OUT, 8, 8, 3), dtype=np.uint8)
    for row, image in enumerate(pixels):
        folder = root / "tree" / ("train" if row < SAMPLES else "val") / f"class-{row % 5}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{row:04}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "CHUNK_SAMPLES", 128)
        preparing.prepare_dataset(str(root / "tree"), root / "data")
    return root / "data"


@pytest.fixture(scope="module")
def info(data: Path) -> DatasetInfo:
    return open_dataset(data)


def stream(
    info: DatasetInfo, workers: int = 0, augment: AugmentConfig = AUGMENT, seed: int = 0, **options: Any
) -> TrainStream:
    data = DataConfig(workers=workers, **{k: options.pop(k) for k in list(options) if k in DataConfig.model_fields})
    options.setdefault("batch_size", BATCH)
    options.setdefault("repeats", augment.repeated_aug)
    transform = TrainTransform(augment, 8, seed=seed, classes=len(info.schema.metadata["classes"]))
    return TrainStream(info, data, transform, seed=seed, **options)


def eval_stream(info: DatasetInfo, split: str = "val", augment: AugmentConfig = AUGMENT, **options: Any) -> EvalStream:
    transform = EvalTransform(augment, 8, classes=len(info.schema.metadata["classes"]))
    return EvalStream(info, split, transform, **options)


def take(source: TrainStream, count: int, step: int = 0) -> list[Batch]:
    return list(islice(source.batches(step), count))


def same(found: list[Batch], expected: list[Batch]) -> bool:
    pairs = list(zip(found, expected, strict=False))
    return (
        len(found) == len(expected)
        and all(a.columns.keys() == b.columns.keys() == {"images", "labels"} for a, b in pairs)
        and all(torch.equal(a[name], b[name]) for a, b in pairs for name in b.columns)
        and all(torch.equal(getattr(a, name), getattr(b, name)) for a, b in pairs for name in BOOKKEEPING)
    )


@pytest.fixture(scope="module")
def whole(info: DatasetInfo) -> list[Batch]:
    """Two epochs and nine batches from one iterator, without workers."""
    return take(stream(info), 2 * EPOCH + 9)


# ------------------------------------------------------------------------------------------------ order


def test_epoch_is_a_shuffle_without_its_tail(info: DatasetInfo, whole: list[Batch]) -> None:
    assert stream(info).steps_per_epoch == EPOCH == 62
    epochs = [torch.cat([batch.sample_ids for batch in whole[n * EPOCH : (n + 1) * EPOCH]]) for n in range(2)]
    for ids in epochs:
        assert len(ids.unique()) == len(ids) == EPOCH * BATCH
        assert 0 <= ids.min() <= ids.max() < SAMPLES
        assert (ids.diff() == 1).sum() < 20
    assert (epochs[0] == epochs[1]).sum() < 20
    assert {len(batch) for batch in whole} == {BATCH}
    assert whole[0]["images"].shape == (BATCH, 3, 8, 8)
    assert whole[0]["images"].dtype == torch.float32
    assert all(torch.equal(batch.global_position, torch.arange(BATCH)) for batch in whole)


@pytest.mark.parametrize("shuffle", ["py1e", "py1s", "py1br", "py2s"])
@pytest.mark.parametrize("nodes", [1, 2])
def test_shuffle_algorithms_repeat_no_sample(info: DatasetInfo, shuffle: str, nodes: int) -> None:
    source = stream(info, shuffle=shuffle, canonical_nodes=nodes, shuffle_block_size=256)
    ids = torch.cat([batch.sample_ids for batch in take(source, EPOCH, step=EPOCH)])
    assert len(ids.unique()) == EPOCH * BATCH


def test_labels_and_images_belong_to_the_sample_ids(info: DatasetInfo, whole: list[Batch]) -> None:
    plain = AugmentConfig(crop="none", flip=0.0, eval_crop=1.0)
    shown = {
        int(i): (x, int(y))
        for b in take(stream(info, augment=plain), EPOCH)
        for i, x, y in zip(b.sample_ids, b["images"], b["labels"], strict=True)
    }
    for batch in eval_stream(info, "train", plain, batch_size=100):
        for row, sample in enumerate(batch.sample_ids.tolist()):
            if sample in shown:
                assert torch.equal(shown[sample][0], batch["images"][row])
                assert shown[sample][1] == batch["labels"][row]
    assert len(shown) == EPOCH * BATCH


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_do_not_depend_on_workers(info: DatasetInfo, whole: list[Batch], workers: int) -> None:
    assert same(take(stream(info, workers), EPOCH + 9), whole[: EPOCH + 9])


@pytest.mark.parametrize("step", [0, 1, 17, EPOCH - 1, EPOCH, EPOCH + 1, 2 * EPOCH - 2])
def test_batches_from_any_step_are_the_same(info: DatasetInfo, whole: list[Batch], step: int) -> None:
    assert same(take(stream(info, workers=2 * (step == 17)), 6, step), whole[step : step + 6])


def test_workers_persist_across_epochs(info: DatasetInfo) -> None:
    before = set(multiprocessing.active_children())
    found = []
    with closing(stream(info, workers=2).batches(EPOCH - 1)) as batches:
        for _ in range(2):
            next(batches)
            found.append({child.pid for child in set(multiprocessing.active_children()) - before})
    assert found[0] == found[1]
    assert len(found[0]) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_can_restart_at_any_step(info: DatasetInfo, whole: list[Batch], workers: int) -> None:
    source = stream(info, workers)
    for step in (EPOCH + 3, 5, 2 * EPOCH, 0):
        assert same(take(source, 3, step), whole[step : step + 3])


def test_views_differ_between_epochs(whole: list[Batch]) -> None:
    first, second = (torch.cat([batch.sample_ids for batch in whole[n * EPOCH : (n + 1) * EPOCH]]) for n in range(2))
    images = [torch.cat([batch["images"] for batch in whole[n * EPOCH : (n + 1) * EPOCH]]) for n in range(2)]
    both = [(a, int((second == sample).nonzero())) for a, sample in enumerate(first[:100]) if sample in second]
    assert len(both) > 90
    assert not any(torch.equal(images[0][a], images[1][b]) for a, b in both)


def test_shuffles_differ_between_seeds(digits: Path) -> None:
    """The shuffle of seed 1 is not that of seed 0 an epoch later, as adding the epoch to the seed would give."""
    info = open_dataset(digits)
    assert len(list((digits / "train").rglob("*.mds"))) == 1  # the order of the shards would hide it
    later = take(stream(info, augment=AugmentConfig(crop="none")), 1, step=info.samples["train"] // BATCH)
    assert not torch.equal(
        take(stream(info, augment=AugmentConfig(crop="none"), seed=1), 1)[0].sample_ids, later[0].sample_ids
    )


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_divide_the_batch_of_one_rank(info: DatasetInfo, whole: list[Batch], world: int) -> None:
    """Row by row, also in the middle of an epoch, with any number of workers."""
    for begin in (0, EPOCH - 5):
        ranks = [take(stream(info, workers=rank % 2, rank=rank, world=world), 9, begin) for rank in range(world)]
        for shares, expected in zip(zip(*ranks, strict=True), whole[begin:], strict=False):
            assert set(torch.cat([share.sample_ids for share in shares]).tolist()) == set(expected.sample_ids.tolist())
            for rank, share in enumerate(shares):
                for name in ("labels", "images"):
                    assert torch.equal(share[name], expected[name][rank::world])
                for name in ("sample_ids", "global_position"):
                    assert torch.equal(getattr(share, name), getattr(expected, name)[rank::world])
                assert torch.equal(share.rank_sample_index, torch.arange(BATCH // world))


def test_micro_batches_divide_the_share_of_a_rank(info: DatasetInfo, whole: list[Batch]) -> None:
    world, micros = 2, 4
    for rank in range(world):
        batch = take(stream(info, rank=rank, world=world), 1)[0]
        parts = [batch.micro_batch(index, micros) for index in range(micros)]
        for index, part in enumerate(parts):
            assert part.rank_sample_index.tolist() == [index, index + 4]
            assert torch.equal(part.sample_ids, batch.sample_ids[index::4])
            assert torch.equal((part.global_position + BATCH // 2) % BATCH, part.global_position.roll(1))
        assert torch.equal(torch.cat([part.global_position for part in parts]).sort().values, batch.global_position)
    assert batch.micro_batch(0, 1) is batch
    assert same([batch.to("cpu")], [batch])


@pytest.mark.parametrize(("world", "workers", "step"), [(1, 0, 0), (1, 2, 20), (2, 2, 5), (4, 0, 47), (8, 1, 31)])
def test_repeated_augmentation_shows_views_in_succession(
    info: DatasetInfo, whole: list[Batch], world: int, workers: int, step: int
) -> None:
    """The first rows of the shuffle, each three times; the first view of each is the one of R = 1."""
    repeats, epoch = 3, SAMPLES // 256 * 256 // BATCH
    augment = AUGMENT.model_copy(update={"repeated_aug": repeats})
    ids = [torch.cat([batch.sample_ids for batch in whole[n * EPOCH : (n + 1) * EPOCH]]) for n in range(2)]
    images = [torch.cat([batch["images"] for batch in whole[n * EPOCH : (n + 1) * EPOCH]]) for n in range(2)]
    sources = [stream(info, workers, augment, rank=rank, world=world) for rank in range(world)]
    assert {source.steps_per_epoch for source in sources} == {epoch}
    for offset, shares in enumerate(zip(*(take(source, 3, step) for source in sources), strict=True)):
        number, first = divmod(step + offset, epoch)
        rows = first * BATCH + torch.arange(BATCH)
        for rank, share in enumerate(shares):
            own = rows[rank::world]
            assert torch.equal(share.sample_ids, ids[number][own // repeats])
            assert torch.equal(share.global_position, torch.arange(rank, BATCH, world))
            for row, image in zip(own.tolist(), share["images"], strict=True):
                assert torch.equal(image, images[number][row // repeats]) == (row % repeats == 0)


def test_augmentations_repeat_after_distinct_epochs(info: DatasetInfo, whole: list[Batch]) -> None:
    batches = take(stream(info, augment=AUGMENT.model_copy(update={"distinct_epochs": 2})), 4 * EPOCH)
    assert same(batches[: 2 * EPOCH], whole[: 2 * EPOCH])
    epochs: list[dict[int, bytes]] = [{} for _ in range(4)]
    for step, batch in enumerate(batches):
        for sample, image in zip(batch.sample_ids.tolist(), batch["images"], strict=True):
            epochs[step // EPOCH][sample] = image.numpy().tobytes()
    for earlier, later, repeats in ((0, 2, True), (1, 3, True), (0, 1, False), (2, 3, False)):
        common = epochs[earlier].keys() & epochs[later].keys()
        assert len(common) > 0.9 * SAMPLES
        equal = sum(epochs[earlier][sample] == epochs[later][sample] for sample in common)
        assert equal == len(common) if repeats else equal < 0.1 * len(common)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 38])
def test_evaluation_has_every_sample_once(info: DatasetInfo, world: int) -> None:
    expected = {int(b.sample_ids[0]): b for b in eval_stream(info, batch_size=1)}
    seen: list[int] = []
    for rank in range(world):
        source = eval_stream(info, batch_size=5, rank=rank, world=world, workers=rank % 3 == 1)
        batches = list(source)
        assert len(batches) == len(source)
        ids = torch.cat([batch.sample_ids for batch in batches]).tolist() if batches else []
        assert ids == list(range(rank, HELD_OUT, world))
        assert ids == [i for batch in batches for i in batch.global_position.tolist()]
        for batch in batches:
            for row, sample in enumerate(batch.sample_ids.tolist()):
                assert torch.equal(batch["images"][row], expected[sample]["images"][0])
                assert batch["labels"][row] == expected[sample]["labels"][0]
        seen += ids
    assert sorted(seen) == list(range(HELD_OUT))


def test_global_generators_are_unchanged(info: DatasetInfo) -> None:
    def draws() -> tuple[Any, ...]:
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = draws()
    for workers in (0, 1):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        take(stream(info, workers), 2)
        list(eval_stream(info, batch_size=8, workers=workers))
        assert draws() == expected


@pytest.mark.parametrize("room", [0, 100 * (8 * 8 * 4 + shards.PER_IMAGE_OVERHEAD), shards.DECODED_CACHE_BYTES])
def test_small_split_is_decoded_once_with_the_same_batches(
    info: DatasetInfo, whole: list[Batch], monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """A split that does not fit is decoded each time, and none of it stays in memory."""
    decoded, decode = [], views.decode_image

    def counted(data: bytes, **options: Any) -> Image.Image:
        decoded.append(data)
        return decode(data, **options)

    monkeypatch.setattr(shards, "DECODED_CACHE_BYTES", room)
    monkeypatch.setattr(views, "decode_image", counted)
    source = stream(info)
    assert same(take(source, 2 * EPOCH), whole[: 2 * EPOCH])
    held = len(source._loader.dataset._decoded)
    seen = len(torch.cat([batch.sample_ids for batch in whole[: 2 * EPOCH]]).unique())
    fits = room >= SAMPLES * (8 * 8 * 4 + shards.PER_IMAGE_OVERHEAD)
    assert (len(decoded), held) == ((seen, seen) if fits else (2 * EPOCH * BATCH, 0))


def test_many_epochs_leave_no_files_open(info: DatasetInfo) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    batches = stream(info, augment=AugmentConfig(crop="none"), batch_size=800).batches(0)
    next(batches)
    before = open_files()
    list(islice(batches, 4))
    assert open_files() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1004}, r"train\.batch_size = 1004, but .* has only 1003 samples"),
        ({"world": 3}, r"train\.batch_size = 16 .* 3 ranks"),
        ({"train_samples": 1000}, r"data\.train_samples = 1000, but .* has 1003"),
    ],
)
def test_impossible_batch_sizes_are_refused(info: DatasetInfo, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stream(info, **options)
