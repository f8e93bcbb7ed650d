"""Shards: damage is named, downloads happen once, jobs on a node are independent, killed processes leave nothing."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_streams import EPOCH, FORK, data, eval_stream, info, stream, take, whole

from bigincubate.data import prepare as preparing
from bigincubate.data import shards
from bigincubate.data.batch import Batch
from bigincubate.data.dataset import DatasetInfo, open_dataset
from bigincubate.data.file_locks import runtime_dir
from bigincubate.data.open_shards import OpenShard
from bigincubate.data.shared_memory import claim_memory_prefix
from bigincubate.errors import DataError
from bigincubate.tasks.image_classification import views
from bigincubate.tasks.image_classification.views import LabelledImages

fixtures = (data, info, whole)

# ------------------------------------------------------------------------------------------------ damage


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data, tmp_path / "copy"))


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def fault_of(run: Callable[[], Any]) -> str:
    with pytest.raises(DataError) as fault:
        run()
    assert "\n" not in str(fault.value)
    return str(fault.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_shard_with_a_flipped_bit_is_named(copy: Path, workers: int) -> None:
    info = open_dataset(copy)
    shard = copy / "train" / "00003" / "shard.00000.mds"
    flip_a_bit(shard)
    message = fault_of(lambda: take(stream(info, workers), EPOCH))
    assert str(shard) in message
    assert len([word for word in message.replace(",", "").replace(";", "").split() if len(word) == 64]) == 2
    flip_a_bit(copy / "val" / "00000" / "shard.00000.mds")
    evaluation = eval_stream(info, batch_size=8, workers=workers)
    assert "val/00000/shard.00000.mds is damaged" in fault_of(lambda: list(evaluation))


def test_shard_is_hashed_once_for_all_workers_and_epochs(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, check_hash = FORK.Value("i", 0), shards.check_hash

    def counted(*arguments: Any, **named: Any) -> None:
        with count.get_lock():
            count.value += 1
        check_hash(*arguments, **named)

    monkeypatch.setattr(shards, "check_hash", counted)
    take(stream(open_dataset(copy), workers=2), EPOCH + 20)
    assert count.value == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_missing_shard_is_named(copy: Path, workers: int) -> None:
    info = open_dataset(copy)
    (copy / "train" / "00005" / "shard.00000.mds").unlink()
    message = fault_of(lambda: take(stream(info, workers), EPOCH))
    assert "train/00005/shard.00000.mds: No such file" in message


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    for row in range(30):
        (tmp_path / "tree" / f"{row % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), row).save(tmp_path / "tree" / f"{row % 2}" / f"{row}.png")
    (tmp_path / "tree" / "0" / "9.png").write_bytes(b"broken")
    monkeypatch.setattr(preparing, "decode_image", lambda *_, **__: None)  # as if it were fine when it was prepared
    monkeypatch.setattr(preparing, "CHUNK_SAMPLES", 10)
    info = preparing.prepare_dataset(str(tmp_path / "tree"), tmp_path / "data")
    split = "train" if b"broken" in b"".join(f.read_bytes() for f in (info.path / "train").rglob("*.mds")) else "val"
    message = fault_of(lambda: list(eval_stream(info, split, batch_size=4, workers=workers)))
    shard = next(file for file in info.path.rglob("*.mds") if b"broken" in file.read_bytes())
    row = next(row for row in range(30) if b"broken" in OpenShard(str(shard)).read(row))
    sample = int(message.split(" sample ")[1].split()[0])
    assert message.startswith(f"{split} sample {sample} (row {row} of {shard}) is not a readable labelled image")


# ------------------------------------------------------------------------------------------------ remote


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_shards_are_downloaded_once(data: Path, whole: list[Batch], tmp_path: Path, workers: int) -> None:
    cache = tmp_path / "cache"
    info = open_dataset(cache, remote=str(data))
    assert info.digest == open_dataset(data).digest
    assert not list(cache.rglob("*.mds"))
    ranks = [stream(info, workers, remote=str(data), rank=rank, world=2).batches(0) for rank in range(2)]
    for expected in whole[:EPOCH]:
        for rank, batches in enumerate(ranks):
            assert torch.equal(next(batches)["images"], expected["images"][rank::2])
    assert len(list(cache.rglob("*.mds"))) == 8  # of the training part
    assert {file.name for file in cache.rglob("*.mds*")} == {"shard.00000.mds"}  # nothing half done
    list(eval_stream(info, batch_size=8, workers=workers, remote=str(data)))
    open_dataset(cache)  # complete by now


def test_damaged_remote_shard_is_not_kept(copy: Path, tmp_path: Path) -> None:
    info = open_dataset(tmp_path / "cache", remote=str(copy))
    flip_a_bit(copy / "train" / "00003" / "shard.00000.mds")
    message = fault_of(lambda: take(stream(info, remote=str(copy)), EPOCH))
    assert f"{copy}/train/00003/shard.00000.mds is damaged" in message
    assert not (tmp_path / "cache" / "train" / "00003" / "shard.00000.mds").exists()


def test_remote_without_data_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streaming.base.util.sleep", lambda seconds: None)
    assert "cannot download" in fault_of(lambda: open_dataset(tmp_path / "cache", remote=str(tmp_path / "nowhere")))


# ------------------------------------------------------------------------------------------------ decoded samples


@pytest.mark.parametrize(
    ("room", "times"), [(64 << 20, 1), (100 * shards.PER_IMAGE_OVERHEAD, 2)], ids=["small", "large"]
)
def test_small_split_is_decoded_once_and_large_split_every_time(
    info: DatasetInfo, room: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "DECODED_CACHE_BYTES", room)
    decoded: list[Any] = []
    decode = views.decode_image

    def decode_and_count(data: Any, **options: Any) -> Any:
        decoded.append(data)
        return decode(data, **options)

    monkeypatch.setattr(views, "decode_image", decode_and_count)
    split = shards.Shards(info, "train", LabelledImages(5))
    first, second = ([split.read(sample) for sample in range(split.size)] for _ in range(2))
    assert [(image.tobytes(), label) for image, label in first] == [(i.tobytes(), label) for i, label in second]
    assert len(decoded) == times * split.size
    assert len(split._decoded) == (split.size if times == 1 else 0)


def test_cached_image_has_only_pixels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "x" * 50_000  # a description
    for split in ("train", "val"):
        for name in ("one", "two"):
            (tmp_path / "tree" / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), "red").save(
                tmp_path / "tree" / split / name / "a.jpg", exif=exif, icc_profile=b"y" * 9000
            )
    info = preparing.prepare_dataset(str(tmp_path / "tree"), tmp_path / "data")
    split = shards.Shards(info, "train", LabelledImages(2))
    read, (cached, _) = split.read(0)[0], split.read(0)
    assert read.info["exif"]
    assert type(cached) is Image.Image
    assert cached.info == {}
    assert cached.tobytes() == read.tobytes()


# ------------------------------------------------------------------------------------------------ several jobs


def _construct(info: DatasetInfo, start: Any, tell: Any) -> None:
    start.wait()
    source = stream(info)
    start.wait()  # all are alive at once
    claim = source._loader.dataset.memory_prefix
    segments = [file for file in left_by(claim) if file.parent == Path("/dev/shm")]
    tell.put((claim, take(source, 1)[0].sample_ids.tolist(), len(segments)))


def test_jobs_that_start_together_share_no_memory(info: DatasetInfo, whole: list[Batch]) -> None:
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
    assert all(ids == whole[0].sample_ids.tolist() for _, ids, _ in told)
    assert all(segments >= 5 for _, _, segments in told)  # each in a name space of its own


def _only_rank_1_loads(info: DatasetInfo, rank: int, meet: str, tell: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    if rank == 1:
        tell.put(take(stream(info, rank=rank, world=2, workers=1), 2)[1].sample_ids.tolist())
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_rank_does_not_wait_for_others(info: DatasetInfo, whole: list[Batch], tmp_path: Path) -> None:
    tell = FORK.Queue()
    ranks = [FORK.Process(target=_only_rank_1_loads, args=(info, rank, f"{tmp_path}/meet", tell)) for rank in range(2)]
    for process in ranks:
        process.start()
    assert tell.get(timeout=60) == whole[1].sample_ids[1::2].tolist()
    for process in ranks:
        process.join()
        assert process.exitcode == 0


SCRIPT = """
    import os, sys, time
    from bigincubate.config import AugmentConfig, DataConfig
    from bigincubate.data.dataset import open_dataset
    from bigincubate.data.streams import EvalStream, TrainStream
    from bigincubate.tasks.image_classification.views import EvalTransform, TrainTransform

    info = open_dataset(sys.argv[1])
    augment = AugmentConfig(crop="pad", eval_crop=1.0)
    transform = TrainTransform(augment, 8, seed=0, classes=5)
    stream = TrainStream(info, DataConfig(workers=2), transform, seed=0, batch_size=16)
    batches = stream.batches(0)
    for _ in range(70):
        next(batches)
    evaluation = iter(EvalStream(info, "val", EvalTransform(augment, 8, classes=5), batch_size=8, workers=1))
    next(evaluation)
    print(stream._loader.dataset.memory_prefix, flush=True)
    if sys.argv[2] == "wait":
        time.sleep(600)
"""


def run(info: DatasetInfo, then: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(info.path), then]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_memory_prefix_in_use_is_not_claimed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is used by another data set, or open() was repeated after a signal and finds the file it made."""
    taken, release = claim_memory_prefix()
    numbers = iter([taken, taken, taken + 1])
    monkeypatch.setattr("bigincubate.data.shared_memory.secrets.randbelow", lambda bound: next(numbers))
    other = claim_memory_prefix()
    assert other.prefix == taken + 1
    assert left_by(taken)
    other.release()
    release()
    assert not left_by(taken)


def test_streams_that_are_gone_leave_no_open_files_and_no_memory(info: DatasetInfo) -> None:
    """Even if they were stopped in the middle, as training is by a signal or an error."""

    def read_some() -> int:
        train = stream(info)
        train._loader.dataset.predownload = 16  # so that the threads that read ahead do not reach the end by themselves
        next(train.batches(0))
        return train._loader.dataset.memory_prefix

    def open_files() -> list[str]:
        files = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        return sorted(os.readlink(file) for file in files if file.is_symlink())  # not that of the listing itself

    def wait_for(condition: Callable[[], bool]) -> bool:
        """Wait for the threads that read ahead, which end by themselves."""
        deadline = time.monotonic() + 30
        while not condition() and time.monotonic() < deadline:
            gc.collect()  # a cycle may hold the data set
            time.sleep(0.01)
        return condition()

    first = read_some()  # the first one starts what stays until the end of the process
    assert wait_for(lambda: not left_by(first))
    before = open_files()
    second = read_some()
    assert wait_for(lambda: not left_by(second))
    assert open_files() == before


def left_by(claim: int) -> list[Path]:
    places = (Path("/dev/shm"), runtime_dir(), runtime_dir().parent)
    return [file for place in places for file in (*place.glob(f"{claim:06}[_-]*"), *place.glob(f"{claim}.claim"))]


@pytest.fixture(scope="module")
def processes(info: DatasetInfo) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Start both at the same time: imports take long."""
    started = {then: run(info, then) for then in ("end", "wait")}
    yield started
    for process in started.values():
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_process_that_ends_prints_nothing_and_leaves_nothing(processes: dict[str, subprocess.Popen[str]]) -> None:
    out, err = processes["end"].communicate(timeout=120)
    assert processes["end"].returncode == 0
    assert err == ""
    assert left_by(int(out)) == []


def test_memory_of_killed_process_is_removed_and_of_live_process_kept(
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
    assert left_by(living._loader.dataset.memory_prefix)
    take(living, 2)
