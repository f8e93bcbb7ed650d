"""Folders of images with odd and damaged files: each image is used exactly once, or named, or counted as skipped."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from image_trees import read_samples
from PIL import Image
from trial_log import TrialLog

from bigincubate.data.prepare import prepare_dataset
from bigincubate.data.source_summary import UNREADABLE_FILES
from bigincubate.errors import DataError

FORMATS = (  # suffix, Pillow's mode
    *((".png", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    *((".jpg", mode) for mode in ("L", "RGB", "CMYK")),
    *((".tif", mode) for mode in ("L", "RGB", "CMYK", "F", "I;16")),
    *((".webp", "RGB"), (".gif", "P"), (".bmp", "RGB"), (".ppm", "RGB"), (".pgm", "L")),
)
LAYOUTS = (("",), ("train", "val"), ("Training", "valid"), ("TRAIN", "test"))


class Tree:
    """A random folder of images, and what must become of it.

    Attributes:
        good: Class and SHA-256 of each image that must be read, once.
        bad: Names of the files that cannot be read.
        odd: Number of other entries, which must be skipped.
    """

    def __init__(self, root: Path, dice: random.Random) -> None:
        self.root, self.dice = root, dice
        self.good: list[tuple[str, str]] = []
        self.bad: list[str] = []
        self.odd = self.files = 0
        classes = dice.sample(["ant", "Biene", "c d", "été", "0", "train set", "x" * 60], dice.randint(2, 4))
        for split in dice.choice(LAYOUTS):
            for name in classes:
                folder = root / split / name
                folder.mkdir(parents=True)
                for _ in range(dice.randint(2, 5)):
                    self.add_image(folder, name)
                for add in dice.sample(ODD_ENTRIES, dice.randint(0, 4)):
                    add(self, folder, name)

    def new_file(self, folder: Path, suffix: str) -> Path:
        self.files += 1
        return folder / f"{self.files:04}{suffix}"

    def add_image(self, folder: Path, name: str, suffix: str | None = None) -> Path:
        """Write an image that no other file of the tree equals."""
        kind, mode = self.dice.choice(FORMATS)
        size = self.dice.randint(1, 40), self.dice.randint(1, 40)
        pixels = np.frombuffer(self.dice.randbytes(size[0] * size[1] * 3), np.uint8).reshape(size[1], size[0], 3)
        image = Image.fromarray(pixels)
        if mode == "I;16":
            image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        elif mode == "F":
            image = Image.fromarray(pixels[..., 0].astype(np.float32) / 255)
        elif mode != "RGB":
            image = image.convert(mode)
        file = self.new_file(folder, kind)
        turned = Image.Exif()
        turned[0x0112] = self.dice.randint(0, 9)
        if kind == ".jpg":
            image.save(file, exif=turned)
        else:
            image.save(file)
        if suffix is not None:
            file = file.rename(file.with_suffix(suffix))
        self.good.append((name, hash_file(file)))
        return file

    def add_bad(self, file: Path, content: bytes) -> None:
        file.write_bytes(content)
        self.bad.append(str(file.relative_to(self.root)))


def hash_file(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def add_known_content(tree: Tree, folder: Path, name: str) -> None:
    """An image without a suffix that tells what it is."""
    file = tree.add_image(folder, name)
    while file.suffix not in (".png", ".jpg", ".tif", ".webp", ".gif"):
        file = tree.add_image(folder, name)
    file.rename(file.with_suffix(tree.dice.choice(["", ".jfif", ".img", ".jpg.1"])))


def add_strange_name(tree: Tree, folder: Path, name: str) -> None:
    file = tree.add_image(folder, name)
    stem = tree.dice.choice([b"\xff\xfe", "ü\u200b".encode(), b"a\nb", b"[bold]x[x]", b"-rf", b"%s{0}", b"'\"$HOME"])
    os.rename(file, os.fsencode(folder) + b"/" + stem + str(tree.files).encode() + file.suffix.encode())


def add_damaged(tree: Tree, folder: Path, name: str) -> None:
    whole = tree.add_image(folder, name)
    while whole.suffix != ".png":
        whole = tree.add_image(folder, name)
    content = whole.read_bytes()
    contents = (b"", b"not an image", content[: len(content) // 2], content[:8] + tree.dice.randbytes(100))
    tree.add_bad(tree.new_file(folder, tree.dice.choice([".png", ".jpg", ".JPEG", ".gif"])), tree.dice.choice(contents))


def add_out_of_range(tree: Tree, folder: Path, name: str) -> None:
    file = tree.new_file(folder, ".tif")
    Image.fromarray(np.full((4, 4), tree.dice.choice([-1.0, 2.0, np.nan, np.inf]), np.float32)).save(file)
    tree.bad.append(str(file.relative_to(tree.root)))


def add_broken_link(tree: Tree, folder: Path, name: str) -> None:
    file = tree.new_file(folder, ".png")
    file.symlink_to(tree.dice.choice(["nowhere.png", file.name]))
    tree.bad.append(str(file.relative_to(tree.root)))


def add_link(tree: Tree, folder: Path, name: str) -> None:
    file = tree.add_image(folder, name)
    link = tree.new_file(folder, file.suffix)
    tree.dice.choice([link.symlink_to, link.hardlink_to])(file)
    tree.odd += 1


def add_folder_link(tree: Tree, folder: Path, name: str) -> None:
    tree.new_file(folder, "").symlink_to(tree.dice.choice([".", "..", str(folder)]))
    tree.odd += 1


def add_hidden(tree: Tree, folder: Path, name: str) -> None:
    hidden = folder / tree.dice.choice([".ipynb_checkpoints", "@eaDir", "Thumbnails", ".git/x", "__MACOSX"])
    if not hidden.exists():
        hidden.mkdir(parents=True)
        tree.add_image(hidden, name)
        tree.good.pop()
        tree.odd += 1


def add_other_file(tree: Tree, folder: Path, name: str) -> None:
    file = tree.new_file(folder, tree.dice.choice([".txt", ".csv", "", ".npy", ".tar", ".heic"]))
    if tree.dice.random() < 0.2:
        os.mkfifo(file)
    else:
        file.write_bytes(tree.dice.randbytes(tree.dice.randint(0, 50)).replace(b"\xff", b"x"))
    tree.odd += 1


def add_deeper(tree: Tree, folder: Path, name: str) -> None:
    deeper = folder / "more" / "and more"
    deeper.mkdir(parents=True, exist_ok=True)
    tree.add_image(deeper, name)


ODD_ENTRIES: tuple[Callable[[Tree, Path, str], None], ...] = (
    *(add_known_content, add_strange_name, add_damaged, add_out_of_range, add_broken_link, add_link),
    *(add_folder_link, add_hidden, add_other_file, add_deeper),
)


@pytest.mark.scenario("odd-data")
def test_each_image_is_used_once_or_named(trial_log: TrialLog, tmp_path: Path) -> None:
    for trial in trial_log.trials():
        with trial_log.keep(trial):
            trial.note(**check(tmp_path / f"{trial.number}", trial.random))
    trial_log.check()


def check(folder: Path, dice: random.Random) -> dict[str, int]:
    tree = Tree(folder / "source", dice)
    source, out = str(tree.root), folder / "data"
    counts = {"images": len(tree.good), "unreadable": len(tree.bad), "skipped": tree.odd}
    if tree.bad:
        with pytest.raises(DataError) as error:
            prepare_dataset(source, out)
        assert "\n" not in str(error.value)
        listed = (out / UNREADABLE_FILES).read_text()
        assert all(name in listed for name in tree.bad)
        assert len(listed.splitlines()) == len(tree.bad)
    info = prepare_dataset(source, out, skip_bad=True)
    classes = info.schema.metadata["classes"]
    read = [(classes[label], content) for split in ("train", "val") for content, label in read_samples(out, split)]
    assert sorted((name, hashlib.sha256(content).hexdigest()) for name, content in read) == sorted(tree.good)
    assert {label for _, label in read_samples(out, "train")} == set(range(len(classes)))
    assert info.samples["train"] + info.samples["val"] == len(tree.good)
    return counts
