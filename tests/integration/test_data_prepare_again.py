"""What `data prepare` does with unreadable images and changed sources, and what it reports."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from image_trees import read_contents as contents
from image_trees import read_samples as samples
from image_trees import write_tree
from PIL import Image

from bigincubate.data import prepare as preparing
from bigincubate.data.dataset import open_dataset
from bigincubate.data.prepare import prepare_dataset
from bigincubate.errors import ConfigError, DataError


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "CHUNK_SAMPLES", 32)


BAD = {"a/0001.png": b"", "b/0003.png": None, "c/0011.png": b"<html>"}  # None: the beginning of the image


def spoil_images(tree: Path) -> dict[str, bytes]:
    """Make three images unreadable; return what they were."""
    before = {name: (tree / name).read_bytes() for name in BAD}
    for name, data in BAD.items():
        (tree / name).write_bytes(before[name][:100] if data is None else data)
    return before


@pytest.mark.parametrize("jobs", [1, 2])
def test_unreadable_images_are_all_listed_and_repaired_without_starting_again(
    tmp_path: Path, small_chunks: None, jobs: int
) -> None:
    tree, out = write_tree(tmp_path / "tree", 60), tmp_path / "out"
    lines: list[str] = []
    whole = prepare_dataset(str(tree), tmp_path / "whole")
    good = spoil_images(tree)
    with pytest.raises(
        DataError, match=r"3 of 180 images cannot be read: .*a/0001\.png: the file is empty, …"
    ) as fault:
        prepare_dataset(str(tree), out, jobs=jobs, report=lines.append)
    assert "--skip-bad" in str(fault.value)
    assert [line.split(": ")[1] for line in lines] == [str(tree / name) for name in BAD]
    assert not [line for line in lines if " at 0x" in line]
    assert (out / "unreadable-files.txt").read_text().splitlines() == [line.split(": ", 1)[1] for line in lines]
    with pytest.raises(DataError, match="no data in"):
        open_dataset(out)

    for name, data in good.items():
        (tree / name).write_bytes(data)
    seen: list[int] = []
    info = prepare_dataset(str(tree), out, jobs=jobs, on_progress=lambda done, _: seen.append(done))
    assert seen[0] >= 180 - 3 * 50  # at most three chunks are written again
    assert info.digest == whole.digest
    assert contents(out).keys() == contents(tmp_path / "whole").keys()


def test_skipped_images_leave_the_same_data_as_if_they_had_been_removed(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", 20)
    (tree / "a" / "9998.png").symlink_to("nowhere.png")
    (tree / "a" / "9999.png").symlink_to("9999.png")
    spoil_images(tree)
    lines: list[str] = []
    skipped = prepare_dataset(str(tree), tmp_path / "skipped", val_fraction=0.5, skip_bad=True, report=lines.append)
    assert sum(skipped.samples.values()) == 57
    assert "left out: 5 unreadable images, listed in unreadable-files.txt" in lines
    assert len((tmp_path / "skipped" / "unreadable-files.txt").read_text().splitlines()) == 5
    stored = json.loads((tmp_path / "skipped" / "dataset.json").read_text())["source"]["summary"]
    assert stored["unreadable"] == 5
    assert [sum(split) for split in stored["counts"].values()] == list(skipped.samples.values())
    prepare_dataset(str(tree), tmp_path / "skipped", val_fraction=0.5)  # it is complete
    val = {label for _, label in samples(tmp_path / "skipped", "val")}
    assert val == {0, 1, 2}


@pytest.mark.parametrize("change", ["remove", "add", "rename a class"])
def test_source_that_changed_before_it_was_complete_goes_on(tmp_path: Path, small_chunks: None, change: str) -> None:
    tree = write_tree(tmp_path / "tree", 60)
    spoil_images(tree)
    with pytest.raises(DataError, match="--skip-bad"):
        prepare_dataset(str(tree), tmp_path / "out")
    for name in BAD:
        (tree / name).unlink()
    if change == "add":
        Image.new("RGB", (8, 8)).save(tree / "b" / "new.png")
    elif change == "rename a class":
        (tree / "c").rename(tree / "d")
    info = prepare_dataset(str(tree), tmp_path / "out")
    fresh = prepare_dataset(str(tree), tmp_path / "fresh")
    assert (info.digest, info.samples) == (fresh.digest, fresh.samples)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_class_without_readable_training_images_is_named(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", 3)
    for file in (tree / "b").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(DataError, match="class b has no readable training image"):
        prepare_dataset(str(tree), tmp_path / "out", skip_bad=True)


def test_unfinished_data_of_another_folder_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        spoil_images(write_tree(tmp_path / name, 20))
    for name, says in (("one", "--skip-bad"), ("two", "holds data from another source, not yet complete: .*/one")):
        with pytest.raises(DataError, match=says):
            prepare_dataset(str(tmp_path / name), tmp_path / "out")


def test_file_that_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "images", 20)
    spoil_images(tree)
    with pytest.raises(DataError, match="--skip-bad"):
        prepare_dataset(str(tree), tmp_path / "out")
    (tmp_path / "out" / ".tmp-tokenizer.json-1").write_text("{")
    prepare_dataset(str(tree), tmp_path / "out", skip_bad=True)
    assert not list((tmp_path / "out").glob(".tmp-*"))


def repaint(file: Path, *, keep_times: bool) -> None:
    """Change a pixel of an uncompressed file, and neither its size nor, if so wished, its times."""
    before, data = file.stat(), bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    moment = before.st_mtime_ns + (0 if keep_times else 1_000_000_000)
    os.utime(file, ns=(moment, moment))


@pytest.fixture
def bitmaps(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / "bitmaps" / name).mkdir(parents=True)
        for row in range(5):
            Image.new("RGB", (8, 8), (row, ord(name), 0)).save(tmp_path / "bitmaps" / name / f"{row}.bmp")
    return tmp_path / "bitmaps"


def test_changed_content_of_the_same_size_is_seen(bitmaps: Path, tmp_path: Path) -> None:
    info = prepare_dataset(str(bitmaps), tmp_path / "out")
    for file in bitmaps.rglob("*.bmp"):
        os.utime(file)  # other times only
    assert prepare_dataset(str(bitmaps), tmp_path / "out") == info
    repaint(bitmaps / "a" / "0.bmp", keep_times=False)
    with pytest.raises(DataError, match="added, removed or changed since"):
        prepare_dataset(str(bitmaps), tmp_path / "out")


def test_check_sees_changed_content_of_the_same_size_and_time(bitmaps: Path, tmp_path: Path) -> None:
    info = prepare_dataset(str(bitmaps), tmp_path / "out")
    repaint(bitmaps / "a" / "0.bmp", keep_times=True)
    assert prepare_dataset(str(bitmaps), tmp_path / "out") == info
    with pytest.raises(DataError, match="added, removed or changed since"):
        prepare_dataset(str(bitmaps), tmp_path / "out", check=True)


@pytest.mark.parametrize("check", [False, True])
def test_changed_content_is_written_again_when_preparation_resumes(bitmaps: Path, tmp_path: Path, check: bool) -> None:
    (bitmaps / "b" / "bad.bmp").write_bytes(b"")
    with pytest.raises(DataError, match="1 image cannot be read"):
        prepare_dataset(str(bitmaps), tmp_path / "out")
    (bitmaps / "b" / "bad.bmp").unlink()
    repaint(bitmaps / "a" / "0.bmp", keep_times=check)
    prepare_dataset(str(bitmaps), tmp_path / "out", check=check)
    stored = {image for split in ("train", "val") for image, _ in samples(tmp_path / "out", split)}
    assert stored == {file.read_bytes() for file in bitmaps.rglob("*.bmp")}


def test_equal_images_in_training_and_validation_are_always_reported(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_tree(tmp_path / "tree" / split, 3)  # the same images
    Image.new("RGB", (8, 8)).save(tmp_path / "tree" / "val" / "a" / "new.png")
    for _ in range(2):  # prepared, and found prepared
        lines: list[str] = []
        prepare_dataset(str(tmp_path / "tree"), tmp_path / "out", report=lines.append)
        assert [line for line in lines if "warning" in line] == [
            "warning: 9 validation images also in the training images; val/a/0000.png is equal to train/a/0000.png"
        ]


def test_output_inside_the_source_is_refused(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", 2)
    (tmp_path / "link").symlink_to(tree)
    for out in (tree, tree / "out", tree / "a" / "out", tmp_path / "link" / "out"):
        with pytest.raises(ConfigError, match="is inside the source"):
            prepare_dataset(str(tree), out)
    assert sorted(path.name for path in tree.iterdir()) == ["a", "b", "c"]


def test_command_prints_progress_and_summary_into_a_pipe(
    tmp_path: Path, small_chunks: None, call: Callable[..., tuple[int, str, str]]
) -> None:
    tree = write_tree(tmp_path / "a b", 100)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 8)).save(tree / "a" / "turned.jfif", "JPEG", exif=exif)
    code, out, err = call("data", "prepare", tree, "--out", tmp_path / "out 1", "--jobs", 1)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    progress = [line for line in lines if line.startswith("preparing: ")]
    assert progress[0] == "preparing: 0 of 301 images"
    assert progress[-1] == "preparing: 301 of 301 images"
    assert 5 < len(progress) <= 11
    assert lines[len(progress) :] == [
        "train: 240 images; val: 61 images, 20% of each class held out",
        "classes (training + validation): a 80 + 21, b 80 + 20, c 80 + 20",
        'images with an EXIF orientation: 1; augment.exif = "apply" turns them upright',
        f"'{tmp_path}/out 1': 240 train, 61 val images of 3 classes; use it with --set data.path='{tmp_path}/out 1'",
    ]


def test_options_of_the_command_leave_out_bad_files_check_contents_and_limit_pixels(
    bitmaps: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    (bitmaps / "b" / "bad.bmp").write_bytes(b"")
    words = ("data", "prepare", bitmaps, "--out", tmp_path / "out", "--jobs", 1)
    code, _, err = call(*words)
    assert (code, err.count("\n")) == (3, 1)
    assert "--skip-bad" in err
    code, out, err = call(*words, "--skip-bad")
    assert (code, err) == (0, "")
    assert "left out: 1 unreadable image, listed in unreadable-files.txt" in out
    repaint(bitmaps / "a" / "0.bmp", keep_times=True)
    assert call(*words)[0] == 0
    code, _, err = call(*words, "--check")
    assert (code, "added, removed or changed since" in err) == (3, True)
    code, _, err = call(*words[:-3], tmp_path / "small", "--max-pixels", 63)
    assert (code, "more than 63 pixels" in err) == (3, True)


def test_limit_on_pixels_is_stored_for_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bigincubate.config import DataConfig, ModelConfig, Settings
    from bigincubate.tasks.registry import make_task

    tree = write_tree(tmp_path / "tree", 20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)  # a limit of 62, and images of 64
    with pytest.raises(DataError, match=r"more than 62 pixels; allow more with: data prepare --max-pixels N"):
        prepare_dataset(str(tree), tmp_path / "small")
    info = prepare_dataset(str(tree), tmp_path / "out", max_pixels=64)
    task = make_task(Settings(model=ModelConfig(img_size=8, num_classes=3)), DataConfig())
    assert [len(batch) for batch in task.eval_stream(info, "val", batch_size=12)] == [12]
    assert "max_pixels" not in prepare_dataset("digits-dev", tmp_path / "digits").schema.metadata


# ------------------------------------------------------------------------------------------------ resized


def test_larger_images_are_resized_and_others_kept(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", 20)
    small = {file.read_bytes() for file in tree.rglob("*.png")}
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a", "b", "c"):
        for row, (mode, size) in enumerate((("RGB", (40, 90)), ("RGBA", (90, 40)), ("L", (33, 32)))):
            Image.new(mode, size, row + 1).save(tree / name / f"large{row}.png", exif=exif)
    info = prepare_dataset(str(tree), tmp_path / "out", resize=16)
    stored = [image for split in ("train", "val") for image, _ in samples(tmp_path / "out", split)]
    assert small < set(stored)
    resized = [Image.open(io.BytesIO(image)) for image in stored if image not in small]
    assert Counter(image.size for image in resized) == {(16, 36): 3, (36, 16): 3, (16, 16): 3}
    assert {(image.format, image.mode, image.getexif()[0x0112]) for image in resized} == {("JPEG", "RGB", 6)}
    settings = {"shorter_side": 16, "filter": "bicubic", "format": "JPEG", "quality": 95}
    assert info.schema.metadata["resize"] == settings
    assert prepare_dataset(str(tree), tmp_path / "out", resize=16) == info
    assert prepare_dataset(str(tree), tmp_path / "again", resize=16, jobs=2).digest == info.digest
    whole = prepare_dataset(str(tree), tmp_path / "whole")
    assert prepare_dataset(str(tree), tmp_path / "none-larger", resize=100).digest != whole.digest
    for out, side in (("out", None), ("out", 17), ("whole", 16)):
        with pytest.raises(DataError, match="holds data from another source, with other parts or of another size"):
            prepare_dataset(str(tree), tmp_path / out, resize=side)


def test_resized_pixels_of_arrays_and_unfinished_data_of_another_size(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    words = ("data", "prepare", "digits-dev", "--out", tmp_path / "digits", "--resize", 4)
    assert call(*words)[0] == 0
    assert {Image.open(io.BytesIO(image)).size for image, _ in samples(tmp_path / "digits", "val")} == {(4, 4)}
    tree = write_tree(tmp_path / "tree", 20)
    spoil_images(tree)
    with pytest.raises(DataError, match="--skip-bad"):
        prepare_dataset(str(tree), tmp_path / "out", resize=4)
    info = prepare_dataset(str(tree), tmp_path / "out", resize=5, skip_bad=True)
    assert info.digest == prepare_dataset(str(tree), tmp_path / "fresh", resize=5, skip_bad=True).digest
