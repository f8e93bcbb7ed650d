"""Decentralized data: disjoint partitions of the training samples; module k sees only partition k.

A partition is a complete data set in ``DIR/parts/00`` and so on, with the validation split of the whole data set. Its
shards are hard links to those of the whole, so nothing is stored twice; on a file system without links they are copies.
A site that trains module k needs only ``dataset.json`` and partition k of ``DIR``.

Source: Ni et al., Deep Incubation, 2023 (arXiv:2212.04129), decentralized modular training.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..config import Recipe
from ..errors import ConfigError, DataError
from ..seeds import partition_number
from .dataset import DatasetInfo, open_dataset
from .sources import Sample
from .splits import sort_by_name_hash

# training samples -> the samples of each partition
PartitionFunction = Callable[[Sequence[Sample]], list[list[Sample]]]


def partition_by_class(samples: Sequence[Sample], parts: int) -> list[list[Sample]]:
    """Partition samples evenly: the sizes of partitions differ by at most one sample, in total and in each class."""
    dealt = sorted(sort_by_name_hash(samples), key=lambda sample: sample.label)
    return [dealt[part::parts] for part in range(parts)]


def partition_by_hash(samples: Sequence[Sample], parts: int) -> list[list[Sample]]:
    """Partition samples by a hash of their names: a sample stays in its partition when others are added."""
    cut: list[list[Sample]] = [[] for _ in range(parts)]
    for sample in samples:
        cut[partition_number(sample.name) % parts].append(sample)
    return cut


def partition_from_file(samples: Sequence[Sample], file: Path) -> list[list[Sample]]:
    """Partition samples as a file says.

    Args:
        samples: The training samples.
        file: CSV with the columns ``sample,part``, or one JSON object with these keys per line. Partitions are numbered
            from 0 and may have different sizes.

    Raises:
        DataError: If the file cannot be read, or does not list each sample exactly once.
    """
    assigned: dict[str, int] = {}
    names = {sample.name for sample in samples}
    for number, (name, part) in enumerate(_read_rows(file), start=1):
        if name not in names or name in assigned:
            why = "is listed twice" if name in assigned else "is not a training sample of this source"
            raise DataError(f"{file}, row {number}: {name!r} {why}")
        try:
            assigned[name] = int(part)
        except ValueError:
            raise DataError(f"{file}, row {number}: the part {part!r} is not an integer") from None
        if not 0 <= assigned[name] < len(names):
            raise DataError(f"{file}, row {number}: no part {part} of {len(names)} samples; parts count from 0")
    if missing := names - assigned.keys():
        raise DataError(f"{file} leaves out {len(missing)} training samples, such as {min(missing)!r}")
    cut: list[list[Sample]] = [[] for _ in range(max(assigned.values()) + 1)]
    for sample in samples:
        cut[assigned[sample.name]].append(sample)
    return cut


def _read_rows(file: Path) -> Iterable[tuple[str, str]]:
    """Return the rows of a CSV or JSON-lines file: name of the sample, number of the partition."""
    try:
        with file.open(newline="") as text:
            if file.suffix == ".csv":
                rows = [(row["sample"], row["part"]) for row in csv.DictReader(text)]
            else:
                rows = [(row["sample"], str(row["part"])) for row in map(json.loads, text)]
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, csv.Error):
        rows = []
    if not rows:
        raise DataError(
            f'{file}: expected CSV (*.csv) with the columns sample,part, or lines like {{"sample": "…", "part": 0}}'
        )
    return rows


# ------------------------------------------------------------------------------------------------ what a phase may read


def partition_path(whole: Path | str, part: int) -> str:
    """Return the path or URL of a partition, given the path or URL of the whole data set."""
    return f"{whole}/parts/{part:02d}"


def dataset_digest_for_module(recipe: Recipe, data: DatasetInfo, module: int | None) -> str:
    """Return the digest of the data set that a module trains on.

    Args:
        recipe: The recipe of the run.
        data: The whole data set.
        module: Index of the module; None for a phase that trains on the whole data set.

    Raises:
        ConfigError: If the recipe is decentralized and the data has no partition for this module.
    """
    if module is None or not recipe.data.decentralized:
        return data.digest
    if module >= len(data.parts):
        parts = f"{len(data.parts)} parts" if data.parts else "no parts"
        raise ConfigError(
            f"{data.path} has {parts}, but with data.decentralized module {module} trains only on part {module}: "
            "prepare it with --parts, at least one part per module"
        )
    return data.parts[module]


def open_module_partition(recipe: Recipe, data: DatasetInfo, module: int | None) -> tuple[Recipe, DatasetInfo]:
    """Return the recipe and the data set with which to train a module or another phase.

    For a module of a decentralized recipe that is only its partition; the whole data set need not exist here.

    Args:
        recipe: The recipe of the run.
        data: The whole data set, as `describe_dataset` or `open_dataset` returns it.
        module: Index of the module; None for a phase that trains on the whole data set.

    Raises:
        DataError: If the partition is missing, damaged, or not part of this data set.
    """
    wanted = dataset_digest_for_module(recipe, data, module)
    if wanted == data.digest:
        return recipe, data
    assert module is not None
    here = partition_path(data.path, module)
    remote = partition_path(recipe.data.remote, module) if recipe.data.remote else None
    part = open_dataset(here, remote)
    if (part.digest, part.part) != (wanted, module):
        raise DataError(
            f"{here} is not part {module} of {data.path} ({part.digest[:12]}…, expected {wanted[:12]}…), and module "
            f"{module} may see no other"
        )
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": here, "remote": remote})}), part


def assert_partition_allowed(recipe: Recipe, data: DatasetInfo, module: int | None) -> None:
    """Refuse to train on data that a phase must not see. This is the last check before samples are read.

    Args:
        recipe: The recipe of the run.
        data: The data set that would be read.
        module: Index of the module to train; None for another phase.

    Raises:
        ConfigError: If a module of a decentralized recipe would read anything but its partition, or another phase a
            partition.
    """
    if recipe.data.decentralized and data.part != module:
        given = "the whole" if data.part is None else f"part {data.part}"
        phase = "this phase" if module is None else f"module {module}"
        allowed = "the whole" if module is None else f"part {module}"
        raise ConfigError(f"{phase} was given {given} of the data and may see only {allowed} (data.decentralized)")
