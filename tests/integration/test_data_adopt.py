"""`data adopt`: shards of streaming's own writer are used without rewriting, and are checked like prepared data."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Command, hold_step, run
from image_trees import read_contents, read_samples
from mds_files import COLUMNS, Samples, make_samples, shard_sizes, write_mds
from PIL import Image
from test_streams import eval_stream, same, stream, take

from bigincubate.config import load_recipe
from bigincubate.data.adopt import adopt_dataset
from bigincubate.data.chunks import write_chunk, write_description
from bigincubate.data.dataset import DatasetInfo, open_dataset
from bigincubate.data.images import LABELLED_IMAGE_COLUMNS, decode_image, labelled_image_schema
from bigincubate.data.local_staging import use_local_cache
from bigincubate.data.shards import Shards
from bigincubate.data.verification import find_damaged_shards
from bigincubate.errors import BigincubateError, ConfigError, DataError
from bigincubate.tasks.image_classification.views import LabelledImages

Called = Callable[..., tuple[int, str, str]]
NAMES = {"image": "photo", "label": "y"}
TRAIN, VAL = make_samples(70), make_samples(20, seed=1)


def write_both(folder: Path, **options: Any) -> Path:
    for split, samples in (("train", TRAIN), ("val", VAL)):
        write_mds(folder / split, samples, **options)
    return folder


@pytest.fixture
def mds(tmp_path: Path) -> Path:
    return write_both(tmp_path / "mds")


def adopt(mds: Path, out: Path | None = None, **options: Any) -> DatasetInfo:
    return adopt_dataset(mds, out, **{"columns": NAMES, **options})


def fault_of(call: Callable[[], Any], kind: type[BigincubateError] = DataError) -> str:
    with pytest.raises(kind) as fault:
        call()
    assert "\n" not in str(fault.value)
    return str(fault.value)


def read_split(info: DatasetInfo, split: str, **options: Any) -> list[tuple[bytes, int]]:
    decoder = LabelledImages(len(info.schema.metadata["classes"]))
    shards = Shards(info, split, decoder, **options)
    return [(image.tobytes(), label) for image, label in map(shards.read, range(info.samples[split]))]


def pixels_of(samples: Samples) -> list[tuple[bytes, int]]:
    return [(decode_image(image).tobytes(), label) for image, label in samples]


def change_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def shard_file(folder: Path) -> Path:
    return sorted(file for file in folder.iterdir() if file.name.startswith("shard."))[1]


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("compression", [None, "zstd:7", "gz", "br", "snappy"])
def test_shards_are_read_as_they_are(tmp_path: Path, compression: str | None) -> None:
    mds = write_both(tmp_path / "mds", compression=compression, hashes=["sha1", "xxh64"] if compression else None)
    before = read_contents(mds)
    info = adopt(mds, jobs=2)
    assert info.path == mds / "adopted"
    assert info.samples == {"train": 70, "val": 20}
    assert info.schema.metadata["classes"] == ["0", "1", "2"]
    for split, samples in (("train", TRAIN), ("val", VAL)):
        assert read_split(info, split) == pixels_of(samples)
    after = read_contents(mds)
    assert {name: after[name] for name in before} == before
    copies = [name for name in after if name.endswith(".mds") and name.startswith("adopted")]
    assert len(copies) == (len(shard_sizes(mds / "train")) + len(shard_sizes(mds / "val")) if compression else 0)
    assert list(find_damaged_shards(info)) == []
    if compression:
        change_a_byte(shard_file(mds / "val"))
        assert [file for file, _ in find_damaged_shards(info)] == [shard_file(mds / "val")]


@pytest.mark.parametrize("encoding", ["jpeg", "png", "pil"])
def test_images_of_pillow_are_read(tmp_path: Path, encoding: str) -> None:
    def describe(number: int, image: bytes, label: int) -> dict[str, Any]:
        return {"image": Image.open(io.BytesIO(image)).convert("RGB"), "label": label}

    columns = {"image": encoding, "label": "int"}
    mds = write_both(tmp_path / "mds", columns=columns, describe=describe, compression=None)
    found = read_split(adopt_dataset(mds), "train")
    if encoding == "jpeg":
        expected = [decode_image(image).tobytes() for image, _ in read_samples_as_stored(mds)]
        assert [image for image, _ in found] == expected
    else:
        assert found == pixels_of(TRAIN)


def read_samples_as_stored(mds: Path) -> Samples:
    from streaming import StreamingDataset

    data = StreamingDataset(local=str(mds), split="train", shuffle=False, batch_size=1)
    images = []
    for row in range(len(data)):
        file = io.BytesIO()
        data[row]["image"].save(file, "PNG")
        images.append((file.getvalue(), int(data[row]["label"])))
    return images


@pytest.mark.parametrize("encoding", ["str", "str_int", "int", "int8", "uint64"])
def test_labels_of_all_encodings_are_read(tmp_path: Path, encoding: str) -> None:
    names = ["ash", "birch", "cedar"]

    def describe(number: int, image: bytes, label: int) -> dict[str, Any]:
        value = names[label] if encoding == "str" else label
        return {"photo": image, "y": getattr(np, encoding)(value) if encoding in ("int8", "uint64") else value}

    columns = {"y": encoding, "photo": "bytes"}
    mds = write_both(tmp_path / "mds", columns=columns, describe=describe)
    (tmp_path / "classes.txt").write_text("\n".join(names) + "\n")
    if encoding == "str":
        assert "--classes FILE" in fault_of(lambda: adopt(mds), ConfigError)
    info = adopt(mds, classes=tmp_path / "classes.txt")
    assert info.schema.metadata["classes"] == names
    assert read_split(info, "train") == pixels_of(TRAIN)


def as_prepared(folder: Path, mds: Path) -> DatasetInfo:
    """Write the samples of `mds` as `data prepare` does, uncompressed and in shards of the same sizes."""
    schema, chunks = labelled_image_schema(["0", "1", "2"]), {}
    for split, samples in (("train", TRAIN), ("val", VAL)):
        (folder / split).mkdir(parents=True)
        rest = iter(samples)
        for number, size in enumerate(shard_sizes(mds / split)):
            records = ({"image": image, "label": label} for image, label in islice(rest, size))
            write_chunk(folder / split / f"{number:05}", LABELLED_IMAGE_COLUMNS, records)
        chunks[split] = sorted((folder / split).iterdir())
    write_description(folder, schema, chunks, {}, {})
    return open_dataset(folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_batches_are_those_of_the_same_samples_prepared(mds: Path, tmp_path: Path, workers: int) -> None:
    assert len(shard_sizes(mds / "train")) > 3
    adopted, prepared = adopt(mds), as_prepared(tmp_path / "prepared", mds)
    expected = take(stream(prepared), 11)
    assert same(take(stream(adopted, workers), 11), expected)
    ranks = [take(stream(adopted, rank=rank, world=2), 11, step=0) for rank in range(2)]
    for rank, batches in enumerate(ranks):
        pairs = zip(batches, expected, strict=True)
        assert all(torch.equal(own["images"], whole["images"][rank::2]) for own, whole in pairs)
    assert same(take(stream(adopted), 4, step=7), expected[7:])
    evaluated = [list(eval_stream(info, batch_size=8)) for info in (adopted, prepared)]
    assert same(*evaluated)


def test_local_cache_and_remote_have_their_own_copies(mds: Path, tmp_path: Path) -> None:
    info = adopt(mds)
    recipe = load_recipe("digits", [f"data.path={info.path}", f"data.local_cache={tmp_path / 'disk'}"])
    with use_local_cache(recipe, info) as (staged, copy):
        assert read_split(copy, "train", remote=staged.data.remote) == pixels_of(TRAIN)
        assert list((tmp_path / "disk").rglob("*.mds"))
    assert not list(info.path.rglob("*.mds"))
    downloaded = open_dataset(tmp_path / "download", remote=str(info.path))
    assert downloaded.digest == info.digest
    assert read_split(downloaded, "val", remote=str(info.path)) == pixels_of(VAL)
    assert {file.suffix for file in (tmp_path / "download").rglob("*.*") if file.is_file()} == {".json", ".mds"}


def test_moved_data_is_found(mds: Path, tmp_path: Path) -> None:
    adopt(mds)
    mds.rename(tmp_path / "moved")
    assert read_split(open_dataset(tmp_path / "moved" / "adopted"), "train") == pixels_of(TRAIN)


def test_links_to_shards_are_followed(mds: Path, tmp_path: Path) -> None:
    """The files in the cache of the Hugging Face Hub are symbolic links."""
    for file in [file for file in mds.rglob("*") if file.is_file()]:
        link = tmp_path / "links" / file.relative_to(mds)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    info = adopt(tmp_path / "links")
    assert read_split(info, "train") == pixels_of(TRAIN)
    assert list(find_damaged_shards(info)) == []


# ------------------------------------------------------------------------------------------------ training


def test_killed_run_resumes_with_bitwise_equal_weights(
    digits: Path, harness: Callable[..., Any], tmp_path: Path
) -> None:
    for split in ("train", "val"):
        write_mds(tmp_path / "mds" / split, read_samples(digits, split), size_limit=20_000)
    info = adopt(tmp_path / "mds")
    assert len(shard_sizes(tmp_path / "mds" / "train")) > 5
    sets = [f"data.path={info.path}", "train.max_steps=24", "log.every_steps=1", "checkpoint.every_steps=3"]
    whole, killed = harness(*sets), harness(*sets)
    command = Command(*killed.command("pretrain"), before=partial(hold_step, 8))
    assert command.until(lambda: any(row["step"] >= 7 for row in killed.log("pretrain")))
    assert command.kill() == -signal.SIGKILL
    assert killed.run.phase("pretrain").result is None
    for file in info.path.rglob("*.mds"):  # the unpacked shards may have been removed
        file.unlink()
    again = run(*killed.command("pretrain"))
    assert again.wait() == 0, again.err
    whole.train("pretrain")
    expected, found = whole.weights("pretrain"), killed.weights("pretrain")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    losses = [[row["train/loss"] for row in each.log("pretrain")] for each in (whole, killed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 24


# ------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_changed_files_are_refused(tmp_path: Path, compression: str | None) -> None:
    mds = write_both(tmp_path / "mds", compression=compression)
    info, file = adopt(mds), shard_file(mds / "train")
    change_a_byte(file)
    open_dataset(info.path)
    message = fault_of(lambda: read_split(info, "train"))
    assert message.startswith(f"{file} is damaged: SHA-256 ")
    assert f"restore it, or delete {info.path}" in message
    with file.open("ab") as end:
        end.write(b"x")
    message = fault_of(lambda: open_dataset(info.path))
    assert message.startswith(f"{file} is damaged: {file.stat().st_size} bytes")
    file.unlink()
    assert fault_of(lambda: open_dataset(info.path)).startswith(f"{file} is missing")


def test_damage_is_found_when_it_is_adopted(tmp_path: Path) -> None:
    mds = write_both(tmp_path / "mds", hashes=["xxh64"])
    change_a_byte(shard_file(mds / "train"))
    assert "its xxh64 is not the one in its index" in fault_of(lambda: adopt(mds))
    mds = write_both(tmp_path / "plain", compression=None)
    file = shard_file(mds / "train")
    file.write_bytes(b"\xff" * file.stat().st_size)
    assert f"{file} is not a shard of " in fault_of(lambda: adopt(mds))
    assert not (mds / "adopted" / "dataset.json").exists()


def test_pickles_are_refused(tmp_path: Path) -> None:
    columns = {**COLUMNS, "weight": "pkl"}
    mds = write_both(tmp_path / "mds", columns=columns)
    assert "column 'weight' holds pickles, and reading a pickle can run any program" in fault_of(lambda: adopt(mds))


@pytest.mark.parametrize("label", [3, 65535])
def test_label_out_of_range_is_named_with_its_row(tmp_path: Path, label: int) -> None:
    mds = write_both(tmp_path / "mds", compression=None)
    shutil.rmtree(mds / "train")
    write_mds(mds / "train", [*TRAIN[:30], (TRAIN[30][0], label), *TRAIN[31:]])
    (tmp_path / "classes.json").write_text('["a", "b", "c"]')
    row, shards = 30, shard_sizes(mds / "train")
    number = next(n for n in range(len(shards)) if row < sum(shards[: n + 1]))
    file = mds / "train" / f"shard.{number:05}.mds.zstd"
    message = fault_of(lambda: adopt(mds, classes=tmp_path / "classes.json"))
    assert message.startswith(f"{file}, row {row - sum(shards[:number])}: label {label} is not in 0 to 2")
    assert not (mds / "adopted" / "dataset.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"image": "photo", "label": "label"}}, "no column 'label', but id (str), photo (bytes)"),
        (
            {"columns": {"image": "weight", "label": "y"}},
            "column 'weight' is float32, but an image must be one of bytes",
        ),
        (
            {"columns": {"image": "photo", "label": "weight"}},
            "column 'weight' is float32, but a label must be an integer",
        ),
        ({"columns": {"picture": "photo"}}, "--columns picture=…: expected image=NAME,label=NAME"),
        ({"parts": 99}, "--parts 99: a part has at least one whole shard"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(mds: Path, options: dict[str, Any], message: str) -> None:
    assert message in fault_of(lambda: adopt(mds, **options), ConfigError)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"version": 2, "shards": [{}]}', '{"version": 2, "shards": [7]}', "[" * 100_000),
        '{"version": 2, "shards": []}',
    ],
    ids=lambda text: text[:40],
)
def test_damaged_index_is_refused(mds: Path, text: str) -> None:
    (mds / "val" / "index.json").write_text(text)
    message = fault_of(lambda: adopt(mds))
    assert str(mds / "val") in message
    assert "delete" not in message


@pytest.mark.parametrize("name", ["../../outside.mds", "/etc/passwd"])
def test_index_that_names_files_elsewhere_is_refused(mds: Path, name: str) -> None:
    file = mds / "val" / "index.json"
    index = json.loads(file.read_text())
    index["shards"][0]["zip_data"]["basename"] = name
    file.write_text(json.dumps(index))
    assert f"shard {name!r} lies outside its folder" in fault_of(lambda: adopt(mds))


def test_folders_are_refused_with_what_to_do(mds: Path, tmp_path: Path, digits: Path) -> None:
    assert f"bigincubate data adopt {mds / 'train'} --val DIR" in fault_of(lambda: adopt(mds / "train"))
    assert "it has no index.json" in fault_of(lambda: adopt(mds / "train", val=tmp_path))
    assert "needs no adoption" in fault_of(lambda: adopt(digits))
    assert f"bigincubate data adopt {mds}" in fault_of(lambda: open_dataset(mds))
    info = adopt(mds)
    assert f"not prepared data, but {info.path} is" in fault_of(lambda: open_dataset(mds))


# ------------------------------------------------------------------------------------------------ again, and elsewhere


def test_adopting_again_changes_nothing(mds: Path) -> None:
    info = adopt(mds)
    before = read_contents(mds)
    stamps = {file: file.stat().st_mtime_ns for file in mds.rglob("*.json")}
    assert adopt(mds) == info
    assert read_contents(mds) == before
    assert {file: file.stat().st_mtime_ns for file in mds.rglob("*.json")} == stamps
    assert "describes other data" in fault_of(lambda: adopt(mds, parts=2))
    shutil.rmtree(mds / "train")
    write_mds(mds / "train", TRAIN[1:])
    assert "adopted" in fault_of(lambda: adopt(mds))


def test_interrupted_adoption_is_repeated(mds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bigincubate.data import adopt as adopting

    with monkeypatch.context() as patch:
        patch.setattr(adopting, "_write", lambda *_: (_ for _ in ()).throw(DataError("stopped")))
        assert fault_of(lambda: adopt(mds)) == "stopped"
    assert "it is not complete" in fault_of(lambda: open_dataset(mds / "adopted"))
    assert read_split(adopt(mds), "val") == pixels_of(VAL)


def test_data_that_cannot_be_written_is_described_elsewhere(mds: Path, tmp_path: Path, call: Called) -> None:
    before = read_contents(mds)
    for folder in (mds, mds / "train", mds / "val"):
        folder.chmod(0o555)
    try:
        if not os.access(mds, os.W_OK):  # root may write to it nevertheless
            assert "--out DIR" in fault_of(lambda: adopt(mds), ConfigError)
        words = ["data", "adopt", mds / "train", "--val", mds / "val", "--columns", "image=photo,label=y"]
        code, out, err = call(*words, "--out", tmp_path / "described", "--jobs", 1)
        assert (code, err) == (0, "")
        assert f"70 train, 20 val images of 3 classes; use it with --set data.path={tmp_path / 'described'}" in out
        assert read_split(open_dataset(tmp_path / "described"), "train") == pixels_of(TRAIN)
        assert read_contents(mds) == before
    finally:
        for folder in (mds, mds / "train", mds / "val"):
            folder.chmod(0o755)


def test_parts_are_whole_shards_or_subfolders(mds: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    info = adopt(mds, parts=2, report=lines.append)
    assert any("`data prepare --parts` makes balanced ones" in line for line in lines)
    found = []
    for number in range(2):
        part = open_dataset(info.path / "parts" / f"{number:02}")
        assert (part.part, part.digest, part.epoch) == (number, info.parts[number], 70)
        found += read_split(part, "train")
        assert read_split(part, "val") == pixels_of(VAL)
    assert sorted(found) == sorted(pixels_of(TRAIN))
    for name, samples in (("north", TRAIN[:10]), ("south", TRAIN[10:])):
        write_mds(tmp_path / "sites" / name, samples, size_limit=2000)
    info = adopt(tmp_path / "sites", val=mds / "val", parts=2)
    assert info.samples["train"] == 70
    assert read_split(open_dataset(info.path / "parts" / "00"), "train") == pixels_of(TRAIN[:10])


def test_description_is_checked(mds: Path) -> None:
    info = adopt(mds)
    file = info.path / "dataset.json"
    described = json.loads(file.read_text())
    for changed in (
        {**described, "folders": {"train": "../train"}},
        {**described, "stored_columns": {"image": "id", "label": "y"}},
        {key: value for key, value in described.items() if key != "folders"},
        {key: value for key, value in described.items() if key != "stored_columns"},
    ):
        file.write_text(json.dumps(changed))
        assert "damaged" in fault_of(lambda: open_dataset(info.path))


def test_preparing_such_data_says_how_to_adopt_it(mds: Path, tmp_path: Path, call: Called) -> None:
    for folder in (mds, mds / "train"):
        code, _, err = call("data", "prepare", folder, "--out", tmp_path / "out")
        says = (
            f"{folder} holds shards of mosaicml-streaming, which are used as they are: bigincubate data adopt {folder}"
        )
        assert (code, err) == (3, f"bigincubate: {says}\n")
