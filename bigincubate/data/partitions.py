"""Decentralized data: disjoint partitions of the training samples. Module k trains only on partition k.

A partition is a complete data set in ``DIR/parts/00`` and so on, with the validation split of the whole data set. Its
shards are hard links to those of the whole data set, or copies on a file system without hard links. A site that trains
module k needs only ``dataset.json`` and partition k of ``DIR``.

Source: Ni et al., Deep Incubation, 2023 (arXiv:2212.04129), decentralized modular training.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..config import Recipe
from ..config.seeds import partition_number
from ..errors import ConfigError, DataError, format_count
from ..files import check_is_file
from .dataset import PARTS, DatasetInfo, open_dataset
from .samples import Sample
from .splits import sort_by_name_hash

# takes the training samples, returns the samples of each partition
PartitionFunction = Callable[[Sequence[Sample]], list[list[Sample]]]


def partition_by_class(samples: Sequence[Sample], parts: int) -> list[list[Sample]]:
    """Partition samples evenly: partitions differ in size by at most one sample, in total and in each class."""
    by_class = sorted(sort_by_name_hash(samples), key=lambda sample: sample.label)
    return [by_class[part::parts] for part in range(parts)]


def partition_by_hash(samples: Sequence[Sample], parts: int) -> list[list[Sample]]:
    """Partition samples by a hash of their names: a sample stays in its partition when other samples are added."""
    partitions: list[list[Sample]] = [[] for _ in range(parts)]
    for sample in samples:
        partitions[partition_number(sample.name) % parts].append(sample)
    return partitions


def partition_by_domain(samples: Sequence[Sample], parts: int | None = None) -> list[list[Sample]]:
    """Partition documents by their domains: partition k has the documents of domain k.

    Args:
        samples: The training documents; the label is the number of the domain.
        parts: The expected number of domains; None if any is accepted.

    Raises:
        ConfigError: If there is another number of domains.
    """
    domains = 1 + max(sample.label for sample in samples)
    if parts is not None and parts != domains:
        raise ConfigError(f"--parts {parts}: the text has {domains} domains; use --parts {domains} or omit it")
    return [[sample for sample in samples if sample.label == domain] for domain in range(domains)]


def partition_from_file(samples: Sequence[Sample], file: Path) -> list[list[Sample]]:
    """Partition samples as listed in a file.

    Args:
        samples: The training samples.
        file: CSV with the columns ``sample,part``, or JSON lines with these keys. Partitions are numbered from 0 and
            may have different sizes.

    Raises:
        DataError: If the file cannot be read, or does not list each sample exactly once.
    """
    assigned: dict[str, int] = {}
    names = {sample.name for sample in samples}
    for number, (name, part) in enumerate(_read_rows(file), start=1):
        if name not in names or name in assigned:
            reason = "is listed twice" if name in assigned else "is not a training sample of this source"
            raise DataError(f"{file}, row {number}: {name!r} {reason}")
        try:
            assigned[name] = int(part)
        except ValueError:
            raise DataError(f"{file}, row {number}: the part {part!r} is not an integer") from None
        if not 0 <= assigned[name] < len(names):
            raise DataError(f"{file}, row {number}: part {part} is not between 0 and {len(names) - 1}")
    if missing := names - assigned.keys():
        raise DataError(f"{file} does not list {len(missing)} training samples, such as {min(missing)!r}; add them")
    partitions: list[list[Sample]] = [[] for _ in range(max(assigned.values()) + 1)]
    for sample in samples:
        partitions[assigned[sample.name]].append(sample)
    return partitions


def _read_rows(file: Path) -> Iterable[tuple[str, str]]:
    """Return the rows of a CSV or JSON lines file: name of the sample, number of the partition."""
    try:
        check_is_file(file)
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


# ------------------------------------------------------------------------------------------------ access of a phase


def partition_path(whole: Path | str, part: int) -> str:
    """Return the path or URL of a partition, given the path or URL of the whole data set."""
    return f"{whole}/{PARTS}/{part:02d}"


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
        parts = format_count(len(data.parts), "part") if data.parts else "no parts"
        raise ConfigError(
            f"{data.path} has {parts}, but with data.decentralized module {module} trains only on part {module}; "
            f"prepare it with --parts {module + 1} or more"
        )
    return data.parts[module]


def open_module_partition(recipe: Recipe, data: DatasetInfo, module: int | None) -> tuple[Recipe, DatasetInfo]:
    """Return the recipe and the data set for training a module or another phase.

    For a module of a decentralized recipe, the data set is its partition; the whole data set need not be on this site.

    Args:
        recipe: The recipe of the run.
        data: The whole data set, as `describe_dataset` or `open_dataset` returns it.
        module: Index of the module; None for a phase that trains on the whole data set.

    Raises:
        DataError: If the partition is missing, damaged, or not part of this data set.
    """
    expected = dataset_digest_for_module(recipe, data, module)
    if expected == data.digest:
        return recipe, data
    assert module is not None
    path = partition_path(data.path, module)
    remote = partition_path(recipe.data.remote, module) if recipe.data.remote else None
    part = open_dataset(path, remote)
    if (part.digest, part.part) != (expected, module):
        raise DataError(
            f"{path} is not part {module} of {data.path} (digest {part.digest[:12]}…, expected {expected[:12]}…); "
            f"module {module} may train only on that part"
        )
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": path, "remote": remote})}), part


def assert_partition_allowed(recipe: Recipe, data: DatasetInfo, module: int | None) -> None:
    """Refuse to train a phase on data that it may not use. This is the last check before samples are read.

    Args:
        recipe: The recipe of the run.
        data: The data set that would be read.
        module: Index of the module to train; None for another phase.

    Raises:
        ConfigError: If the recipe is decentralized, and a module would read anything but its partition, or another
            phase would read a partition.
    """
    if recipe.data.decentralized and data.part != module:
        given = "the whole data set" if data.part is None else f"part {data.part}"
        phase = "this phase" if module is None else f"module {module}"
        allowed = "the whole data set" if module is None else f"part {module}"
        raise ConfigError(f"data.decentralized: {phase} may train only on {allowed}, but was given {given}")
