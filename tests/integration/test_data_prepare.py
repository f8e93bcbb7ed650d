"""Anything -> MDS shards: once, completely, the same bits however it went, and nothing run that came with the data."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from image_trees import read_contents as contents
from image_trees import read_samples as samples
from image_trees import write_tree
from PIL import Image

from bigincubate.data import prepare as preparing
from bigincubate.data.dataset import open_dataset
from bigincubate.data.prepare import prepare_dataset
from bigincubate.data.samples import Sample
from bigincubate.data.sources import read_source, safe_unpickle
from bigincubate.data.splits import split_train_val
from bigincubate.errors import DataError

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("tree") / "images", 70)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "CHUNK_SAMPLES", 32)


# ------------------------------------------------------------------------------------------------ sources


def test_class_folders_are_split_by_class_and_kept_byte_by_byte(tree: Path, tmp_path: Path) -> None:
    info = prepare_dataset(str(tree), tmp_path / "out", val_fraction=0.3)
    assert info == open_dataset(tmp_path / "out")
    assert (info.schema.metadata["classes"], info.samples) == (["a", "b", "c"], {"train": 147, "val": 63})
    stored = {split: samples(tmp_path / "out", split) for split in ("train", "val")}
    assert [label for _, label in stored["val"]].count(1) == 21
    files = {
        (file.read_bytes(), info.schema.metadata["classes"].index(file.parent.name)) for file in tree.rglob("*.png")
    }
    assert files == {*stored["train"], *stored["val"]}
    labels = [label for _, label in stored["train"]]
    assert sum(a != b for a, b in pairwise(labels)) > 50  # not class by class


def test_validation_folder_is_used_as_it_is(tmp_path: Path) -> None:
    write_tree(tmp_path / "tree" / "train", 5)
    write_tree(tmp_path / "tree" / "validation", 2, "ab")
    (tmp_path / "tree" / "train" / "a" / "notes.txt").write_text("no image")
    assert prepare_dataset(str(tmp_path / "tree"), tmp_path / "out").samples == {"train": 15, "val": 4}


FIRST_HELD_OUT = [552, 1722, 536, 1667]  # the split must be the same with any version of any library


def test_digits_hold_out_a_fixed_fifth_of_each_digit(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    info = prepare_dataset("digits", tmp_path / "digits")
    assert info.samples == {"train": 1437, "val": 360}
    source = read_source("digits", 0.2)
    target = load_digits().target
    for digit in range(10):
        rows = {int(row) for row in np.flatnonzero(target == digit)}
        kept, held = ([int(s.name) for s in source.splits[split] if s.label == digit] for split in ("train", "val"))
        assert {*kept, *held} == rows
        assert len(kept) + len(held) == len(rows)
        assert len(held) == pytest.approx(len(rows) / 5, abs=1)
    assert [int(sample.name) for sample in source.splits["val"][:4]] == FIRST_HELD_OUT
    stored = {(np.asarray(Image.open(io.BytesIO(png))).tobytes(), n) for png, n in samples(tmp_path / "digits", "val")}
    assert stored == {(np.asarray(sample.image).tobytes(), sample.label) for sample in source.splits["val"]}
    first = source.splits["val"][0]
    assert np.array_equal(np.asarray(first.image), np.round(load_digits().images[int(first.name)] / 16 * 255))


def test_development_digits_never_contain_the_held_out_part() -> None:
    held_out = {sample.name for sample in read_source("digits", 0.2).splits["val"]}
    development = read_source("digits-dev", 0.2).splits
    assert {split: len(part) for split, part in development.items()} == {"train": 1149, "val": 288}
    assert not held_out & {sample.name for part in development.values() for sample in part}


def test_held_out_shares_follow_the_class_sizes() -> None:
    rows = [Sample(f"{n}", label, "") for label, size in enumerate((10, 5, 3)) for n in range(size)]
    splits = split_train_val(rows, 0.2)
    assert [[s.label for s in splits["val"]].count(label) for label in range(3)] == [2, 1, 1]
    assert len(splits["train"]) == 14


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda root: "nowhere",
            "no such source: /.*/nowhere; expected a file, a folder, or digits, digits-dev, made-up$",
        ),
        (lambda root: (root / "empty").mkdir() or "empty", "no images in"),
        (lambda root: (root / "tree" / "a").mkdir(parents=True) or "tree", "no images in"),
        (lambda root: (root / "notes.txt").write_text("x") and "notes.txt", "unknown kind of source"),
    ],
)
def test_empty_source_gives_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message) as fault:
        prepare_dataset(make(tmp_path), tmp_path / "out")
    assert "\n" not in str(fault.value)


# ------------------------------------------------------------------------------------------------ once, the same


def test_result_does_not_depend_on_the_number_of_processes(tree: Path, tmp_path: Path, small_chunks: None) -> None:
    seen: list[tuple[int, int]] = []
    one = prepare_dataset(str(tree), tmp_path / "one", on_progress=lambda *progress: seen.append(progress))
    three = prepare_dataset(str(tree), tmp_path / "three", jobs=3)
    assert one.digest == three.digest
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert seen[0] == (0, 210)
    assert seen[-1] == (210, 210)
    assert len(seen) == 1 + 6 + 2  # the start, then every chunk of 168 and 42 samples


def _die_at_the_hundredth_image(source: str, out: Path, jobs: int) -> None:
    count = FORK.Value("i", 0)

    def decode_or_die(data: bytes, **_: object) -> None:
        with count.get_lock():
            count.value += 1
            if count.value == 100:
                os.killpg(0, signal.SIGKILL)

    os.setpgid(0, 0)
    preparing.decode_image = decode_or_die  # type: ignore[assignment]
    prepare_dataset(source, out, jobs=jobs)


@pytest.mark.parametrize("jobs", [1, 3])
def test_killed_preparation_resumes_after_the_finished_chunks(
    tree: Path, tmp_path: Path, small_chunks: None, jobs: int
) -> None:
    prepare_dataset(str(tree), tmp_path / "whole")
    child = FORK.Process(target=_die_at_the_hundredth_image, args=(str(tree), tmp_path / "out", jobs))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    records = [json.loads(file.read_text()) for file in (tmp_path / "out" / ".chunks").glob("*.json")]
    kept = sum(len(record["contents"]) for record in records)
    assert any((tmp_path / "out").glob(".tmp-*"))  # it died inside a chunk
    seen: list[int] = []
    prepare_dataset(str(tree), tmp_path / "out", jobs=jobs, on_progress=lambda done, _: seen.append(done))
    assert seen[0] == kept
    assert kept or jobs > 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_worker_does_not_outlive_its_parent_nor_keep_the_lock(tree: Path, tmp_path: Path, small_chunks: None) -> None:
    def die_alone(source: str, out: Path) -> None:
        def die_after_the_first_chunk(done: int, total: int) -> None:
            if done:
                os.kill(os.getpid(), signal.SIGKILL)

        os.setpgid(0, 0)
        prepare_dataset(source, out, jobs=2, on_progress=die_after_the_first_chunk)

    child = FORK.Process(target=die_alone, args=(str(tree), tmp_path / "out"))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    second = FORK.Process(target=prepare_dataset, args=(str(tree), tmp_path / "out"))
    second.start()
    second.join(20)
    second.kill()  # where it still waits for the lock
    assert child.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    assert second.exitcode == 0


def _prepare_and_tell(source: str, out: Path, tell: Any) -> None:
    seen: list[int] = []
    info = prepare_dataset(source, out, on_progress=lambda done, _: seen.append(done))
    tell.put((info.digest, len(seen)))


def test_second_preparation_waits_for_the_first(tree: Path, tmp_path: Path, small_chunks: None) -> None:
    tell = FORK.Queue()
    both = [FORK.Process(target=_prepare_and_tell, args=(str(tree), tmp_path / "out", tell)) for _ in range(2)]
    for process in both:
        process.start()
    (first, seen_first), (second, seen_second) = tell.get(timeout=60), tell.get(timeout=60)
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert first == second
    assert sorted((seen_first, seen_second)) == [0, 9]


def test_folder_of_another_source_is_refused(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_dataset(str(tree), out)
    before = contents(out)
    prepare_dataset(str(tree), out)  # the same: nothing to do
    with pytest.raises(DataError, match="holds data from another source"):
        prepare_dataset("digits", out)
    with pytest.raises(DataError, match="holds data from another source"):
        prepare_dataset(str(tree), out, val_fraction=0.5)
    assert contents(out) == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("do not delete")
    with pytest.raises(DataError, match="holds other files"):
        prepare_dataset(str(tree), tmp_path / "thesis")
    assert [file.name for file in (tmp_path / "thesis").iterdir()] == ["chapter1.tex"]


# ------------------------------------------------------------------------------------------------ CIFAR


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes as Python 2 did, and names numpy's parts as it then did: how CIFAR was published."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)
    write: Callable[[bytes], Any]

    def save_text(self, value: str | bytes) -> None:
        data = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)

    def save_global(self, value: Any, name: str | None = None) -> None:
        module = "numpy.core.multiarray" if value.__name__ == "_reconstruct" else value.__module__
        self.write(pickle.GLOBAL + f"{module}\n{value.__name__}\n".encode())

    dispatch[str] = dispatch[bytes] = save_text
    dispatch[type] = dispatch[type(len)] = save_global


def as_python2(value: Any) -> bytes:
    out = io.BytesIO()
    Python2Pickler(out, protocol=2).dump(value)
    return out.getvalue()


def cifar100(rows: int = 20) -> tuple[np.ndarray, dict[str, bytes]]:
    pixels = np.random.default_rng(1).integers(0, 256, (rows, 3072), dtype=np.uint8)
    part = {"data": pixels, "fine_labels": [n % 4 for n in range(rows)], "coarse_labels": [0] * rows}
    names = {"fine_label_names": ["apple", "bear", "cloud", "dinosaur"]}
    return pixels, {"train": as_python2(part), "test": as_python2(part), "meta": as_python2(names)}


def write_archive(file: Path, members: dict[str, bytes], folder: str) -> Path:
    with tarfile.open(file, "w:gz") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file


def test_cifar_100_packed_and_unpacked_without_loss(tmp_path: Path) -> None:
    pixels, members = cifar100()
    archive = write_archive(tmp_path / "cifar-100-python.tar.gz", members, "cifar-100-python")
    packed = prepare_dataset(str(archive), tmp_path / "packed")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    unpacked = prepare_dataset(str(tmp_path / "cifar-100-python"), tmp_path / "unpacked")
    assert packed.digest == unpacked.digest
    assert packed.schema.metadata["classes"] == ["apple", "bear", "cloud", "dinosaur"]
    expected = {(row.reshape(3, 32, 32).transpose(1, 2, 0).tobytes(), n % 4) for n, row in enumerate(pixels)}
    stored = samples(tmp_path / "packed", "train")
    assert {(np.asarray(Image.open(io.BytesIO(png))).tobytes(), label) for png, label in stored} == expected


def test_cifar_10_is_read_from_its_five_batches(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    part = {b"data": np.zeros((4, 3072), np.uint8), b"labels": [0, 1, 1, 0]}
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(pickle.dumps(part, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"plane", b"car"]}, protocol=2))
    info = prepare_dataset(str(folder), tmp_path / "out")
    assert (info.schema.metadata["classes"], info.samples) == (["plane", "car"], {"train": 20, "val": 4})


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def test_archive_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    _, members = cifar100()
    evil = pickle.dumps({"data": Evil(tmp_path / "ran")}, protocol=2)
    archive = write_archive(tmp_path / "evil.tar.gz", {**members, "train": evil}, "cifar-100-python")
    with pytest.raises(DataError, match=r"refused: .*(posix|os)\.system"):
        prepare_dataset(str(archive), tmp_path / "out")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["eval", "exec", "getattr", "open", "__import__"])
def test_unpickler_builds_no_function_of_python_itself(name: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match=rf"builtins\.{name}"):
        safe_unpickle(f"cbuiltins\n{name}\n(tR.".encode())


def test_damaged_archive_is_named(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "cifar.tar.gz", cifar100()[1], "cifar-100-python")
    archive.write_bytes(archive.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"cifar\.tar\.gz is damaged"):
        prepare_dataset(str(archive), tmp_path / "out")


# ------------------------------------------------------------------------------------------------ what is there


@pytest.fixture
def prepared(tree: Path, tmp_path: Path) -> Path:
    prepare_dataset(str(tree), tmp_path / "data")
    return tmp_path / "data"


def point_shard_at(folder: Path, name: str) -> None:
    file = folder / "train" / "index.json"
    index = json.loads(file.read_text())
    index["shards"][0]["raw_data"]["basename"] = name
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "00000/../../outside"])
def test_index_that_leads_outside_is_refused(prepared: Path, name: str) -> None:
    point_shard_at(prepared, name)
    with pytest.raises(DataError, match="lies outside its folder"):
        open_dataset(prepared)


def test_link_that_leads_outside_is_refused(prepared: Path, tmp_path: Path) -> None:
    shutil.move(prepared / "train" / "00000", tmp_path / "outside")
    (prepared / "train" / "00000").symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match="lies outside its folder"):
        open_dataset(prepared)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("train/index.json", lambda data: data.replace(b'"samples": 168', b'"samples": 167'), "index.json is damaged"),
        ("train/index.json", lambda data: data + b" ", "index.json is damaged"),
        ("train/00000/shard.00000.mds", lambda data: data[:-1], "shard.00000.mds is damaged"),
        ("dataset.json", lambda data: data.replace(b'"a"', b'"x"'), "dataset.json is damaged"),
        ("dataset.json", lambda data: data[:40], "not a JSON object"),
        ("dataset.json", lambda data: b"{}", "description.* is damaged"),
    ],
)
def test_damaged_data_is_named(prepared: Path, file: str, change: Any, message: str) -> None:
    data = (prepared / file).read_bytes()
    assert change(data) != data
    (prepared / file).write_bytes(change(data))
    with pytest.raises(DataError, match=message) as fault:
        open_dataset(prepared)
    assert "\n" not in str(fault.value)


def test_missing_description_says_what_is_there_instead(prepared: Path, tree: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    prepare_dataset(str(tree), whole, partition=lambda train: [list(train[::2]), list(train[1::2])])
    (tmp_path / "my file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / ".preparing.json").write_text("{}")
    shutil.rmtree(whole / "parts" / "01")
    cases = [
        (
            tmp_path / "dat",
            f"no such folder (did you mean {tmp_path}/data?); prepare it with: bigincubate data prepare",
        ),
        (tmp_path / "my file", f"no data in '{tmp_path}/my file': it is not a folder"),
        (tmp_path / "empty", "the folder is empty; prepare it with: bigincubate data prepare SOURCE --out"),
        (tmp_path / "unfinished", "it is not complete; run the same"),
        (whole / "parts" / "01", f"part 01 of {whole} is not here; copy it"),
        (tree, "it holds a, b, c, not prepared data; if these are images, prepare them with: bigincubate data prepare"),
        (tmp_path, f"it is not prepared data, but {tmp_path}/data, {whole} is"),
    ]
    for folder, says in cases:
        with pytest.raises(DataError) as fault:
            open_dataset(folder)
        assert says in str(fault.value)
    (whole / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"dataset\.json is missing next to the samples; copy it from where"):
        open_dataset(whole)
    shutil.rmtree(whole / "train")
    shutil.rmtree(whole / "val")
    with pytest.raises(DataError, match=r"dataset\.json is missing next to the samples"):
        open_dataset(whole)  # a site that has only one partition


def test_describing_data_needs_neither_torch_nor_streaming(prepared: Path) -> None:
    script = (
        "import sys; from bigincubate.data.dataset import open_dataset; open_dataset(sys.argv[1]);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'streaming', 'numpy', 'PIL')))"
    )
    assert subprocess.run([sys.executable, "-c", script, str(prepared)]).returncode == 0
