"""Shards are opened and hashed seldom: a limited number stays open, and what was verified is remembered."""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_shards import flip_a_bit
from test_streams import EPOCH, FORK, SAMPLES, data, info, stream, take

from bigincubate.data import open_shards, shards, verification
from bigincubate.data.dataset import DatasetInfo, open_dataset
from bigincubate.data.file_locks import runtime_dir
from bigincubate.data.shards import Shards
from bigincubate.data.verification import VERIFIED, find_damaged_shards, hash_all_shards
from bigincubate.errors import DataError, SystemResourceError
from bigincubate.tasks.image_classification.views import LabelledImages

fixtures = (data, info)
SHARDS = 8
ORDER = random.Random(0).sample(range(SAMPLES), SAMPLES)


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> DatasetInfo:
    """A copy of which nothing was verified."""
    folder = Path(shutil.copytree(data, tmp_path / "copy"))
    (folder / VERIFIED).unlink(missing_ok=True)
    return open_dataset(folder)


@pytest.fixture(autouse=True)
def no_decoded_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "DECODED_CACHE_BYTES", 0)


def reader(info: DatasetInfo) -> Shards:
    return Shards(info, "train", LabelledImages(5))


def read_all(source: Shards, order: list[int] = ORDER) -> dict[int, bytes]:
    return {sample: source.read(sample)[0].tobytes() for sample in order}


# ------------------------------------------------------------------------------------------------ open files

opened: list[str] | None = None


def _note_open(event: str, arguments: tuple[Any, ...]) -> None:
    if opened is not None and event == "open" and str(arguments[0]).endswith(".mds"):
        opened.append(str(arguments[0]))


sys.addaudithook(_note_open)  # for good: it cannot be taken away


@contextmanager
def noted_opens() -> Iterator[list[str]]:
    global opened
    noted: list[str] = []
    opened = noted
    try:
        yield noted
    finally:
        opened = None


def open_now() -> list[str]:
    """Shards that are open in this process."""
    paths = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            paths.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:  # that of the list itself
            continue
    return [path for path in paths if ".mds" in path]


def test_shard_is_opened_once_for_all_its_samples(info: DatasetInfo) -> None:
    take(stream(info), EPOCH)  # hashes what no other test has hashed
    source = reader(info)
    with noted_opens() as noted:
        read_all(source)
    assert sorted(Counter(noted).values()) == [1] * SHARDS


def test_open_shards_are_limited_and_the_oldest_is_closed(info: DatasetInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_all(reader(info))
    monkeypatch.setattr(open_shards, "MAX_OPEN_SHARDS", 3)
    gc.collect()
    before, source, most = len(open_now()), reader(info), 0
    for sample in ORDER[:200]:
        assert source.read(sample)[0].tobytes() == expected[sample]
        most = max(most, len(open_now()) - before)
    assert most == 3
    first = [int(start) for start in source.sample_offset_per_shard]
    with noted_opens() as noted:
        for number in (0, 1, 2, 0, 1, 0, 3, 0, 1, 2):  # 3 replaces 2, which 2 then replaces
            source.read(first[number])
    names = [Path(path).parent.name for path in noted]
    assert names[-2:] == ["00003", "00002"]


@pytest.mark.parametrize(("limit", "shards"), [(1024, 256), (20_000, 512), (2, 1), (-1, 512)])
def test_open_shards_are_a_quarter_of_the_files_that_a_process_may_open(
    limit: int, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda what: (limit, limit))
    assert open_shards.max_open_shards() == shards


CLOSED = """
import gc, sys
sys.path[:0] = sys.argv[2:]
from test_shard_reading import open_now, stream, take
from bigincubate.data.dataset import open_dataset

source = stream(open_dataset(sys.argv[1]))
take(source, 3)
print(len(open_now()) > 0)
del source
gc.collect()
print(open_now())
"""


def test_shards_are_closed_with_their_data_set(info: DatasetInfo) -> None:
    """Runs in a separate process, because objects that other tests keep alive may refer to shards."""
    take(stream(info), EPOCH)  # hashes all shards, so that no thread of the other process still verifies them
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    ended = subprocess.run(
        [sys.executable, "-c", CLOSED, str(info.path), *folders], capture_output=True, text=True, check=False
    )
    assert ended.stdout.splitlines() == ["True", "[]"], ended.stderr


def _read_in_child(source: Shards, tell: Any) -> None:
    tell.put(read_all(source, ORDER[::-1]))
    source._files.close(0)
    tell.put(len(open_now()))


def test_forked_processes_share_open_shards(info: DatasetInfo) -> None:
    source, tell = reader(info), FORK.Queue()
    source.read(0), source.read(SAMPLES - 1)
    children = [FORK.Process(target=_read_in_child, args=(source, tell)) for _ in range(2)]
    for child in children:
        child.start()
    own = read_all(source)
    told = [tell.get(timeout=60) for _ in range(4)]
    for child in children:
        child.join()
    assert [one for one in told if isinstance(one, dict)] == [own, own]
    assert read_all(source) == own


def test_replaced_shard_is_hashed_when_it_is_opened_again(copy: DatasetInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    source = reader(copy)
    expected, hashed = read_all(source), counted_hashes(monkeypatch)
    shard = copy.path / "train" / "00003" / "shard.00000.mds"
    shutil.copy(shard, copy.path / "new")
    os.replace(copy.path / "new", shard)
    assert read_all(source) == expected  # from the file that is still open
    assert hashed == []
    source._files.close(3)
    assert read_all(source) == expected
    assert hashed == [str(shard)]
    flip_a_bit(shard)
    source._files.close(3)
    with pytest.raises(DataError, match=r"00003/shard\.00000\.mds is damaged"):
        read_all(source)


def test_stale_file_of_a_network_file_system_is_opened_again(
    info: DatasetInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, pread, failures = reader(info), os.pread, [errno.ESTALE, errno.EIO]
    expected = source.read(0)[0].tobytes()

    def fail_once(*arguments: Any) -> bytes:
        if failures:
            raise OSError(code := failures.pop(0), os.strerror(code))
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", fail_once)
    error = r"shard\.00000\.mds: Input/output error; check the disk or the network file system, then run the same"
    with pytest.raises(SystemResourceError, match=error):  # only once, and for no other error
        source.read(0)
    assert source.read(0)[0].tobytes() == expected
    failures[:] = [errno.ESTALE]
    assert source.read(0)[0].tobytes() == expected


# ------------------------------------------------------------------------------------------------ verified.json


def counted_hashes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    hashed: list[str] = []
    check_hash = shards.check_hash

    def counted(file: Path, *arguments: Any, **named: Any) -> None:
        hashed.append(str(file))
        check_hash(file, *arguments, **named)

    monkeypatch.setattr(shards, "check_hash", counted)
    return hashed


def tables() -> list[Path]:
    return list(runtime_dir().glob("verified-*"))


def test_restart_hashes_only_what_changed(copy: DatasetInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = counted_hashes(monkeypatch)
    expected = read_all(reader(copy))
    assert len(hashed) == SHARDS
    hashed.clear()
    gc.collect()  # the job has ended; nothing but the file remembers
    source = reader(copy)
    assert source.verified.all()
    assert read_all(source) == expected
    assert hashed == []
    shard = copy.path / "train" / "00005" / "shard.00000.mds"
    os.utime(shard, ns=(1, 1))
    assert read_all(reader(copy)) == expected
    assert hashed == [str(shard)]
    assert json.loads((copy.path / VERIFIED).read_text())["train"]["00005/shard.00000.mds"][1] == 1


@pytest.mark.parametrize("changed", ["size", "time", "inode"])
def test_shard_that_differs_in_one_respect_is_hashed_again(
    changed: str, copy: DatasetInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_all(reader(copy))
    gc.collect()  # the job has ended
    shard = copy.path / "train" / "00005" / "shard.00000.mds"
    before = shard.stat()
    if changed == "size":
        with shard.open("ab") as file:
            file.write(b"x")
    elif changed == "inode":
        shutil.copy(shard, copy.path / "new")
        os.replace(copy.path / "new", shard)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + (changed == "time")))
    after = shard.stat()
    fields = {"size": "st_size", "time": "st_mtime_ns", "inode": "st_ino"}
    assert [name for name, field in fields.items() if getattr(after, field) != getattr(before, field)] == [changed]
    hashed = counted_hashes(monkeypatch)
    with suppress(DataError):  # with another size it is damaged
        read_all(reader(copy))
    assert hashed == [str(shard)]


def _verify_all(info: DatasetInfo, start: Any, count: Any) -> None:
    check_hash = shards.check_hash

    def counted(*arguments: Any, **named: Any) -> None:
        with count.get_lock():
            count.value += 1
        check_hash(*arguments, **named)

    shards.check_hash = counted
    source = reader(info)
    start.wait()
    read_all(source)
    start.wait()  # all used the data at once


def test_ranks_of_a_node_hash_each_shard_once(copy: DatasetInfo) -> None:
    ranks = 4
    start, count = FORK.Barrier(ranks), FORK.Value("i", 0)
    processes = [FORK.Process(target=_verify_all, args=(copy, start, count)) for _ in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert count.value == SHARDS
    assert len(json.loads((copy.path / VERIFIED).read_text())["train"]) == SHARDS


def test_tables_of_ended_processes_are_removed(copy: DatasetInfo, info: DatasetInfo) -> None:
    gc.collect()
    before = set(tables())
    source = reader(copy)
    assert len(set(tables()) - before) == 1
    (mine,) = set(tables()) - before
    del source
    gc.collect()
    reader(info)
    assert mine not in tables()


def test_writers_on_several_nodes_lose_only_time(copy: DatasetInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each node adds to what the file has, and the file is replaced as a whole."""
    names = [f"{number:05}/shard.00000.mds" for number in range(SHARDS)]
    node_a, node_b = (verification.VerifiedShards(copy, "train", names) for _ in range(2))
    monkeypatch.setattr(node_b, "_stamps", np.zeros((SHARDS, 3), np.int64))
    val = verification.VerifiedShards(copy, "val", ["00000/shard.00000.mds"])
    node_a.record(0, open_shards.FileStamp(1, 2, 3))
    node_b.record(1, open_shards.FileStamp(4, 5, 6))
    val.record(0, open_shards.FileStamp(7, 8, 9))
    node_a.save()
    node_b.save()
    stored = json.loads((copy.path / VERIFIED).read_text())
    assert stored["train"] == {names[0]: [1, 2, 3], names[1]: [4, 5, 6]}
    assert stored["val"] == {"00000/shard.00000.mds": [7, 8, 9]}


@pytest.mark.parametrize(
    ("content", "warned"),
    [
        ("{", True),
        ("[]", True),
        ('{"digest": "DIGEST", "train": {}}', True),
        ('{"digest": "DIGEST", "train": {"00000/shard.00000.mds": [1, 2]}, "val": {}}', True),
        ('{"digest": "DIGEST", "train": {"00000/shard.00000.mds": [1, 2, 1e400]}, "val": {}}', True),
        ('{"digest": "of other data", "train": {}, "val": {}}', False),
    ],
)
def test_damaged_file_of_verified_shards_is_ignored(
    copy: DatasetInfo, content: str, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hashed = counted_hashes(monkeypatch)
    (copy.path / VERIFIED).write_text(content.replace("DIGEST", copy.digest))
    read_all(reader(copy))
    assert len(hashed) == SHARDS
    assert ("verified.json is damaged and ignored" in caplog.text) == warned
    assert len(json.loads((copy.path / VERIFIED).read_text())["train"]) == SHARDS


def test_folder_that_cannot_be_written_is_hashed_by_every_job(
    copy: DatasetInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    hashed = counted_hashes(monkeypatch)
    monkeypatch.setattr(verification, "write_text", refuse)
    source = reader(copy)
    read_all(source)
    read_all(reader(copy))  # of the same job: the first one is still open
    assert len(hashed) == SHARDS
    del source
    gc.collect()
    read_all(reader(copy))
    assert len(hashed) == 2 * SHARDS
    assert not (copy.path / VERIFIED).exists()


def test_damage_that_leaves_no_trace_is_found_by_hashing_everything(copy: DatasetInfo) -> None:
    source = reader(copy)
    read_all(source)
    assert list(find_damaged_shards(copy)) == []
    shard = copy.path / "train" / "00003" / "shard.00000.mds"
    status = shard.stat()
    flip_a_bit(shard)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert reader(copy).verified.all()  # it is taken for the shard that was verified
    with pytest.raises(DataError, match=r"00003/shard\.00000\.mds is damaged: SHA-256"):
        hash_all_shards(copy)
    with pytest.raises(DataError, match=r"00003/shard\.00000\.mds is damaged"):
        read_all(reader(copy))  # from now on without being asked
    stored = json.loads((copy.path / VERIFIED).read_text())
    assert len(stored["train"]) == SHARDS - 1
    assert len(stored["val"]) == 1
