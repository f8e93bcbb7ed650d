"""Streams: which samples, in which order, looking how, is a function of the step; damage is named; jobs do not meet."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bigincubate.config import Augment, Data
from bigincubate.data import prepare as preparing
from bigincubate.data import shards
from bigincubate.data.dataset import DatasetInfo, open_dataset
from bigincubate.data.locks import runtime_dir
from bigincubate.data.streams import Batch, EvalStream, TrainStream
from bigincubate.errors import ConfigError, EnvironmentFault

FORK = multiprocessing.get_context("fork")
SAMPLES, HELD_OUT = 1003, 37  # primes: multiples of nothing
BATCH = 16
EPOCH = SAMPLES // BATCH
AUGMENT = Augment(crop="pad", pad=1, erase=0.25, color_jitter=0.2, eval_crop=1.0)


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
        patch.setattr(preparing, "CHUNK", 128)
        preparing.prepare(str(root / "tree"), root / "data")
    return root / "data"


@pytest.fixture(scope="module")
def info(data: Path) -> DatasetInfo:
    return open_dataset(data)


def stream(
    info: DatasetInfo, workers: int = 0, augment: Augment = AUGMENT, seed: int = 0, **options: Any
) -> TrainStream:
    data = Data(workers=workers, **{k: options.pop(k) for k in list(options) if k in Data.model_fields})
    options.setdefault("batch_size", BATCH)
    return TrainStream(info, data, augment, img_size=8, seed=seed, **options)


def take(source: TrainStream, count: int, step: int = 0) -> list[Batch]:
    return list(islice(source.batches(step), count))


def same(found: list[Batch], expected: list[Batch]) -> bool:
    fields = ("images", "labels", "ids", "positions", "local")
    return len(found) == len(expected) and all(
        torch.equal(getattr(a, name), getattr(b, name)) for a, b in zip(found, expected, strict=True) for name in fields
    )


@pytest.fixture(scope="module")
def whole(info: DatasetInfo) -> list[Batch]:
    """Two epochs and a bit, in one go, without workers."""
    return take(stream(info), 2 * EPOCH + 9)


# ------------------------------------------------------------------------------------------------ order


def test_an_epoch_is_a_shuffle_without_its_tail(info: DatasetInfo, whole: list[Batch]) -> None:
    assert stream(info).steps_per_epoch == EPOCH == 62
    epochs = [torch.cat([batch.ids for batch in whole[n * EPOCH : (n + 1) * EPOCH]]) for n in range(2)]
    for ids in epochs:
        assert len(ids.unique()) == len(ids) == EPOCH * BATCH
        assert 0 <= ids.min() <= ids.max() < SAMPLES
        assert (ids.diff() == 1).sum() < 20
    assert (epochs[0] == epochs[1]).sum() < 20
    assert {len(batch) for batch in whole} == {BATCH}
    assert whole[0].images.shape == (BATCH, 3, 8, 8)
    assert whole[0].images.dtype == torch.float32
    assert all(torch.equal(batch.positions, torch.arange(BATCH)) for batch in whole)


@pytest.mark.parametrize("shuffle", ["py1e", "py1s", "py1br", "py2s"])
@pytest.mark.parametrize("nodes", [1, 2])
def test_no_algorithm_repeats_a_sample(info: DatasetInfo, shuffle: str, nodes: int) -> None:
    source = stream(info, shuffle=shuffle, canonical_nodes=nodes, shuffle_block_size=256)
    ids = torch.cat([batch.ids for batch in take(source, EPOCH, step=EPOCH)])
    assert len(ids.unique()) == EPOCH * BATCH


def test_labels_and_images_belong_to_the_ids(info: DatasetInfo, whole: list[Batch]) -> None:
    plain = Augment(crop="none", flip=0.0, eval_crop=1.0)
    shown = {
        int(i): (x, int(y))
        for b in take(stream(info, augment=plain), EPOCH)
        for i, x, y in zip(b.ids, b.images, b.labels, strict=True)
    }
    for batch in EvalStream(info, "train", plain, img_size=8, batch_size=100):
        for row, sample in enumerate(batch.ids.tolist()):
            if sample in shown:
                assert torch.equal(shown[sample][0], batch.images[row])
                assert shown[sample][1] == batch.labels[row]
    assert len(shown) == EPOCH * BATCH


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_do_not_change_a_bit(info: DatasetInfo, whole: list[Batch], workers: int) -> None:
    assert same(take(stream(info, workers), EPOCH + 9), whole[: EPOCH + 9])


@pytest.mark.parametrize("step", [0, 1, 17, EPOCH - 1, EPOCH, EPOCH + 1, 2 * EPOCH - 2])
def test_from_any_step_the_rest_is_the_same(info: DatasetInfo, whole: list[Batch], step: int) -> None:
    assert same(take(stream(info, workers=2 * (step == 17)), 6, step), whole[step : step + 6])


def test_workers_stay_from_epoch_to_epoch(info: DatasetInfo) -> None:
    before = set(multiprocessing.active_children())
    found = []
    with closing(stream(info, workers=2).batches(EPOCH - 1)) as batches:
        for _ in range(2):
            next(batches)
            found.append({child.pid for child in set(multiprocessing.active_children()) - before})
    assert found[0] == found[1]
    assert len(found[0]) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_one_stream_can_be_sent_back_and_forth(info: DatasetInfo, whole: list[Batch], workers: int) -> None:
    source = stream(info, workers)
    for step in (EPOCH + 3, 5, 2 * EPOCH, 0):
        assert same(take(source, 3, step), whole[step : step + 3])


def test_views_change_from_epoch_to_epoch(whole: list[Batch]) -> None:
    first, second = (torch.cat([batch.ids for batch in whole[n * EPOCH : (n + 1) * EPOCH]]) for n in range(2))
    images = [torch.cat([batch.images for batch in whole[n * EPOCH : (n + 1) * EPOCH]]) for n in range(2)]
    both = [(a, int((second == sample).nonzero())) for a, sample in enumerate(first[:100]) if sample in second]
    assert len(both) > 90
    assert not any(torch.equal(images[0][a], images[1][b]) for a, b in both)


def test_a_seed_has_shuffles_of_its_own(digits: Path) -> None:
    """Not those of its neighbour an epoch later, which is what adding the epoch to the seed would give."""
    info = open_dataset(digits)
    assert len(list((digits / "train").rglob("*.mds"))) == 1  # the order of the shards would hide it
    later = take(stream(info, augment=Augment(crop="none")), 1, step=info.samples["train"] // BATCH)
    assert not torch.equal(take(stream(info, augment=Augment(crop="none"), seed=1), 1)[0].ids, later[0].ids)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batch_of_one(info: DatasetInfo, whole: list[Batch], world: int) -> None:
    """Row by row, in mid-epoch too, whatever their workers."""
    for begin in (0, EPOCH - 5):
        ranks = [take(stream(info, workers=rank % 2, rank=rank, world=world), 9, begin) for rank in range(world)]
        for shares, expected in zip(zip(*ranks, strict=True), whole[begin:], strict=False):
            assert set(torch.cat([share.ids for share in shares]).tolist()) == set(expected.ids.tolist())
            for rank, share in enumerate(shares):
                for name in ("ids", "labels", "images", "positions"):
                    assert torch.equal(getattr(share, name), getattr(expected, name)[rank::world])
                assert torch.equal(share.local, torch.arange(BATCH // world))


def test_views_of_a_sample_stay_together(info: DatasetInfo, whole: list[Batch]) -> None:
    augment = AUGMENT.model_copy(update={"repeats": 3})
    world, micros = 2, 4
    for rank in range(world):
        batch = take(stream(info, augment=augment, batch_size=3 * BATCH, rank=rank, world=world), 1)[0]
        assert torch.equal(batch.ids[::3], whole[0].ids[rank::world])
        assert torch.equal(batch.images[::3], whole[0].images[rank::world])  # the first view is the only one of R = 1
        assert torch.equal(batch.positions, (batch.local * world + rank) * 3 + torch.arange(3).repeat(8))
        views = batch.images.view(8, 3, -1)
        assert not any(torch.equal(views[n, a], views[n, b]) for n in range(8) for a, b in [(0, 1), (0, 2), (1, 2)])
        parts = [batch.micro(index, micros) for index in range(micros)]
        for index, part in enumerate(parts):
            assert part.local.tolist() == [index] * 3 + [index + 4] * 3
            assert torch.equal(part.ids, batch.ids[(batch.local % micros == index)])
            partner = (part.positions + 3 * BATCH // 2) % (3 * BATCH)
            assert torch.equal(partner, part.positions.roll(len(part) // 2))
        assert torch.equal(torch.cat([part.positions for part in parts]).sort().values, batch.positions)
    assert batch.micro(0, 1) is batch
    assert same([batch.to("cpu")], [batch])


@pytest.mark.parametrize("world", [1, 2, 3, 4, 38])
def test_evaluation_sees_every_sample_once(info: DatasetInfo, world: int) -> None:
    expected = {int(b.ids[0]): b for b in EvalStream(info, "val", AUGMENT, img_size=8, batch_size=1)}
    seen: list[int] = []
    for rank in range(world):
        source = EvalStream(
            info, "val", AUGMENT, img_size=8, batch_size=5, rank=rank, world=world, workers=rank % 3 == 1
        )
        batches = list(source)
        assert len(batches) == len(source)
        ids = torch.cat([batch.ids for batch in batches]).tolist() if batches else []
        assert ids == list(range(rank, HELD_OUT, world))
        assert ids == [i for batch in batches for i in batch.positions.tolist()]
        for batch in batches:
            for row, sample in enumerate(batch.ids.tolist()):
                assert torch.equal(batch.images[row], expected[sample].images[0])
                assert batch.labels[row] == expected[sample].labels[0]
        seen += ids
    assert sorted(seen) == list(range(HELD_OUT))


def test_the_global_generators_are_left_alone(info: DatasetInfo) -> None:
    def draws() -> tuple[Any, ...]:
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = draws()
    for workers in (0, 1):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        take(stream(info, workers), 2)
        list(EvalStream(info, "val", AUGMENT, img_size=8, batch_size=8, workers=workers))
        assert draws() == expected


@pytest.mark.parametrize("room", [0, 100 * (8 * 8 * 4 + shards.APIECE), shards.ROOM])
def test_a_small_split_is_decoded_once(
    info: DatasetInfo, whole: list[Batch], monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """And one that does not fit is decoded anew each time, and leaves nothing behind. The batches are the same."""
    decoded, decode = [], shards.decode

    def counted(data: bytes) -> Image.Image:
        decoded.append(data)
        return decode(data)

    monkeypatch.setattr(shards, "ROOM", room)
    monkeypatch.setattr(shards, "decode", counted)
    source = stream(info)
    assert same(take(source, 2 * EPOCH), whole[: 2 * EPOCH])
    held = len(source._loader.dataset._held)
    seen = len(torch.cat([batch.ids for batch in whole[: 2 * EPOCH]]).unique())
    fits = room >= SAMPLES * (8 * 8 * 4 + shards.APIECE)
    assert (len(decoded), held) == ((seen, seen) if fits else (2 * EPOCH * BATCH, 0))


def test_many_epochs_leave_no_files_open(info: DatasetInfo) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    batches = stream(info, augment=Augment(crop="none"), batch_size=800).batches(0)
    next(batches)
    before = open_files()
    list(islice(batches, 4))
    assert open_files() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1004}, "a batch takes 1004 samples, .* holds 1003"),
        ({"world": 3}, "= 16 cannot be shared evenly by 3 ranks"),
        ({"train_samples": 1000}, "data.train_samples = 1000, but .* holds 1003"),
    ],
)
def test_what_cannot_be_is_refused(info: DatasetInfo, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stream(info, **options)


# ------------------------------------------------------------------------------------------------ damage


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "copy"))


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def fault_of(run: Callable[[], Any]) -> str:
    with pytest.raises(EnvironmentFault) as fault:
        run()
    assert "\n" not in str(fault.value)
    return str(fault.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_flipped_bit_is_named(copy: Path, workers: int) -> None:
    info = open_dataset(copy)
    shard = copy / "train" / "00003" / "shard.00000.mds"
    flip_a_bit(shard)
    message = fault_of(lambda: take(stream(info, workers), EPOCH))
    assert str(shard) in message
    assert len([word for word in message.replace(",", "").replace(";", "").split() if len(word) == 64]) == 2
    flip_a_bit(copy / "val" / "00000" / "shard.00000.mds")
    evaluation = EvalStream(info, "val", AUGMENT, img_size=8, batch_size=8, workers=workers)
    assert "val/00000/shard.00000.mds is damaged" in fault_of(lambda: list(evaluation))


def test_a_shard_is_hashed_once_for_all_workers_and_epochs(info: DatasetInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    count, check_hash = FORK.Value("i", 0), shards.check_hash

    def counted(*arguments: Any, **named: Any) -> None:
        with count.get_lock():
            count.value += 1
        check_hash(*arguments, **named)

    monkeypatch.setattr(shards, "check_hash", counted)
    take(stream(info, workers=2), EPOCH + 20)
    assert count.value == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanished_is_named(copy: Path, workers: int) -> None:
    info = open_dataset(copy)
    (copy / "train" / "00005" / "shard.00000.mds").unlink()
    message = fault_of(lambda: take(stream(info, workers), EPOCH))
    assert "train/00005/shard.00000.mds: No such file" in message


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_does_not_decode_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    for row in range(30):
        (tmp_path / "tree" / f"{row % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), row).save(tmp_path / "tree" / f"{row % 2}" / f"{row}.png")
    (tmp_path / "tree" / "0" / "9.png").write_bytes(b"broken")
    monkeypatch.setattr(preparing, "decode", lambda data: None)  # as if it had been fine when it was prepared
    monkeypatch.setattr(preparing, "CHUNK", 10)
    info = preparing.prepare(str(tmp_path / "tree"), tmp_path / "data")
    split = "train" if b"broken" in b"".join(f.read_bytes() for f in (info.path / "train").rglob("*.mds")) else "val"
    message = fault_of(lambda: list(EvalStream(info, split, AUGMENT, img_size=8, batch_size=4, workers=workers)))
    shard = next(file for file in info.path.rglob("*.mds") if b"broken" in file.read_bytes())
    sample = int(message.split(" sample ")[1].split()[0])
    assert message.startswith(f"{split} sample {sample} (row {sample % 10} of {shard}) is not a readable image")


# ------------------------------------------------------------------------------------------------ remote


@pytest.mark.parametrize("workers", [0, 2])
def test_from_a_remote_through_a_local_cache(data: Path, whole: list[Batch], tmp_path: Path, workers: int) -> None:
    cache = tmp_path / "cache"
    info = open_dataset(cache, remote=str(data))
    assert info.digest == open_dataset(data).digest
    assert not list(cache.rglob("*.mds"))
    ranks = [stream(info, workers, remote=str(data), rank=rank, world=2).batches(0) for rank in range(2)]
    for expected in whole[:EPOCH]:
        for rank, batches in enumerate(ranks):
            assert torch.equal(next(batches).images, expected.images[rank::2])
    assert len(list(cache.rglob("*.mds"))) == 8  # of the training part
    assert {file.name for file in cache.rglob("*.mds*")} == {"shard.00000.mds"}  # nothing half done
    list(EvalStream(info, "val", AUGMENT, img_size=8, batch_size=8, workers=workers, remote=str(data)))
    open_dataset(cache)  # complete by now


def test_a_damaged_remote_never_reaches_the_cache(copy: Path, tmp_path: Path) -> None:
    info = open_dataset(tmp_path / "cache", remote=str(copy))
    flip_a_bit(copy / "train" / "00003" / "shard.00000.mds")
    message = fault_of(lambda: take(stream(info, remote=str(copy)), EPOCH))
    assert f"{copy}/train/00003/shard.00000.mds is damaged" in message
    assert not (tmp_path / "cache" / "train" / "00003" / "shard.00000.mds").exists()


def test_a_remote_without_data_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streaming.base.util.sleep", lambda seconds: None)
    assert "cannot download" in fault_of(lambda: open_dataset(tmp_path / "cache", remote=str(tmp_path / "nowhere")))


# ------------------------------------------------------------------------------------------------ several jobs


def _construct(info: DatasetInfo, start: Any, tell: Any) -> None:
    start.wait()
    source = stream(info)
    start.wait()  # all are alive at once
    claim = source._loader.dataset.claim
    segments = [file for file in left_by(claim) if file.parent == Path("/dev/shm")]
    tell.put((claim, take(source, 1)[0].ids.tolist(), len(segments)))


def test_jobs_that_start_together_do_not_meet(info: DatasetInfo, whole: list[Batch]) -> None:
    jobs = 6
    start, tell = FORK.Barrier(jobs), FORK.Queue()
    processes = [FORK.Process(target=_construct, args=(info, start, tell)) for _ in range(jobs)]
    for process in processes:
        process.start()
    told = [tell.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len({claim for claim, _, _ in told}) == jobs
    assert all(ids == whole[0].ids.tolist() for _, ids, _ in told)
    assert all(segments >= 5 for _, _, segments in told)  # each in a name space of its own


def _only_rank_1_loads(info: DatasetInfo, rank: int, meet: str, tell: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    if rank == 1:
        tell.put(take(stream(info, rank=rank, world=2, workers=1), 2)[1].ids.tolist())
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_a_rank_waits_for_no_other(info: DatasetInfo, whole: list[Batch], tmp_path: Path) -> None:
    tell = FORK.Queue()
    ranks = [FORK.Process(target=_only_rank_1_loads, args=(info, rank, f"{tmp_path}/meet", tell)) for rank in range(2)]
    for process in ranks:
        process.start()
    assert tell.get(timeout=60) == whole[1].ids[1::2].tolist()
    for process in ranks:
        process.join()
        assert process.exitcode == 0


SCRIPT = """
    import os, sys, time
    from bigincubate.config import Augment, Data
    from bigincubate.data.dataset import open_dataset
    from bigincubate.data.streams import EvalStream, TrainStream

    info = open_dataset(sys.argv[1])
    augment = Augment(crop="pad", eval_crop=1.0)
    stream = TrainStream(info, Data(workers=2), augment, img_size=8, seed=0, batch_size=16)
    batches = stream.batches(0)
    for _ in range(70):
        next(batches)
    evaluation = iter(EvalStream(info, "val", augment, img_size=8, batch_size=8, workers=1))
    next(evaluation)
    print(stream._loader.dataset.claim, flush=True)
    if sys.argv[2] == "wait":
        time.sleep(600)
"""


def run(info: DatasetInfo, then: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(info.path), then]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_a_number_that_is_taken_is_left_to_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """By another data set; or by a signal, which made open() begin again after the file was there."""
    taken = shards.claim()
    numbers = iter([taken, taken, taken + 1])
    monkeypatch.setattr("bigincubate.data.shards.secrets.randbelow", lambda bound: next(numbers))
    assert shards.claim() == taken + 1
    assert left_by(taken)


def left_by(claim: int) -> list[Path]:
    places = (Path("/dev/shm"), runtime_dir(), runtime_dir().parent)
    return [file for place in places for file in (*place.glob(f"{claim:06}[_-]*"), *place.glob(f"{claim}.claim"))]


@pytest.fixture(scope="module")
def processes(info: DatasetInfo) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Both at once: they take their time to import."""
    started = {then: run(info, then) for then in ("end", "wait")}
    yield started
    for process in started.values():
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_process_ends_in_silence_and_leaves_nothing(processes: dict[str, subprocess.Popen[str]]) -> None:
    out, err = processes["end"].communicate(timeout=120)
    assert processes["end"].returncode == 0
    assert err == ""
    assert left_by(int(out)) == []


def test_what_a_killed_process_left_is_removed_and_nothing_of_the_living(
    info: DatasetInfo, processes: dict[str, subprocess.Popen[str]]
) -> None:
    process = processes["wait"]
    assert process.stdout is not None
    claim = int(process.stdout.readline())
    living = stream(info)
    assert left_by(claim)  # a new data set does not touch those of a living process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert any(file.parent == Path("/dev/shm") for file in left_by(claim))
    for _ in range(100):  # its workers, killed too, hold on a moment longer
        stream(info)
        if not left_by(claim):
            break
        time.sleep(0.1)
    assert left_by(claim) == []
    assert left_by(living._loader.dataset.claim)
    take(living, 2)
