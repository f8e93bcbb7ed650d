"""What predictions are compared with: how the labels of a data set relate to the classes of a model."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.batch import Batch
from ...data.dataset import DatasetInfo
from ...data.sample_names import read_names
from ...errors import ConfigError, format_count, format_os_error
from ...files import MAX_SMALL_FILE_BYTES, check_is_file, quote_path

EXPECTED = (
    "expected a class of the model for each class of the data (a JSON object, or lines such as CLASS,MODEL_CLASS), or a"
    " JSON list with a list of valid labels for each validation image"
)


@dataclass(frozen=True)
class Targets:
    """The correct predictions for a data set.

    Attributes:
        columns: The model's class of each class of the data, to which predictions are limited; None if they are the
            same.
        valid: The valid labels of each validation image, ``[images, k]``, filled up with -1; None if it is the label.
        matching: How the classes were matched, if they are not the same.
    """

    columns: Tensor | None = None
    valid: Tensor | None = None
    matching: str = ""

    def score(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compare predictions with the targets. Images without a valid label are left out.

        Args:
            logits: The model's outputs, ``[n, classes]``.
            batch: The batch.

        Returns:
            The logits of the data's classes, the labels ``[n]``, the best predictions (at most five), the most likely
            first, and whether each is right.
        """
        labels = batch["labels"]
        if self.columns is not None:
            logits = logits[:, self.columns.to(logits.device)]
        if self.valid is None:
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices
            return logits, labels, best, best == labels[:, None]
        valid = self.valid[batch.sample_ids.cpu()].to(logits.device)
        kept = (valid >= 0).any(dim=1)
        logits, labels, valid = logits[kept], labels[kept], valid[kept]
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        return logits, labels, best, (best[:, :, None] == valid[:, None, :]).any(dim=2)


SAME_CLASSES = Targets()


def find_targets(info: DatasetInfo, count: int, names: object, file: Path | None) -> Targets:
    """Match the classes of a data set with those of a model.

    Args:
        info: The data set.
        count: Number of classes of the model.
        names: Names of the model's classes; anything but a list of them if they are not known.
        file: The file given by ``--classes``, if any.

    Raises:
        ConfigError: The classes do not fit, or the file is wrong.
        DataError: The file follows the names of images that the data does not hold.
    """
    known = {str(name): at for at, name in enumerate(names)} if isinstance(names, list) and len(names) == count else {}
    if file is None:
        return _match_by_name(info, count, known)
    content = _read_file(file)
    if content and isinstance(content, list) and all(isinstance(entry, list) for entry in content):
        return _valid_labels(info, count, known, file, content)
    columns = _mapped_classes(info, count, known, file, content)
    return Targets(torch.tensor(columns), matching=f"{len(columns):,} of {count:,} classes, matched by {file.name}")


def _match_by_name(info: DatasetInfo, count: int, known: dict[str, int]) -> Targets:
    own = [str(name) for name in info.schema.metadata["classes"]]
    if known.keys() >= set(own):
        return _targets([known[name] for name in own], count, "name")
    if len(own) != count:
        names = "" if known else ", whose names are not known"
        raise ConfigError(
            f"{info.path} has {format_count(len(own), 'class')}, but model.num_classes = {count}, and not all of them"
            f" are among the model's classes{names}: say which they are with --classes FILE, or use other data"
        )
    if set(own) == {str(number) for number in range(count)}:  # folders 0, 1, 10, …, as in ImageNet-V2
        return _targets([int(name) for name in own], count, "number")
    return Targets(matching="classes matched by position, as their names differ from the model's" if known else "")


def _targets(columns: list[int], count: int, how: str) -> Targets:
    if columns == list(range(count)):
        return SAME_CLASSES
    return Targets(torch.tensor(columns), matching=f"{len(columns):,} of {count:,} classes, matched by {how}")


# ------------------------------------------------------------------------------------------------ files


def _read_file(file: Path) -> Any:
    """Return the content of a file: of JSON, its value; of text, a list or a dict of its lines.

    Raises:
        ConfigError: It cannot be read.
    """
    where = f"--classes {quote_path(file)}"
    try:
        check_is_file(file)
        if file.stat().st_size > MAX_SMALL_FILE_BYTES:
            raise ConfigError(f"{where} is too large, more than {MAX_SMALL_FILE_BYTES:,} bytes; {EXPECTED}")
        text = file.read_text("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"--classes: {format_os_error(error)}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{where} is not text; {EXPECTED}") from None
    if file.suffix.lower() == ".json" or text.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where} is not JSON ({error}); {EXPECTED}") from None
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    separator = next((mark for mark in "\t, " if lines and mark in lines[0].strip()), None)
    if separator is None:
        return [line.strip() for line in lines]
    try:
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=separator, skipinitialspace=True)]
    except csv.Error as error:
        raise ConfigError(f"{where} is not a table ({error}); {EXPECTED}") from None
    if wrong := next((row for row in rows if len(row) != 2), None):
        raise ConfigError(f"{where}: {separator.join(wrong)!r} is not a class of the data and one of the model")
    if twice := _find_repeated([key for key, _ in rows]):
        raise ConfigError(f"{where} has the class {twice!r} twice; remove one of the lines")
    return dict(rows)


def _mapped_classes(info: DatasetInfo, count: int, known: dict[str, int], file: Path, content: Any) -> list[int]:
    """Return the model's class of each class of the data."""
    where, own = f"--classes {quote_path(file)}", [str(name) for name in info.schema.metadata["classes"]]
    if isinstance(content, list):
        if len(content) != len(own):
            counts = format_count(len(content), "class"), format_count(len(own), "class")
            raise ConfigError(f"{where} lists {counts[0]}, but {info.path} has {counts[1]}; {EXPECTED}")
        content = dict(zip(own, content, strict=True))
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{where} has no classes; {EXPECTED}")
    columns: list[int] = []
    for label, name in enumerate(own):
        if (key := name if name in content else str(label)) not in content:
            raise ConfigError(f"{where} has no class of the model for the class {name!r} of {info.path}; add it")
        if (column := _class_number(content[key], count, known)) is None:
            example = f", or a name such as {next(iter(known))!r}" if known else ""
            raise ConfigError(
                f"{where}: {content[key]!r} (for {key!r}) is not a class of the model: expected a number from 0 to"
                f" {count - 1}{example}"
            )
        if column in columns:
            raise ConfigError(
                f"{where}: the classes {own[columns.index(column)]!r} and {name!r} of {info.path} have the same class"
                f" of the model, {content[key]!r}; give each its own"
            )
        columns.append(column)
    return columns


def _class_number(value: object, count: int, known: dict[str, int]) -> int | None:
    """Return the number of a class of the model that is given by name or number; None if there is no such class."""
    if isinstance(value, str):
        if value in known:
            return known[value]
        value = int(value) if value.isascii() and value.isdecimal() and len(value) < 10 else None
    return value if type(value) is int and 0 <= value < count else None


def _find_repeated(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


def _valid_labels(info: DatasetInfo, count: int, known: dict[str, int], file: Path, lists: list[list[Any]]) -> Targets:
    """Return the valid labels of the images, given in the order of the names of their files."""
    where, images = f"--classes {quote_path(file)}", info.samples["val"]
    if len(lists) != images:
        raise ConfigError(
            f"{where} has valid labels for {format_count(len(lists), 'image')}, but {info.path} has"
            f" {format_count(images, 'validation image')}; use the data that the file was made for"
        )
    for number, labels in enumerate(lists):
        for label in labels:
            if type(label) is not int or not 0 <= label < count:
                raise ConfigError(
                    f"{where}: the label {label!r} of image {number} is not a class of the model: expected a number"
                    f" from 0 to {count - 1}"
                )
    if not any(lists):
        raise ConfigError(f"{where} has no valid label for any image; {EXPECTED}")
    columns = _match_by_name(info, count, known).columns
    if columns is not None and len(columns) != count:
        raise ConfigError(f"{where} has lists of valid labels, which need data with all {count} classes of the model")
    position = torch.arange(count) if columns is None else columns.argsort()
    names = read_names(info)
    order = sorted(range(images), key=lambda sample: (os.path.basename(names[sample]), names[sample]))
    valid = torch.full((images, max(map(len, lists))), -1, dtype=torch.int32)
    for sample, labels in zip(order, lists, strict=True):
        valid[sample, : len(labels)] = position[labels].int()
    return Targets(columns, valid, f"valid labels of {file.name}")
