"""Decentralised data: training samples in parts that do not overlap, and module k sees part k and nothing else.

A part is a complete data set in ``DIR/parts/00`` and so on, with the validation split of the whole. Its shards are the
whole's by another name (hard links), so nothing is stored twice; on a file system without links they are copies. A site
that trains module k needs of ``DIR`` only ``dataset.json`` and its own part.

Source: Ni et al., Deep Incubation, 2023 (arXiv:2212.04129), decentralised modular training.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..config import Recipe
from ..errors import ConfigError, EnvironmentFault
from ..seeds import partition_number
from .dataset import DatasetInfo, open_dataset
from .sources import Sample
from .splits import in_fixed_order

Cut = Callable[[Sequence[Sample]], list[list[Sample]]]  # training samples -> those of each part


def cut_by_class(samples: Sequence[Sample], parts: int) -> list[list[Sample]]:
    """Deal the samples out class after class: of each class, and in all, parts differ by one sample at most."""
    dealt = sorted(in_fixed_order(samples), key=lambda sample: sample.label)
    return [dealt[part::parts] for part in range(parts)]


def cut_by_hash(samples: Sequence[Sample], parts: int) -> list[list[Sample]]:
    """By a hash of the sample's name: it stays in its part whatever else joins the data."""
    cut: list[list[Sample]] = [[] for _ in range(parts)]
    for sample in samples:
        cut[partition_number(sample.name) % parts].append(sample)
    return cut


def cut_by_file(samples: Sequence[Sample], file: Path) -> list[list[Sample]]:
    """As a file says: CSV with the columns ``sample,part``, or a JSON object a line with these keys. Parts count from
    0; they may be uneven.

    Raises:
        EnvironmentFault: unreadable, or not each training sample exactly once (the message names the first).
    """
    told: dict[str, int] = {}
    names = {sample.name for sample in samples}
    for number, (name, part) in enumerate(_rows(file), start=1):
        if name not in names or name in told:
            why = "is listed twice" if name in told else "is no training sample of this source"
            raise EnvironmentFault(f"{file}, row {number}: {name!r} {why}")
        try:
            told[name] = int(part)
        except ValueError:
            raise EnvironmentFault(f"{file}, row {number}: the part {part!r} is not a whole number") from None
        if not 0 <= told[name] < len(names):
            raise EnvironmentFault(f"{file}, row {number}: no part {part} of {len(names)} samples; parts count from 0")
    if missing := names - told.keys():
        raise EnvironmentFault(f"{file} leaves out {len(missing)} training samples, such as {min(missing)!r}")
    cut: list[list[Sample]] = [[] for _ in range(max(told.values()) + 1)]
    for sample in samples:
        cut[told[sample.name]].append(sample)
    return cut


def _rows(file: Path) -> Iterable[tuple[str, str]]:
    try:
        with file.open(newline="") as text:
            if file.suffix == ".csv":
                rows = [(row["sample"], row["part"]) for row in csv.DictReader(text)]
            else:
                rows = [(row["sample"], str(row["part"])) for row in map(json.loads, text)]
    except OSError as error:
        raise EnvironmentFault(f"{file}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, csv.Error):
        rows = []
    if not rows:
        raise EnvironmentFault(
            f'{file}: expected CSV (*.csv) with the columns sample,part, or lines like {{"sample": "…", "part": 0}}'
        )
    return rows


# ------------------------------------------------------------------------------------------------ what a phase sees


def part_path(whole: Path | str, part: int) -> str:
    """Where a part is, for a path and for a URL."""
    return f"{whole}/parts/{part:02d}"


def seen_by(recipe: Recipe, data: DatasetInfo, module: int | None) -> str:
    """The digest of the data that a module trains on; of the whole for a phase without one.

    Raises:
        ConfigError: decentralised, and the data is not cut into a part for each module.
    """
    if module is None or not recipe.data.decentralised:
        return data.digest
    if module >= len(data.parts):
        parts = f"{len(data.parts)} parts" if data.parts else "no parts"
        raise ConfigError(
            f"{data.path} has {parts}, and with data.decentralised module {module} trains on part {module} alone: "
            "prepare it with --parts, one a module at least"
        )
    return data.parts[module]


def open_for(recipe: Recipe, data: DatasetInfo, module: int | None) -> tuple[Recipe, DatasetInfo]:
    """The recipe and the data to train a module, or another phase, with: for a module of a decentralised recipe its own
    part, and the whole is not opened.

    Args:
        data: the whole, as `describe_dataset` or `open_dataset` gives it.

    Raises:
        EnvironmentFault: the part is missing, damaged, or not the one that the whole was made of.
    """
    wanted = seen_by(recipe, data, module)
    if wanted == data.digest:
        return recipe, data
    assert module is not None
    here = part_path(data.path, module)
    remote = part_path(recipe.data.remote, module) if recipe.data.remote else None
    part = open_dataset(here, remote)
    if (part.digest, part.part) != (wanted, module):
        raise EnvironmentFault(
            f"{here} is not part {module} of {data.path} ({part.digest[:12]}…, expected {wanted[:12]}…), and module "
            f"{module} sees no other"
        )
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": here, "remote": remote})}), part


def check_view(recipe: Recipe, data: DatasetInfo, module: int | None) -> None:
    """Refuse to train on what a phase must not see: the last look before samples are read.

    Raises:
        ConfigError: a module of a decentralised recipe was given anything but its part, or another phase a part.
    """
    if recipe.data.decentralised and data.part != module:
        given = "the whole" if data.part is None else f"part {data.part}"
        phase = "this phase" if module is None else f"module {module}"
        allowed = "the whole" if module is None else f"part {module}"
        raise ConfigError(f"{phase} was given {given} of the data and may see {allowed} alone (data.decentralised)")
