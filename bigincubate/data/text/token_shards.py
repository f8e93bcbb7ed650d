"""Use shards of tokens that another program has written, such as llm-foundry. They are linked, not written again.

A sample has a column ``tokens``: an array, or the bytes of 64-bit integers. Training samples have the same length. The
first token of a sample is not predicted, because samples do not overlap.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from ...errors import ConfigError, DataError
from ...files import fsync_path, hash_file, link_or_copy, quote_path, read_json
from ..chunks import write_description
from ..dataset import INDEX, INVALID_JSON_ERRORS, SPLITS, write_json
from ..process_pool import run_in_processes
from ..shards import check_offsets
from ..sources.archives import damaged_archive
from ..sources.class_folders import SPLIT_NAMES
from .files import ONE_DOMAIN, TOKEN_SHARD, TextFile, TextSource, file_stamp
from .stored_tokenizer import TokenizerChoice, store_tokenizer
from .tokenizers import BPE
from .windows import TOKENS, read_tokens, token_schema

TOKEN_SHARDS = "token-shards"


class _Shard(NamedTuple):
    """A shard to link and check; the window and the vocabulary are limits for its tokens."""

    entry: dict[str, Any]
    folder: Path
    out: Path
    window: int
    vocabulary: int


def find_token_shards(root: Path) -> TextSource | None:
    """Return the shards in the folders ``train`` and ``val`` (or ``validation``) of a folder; None if it has none.

    Raises:
        DataError: If only one of the two has shards, or an index is damaged.
    """
    folders = {split: root / name for split in SPLITS for name in SPLIT_NAMES[split] if (root / name / INDEX).is_file()}
    if not folders and not (root / INDEX).is_file():
        return None
    if len(folders) < len(SPLITS):
        raise DataError(f"{quote_path(root)} has shards, but not in both train/ and val/; move them there")
    files = []
    for split, folder in folders.items():
        names = [INDEX, *(_name(folder, shard) for shard in _read_index(folder))]
        paths = [str(folder / name) for name in names]
        files += [
            TextFile(f"{split}/{name}", path, ONE_DOMAIN, TOKEN_SHARD, file_stamp(path))
            for name, path in zip(names, paths, strict=True)
        ]
    return TextSource(TOKEN_SHARDS, sorted(files), str(root))


def link_token_shards(
    source: TextSource,
    out: Path,
    identity: Mapping[str, Any],
    choice: TokenizerChoice,
    jobs: int,
    on_progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Link the shards of a source into the folder of a data set, check them, and describe them.

    Args:
        source: The source.
        out: The folder of the data, which has been begun.
        identity: What decides which data is made of the source.
        choice: The window, and the tokenizer that the shards were written with.
        jobs: Number of processes.
        on_progress: Called with the percentage that is done, and 100.

    Returns:
        The summary of the data.

    Raises:
        ConfigError: If the tokenizer is to be trained, or the window is not that of the samples.
        DataError: If a shard is damaged, compressed, or does not hold such tokens.
    """
    if choice.train is not None:
        raise ConfigError(
            f"--tokenizer {BPE}:{choice.train}: {quote_path(str(source.folder))} holds tokens already; give the"
            " tokenizer.json that they were made with"
        )
    plan = store_tokenizer(out, [], {}, choice, jobs)
    tokenizer = plan.load()
    folders = {file.name.partition("/")[0]: Path(file.path).parent for file in source.files}
    indexes = {split: _read_index(folders[split]) for split in SPLITS}
    columns = _columns(indexes["train"][0])
    for split, index in indexes.items():
        shutil.rmtree(out / split, ignore_errors=True)
        (out / split / "00000").mkdir(parents=True)
        for shard in index:
            _check_form(folders[split], shard, columns)
    shards = [
        _Shard(shard, folders[split], out / split / "00000", choice.window, tokenizer.vocabulary)
        for split, index in indexes.items()
        for shard in index
    ]
    hashes: dict[Path, dict[str, str]] = {shard.out: {} for shard in shards}
    tokens = dict.fromkeys(SPLITS, 0)
    with run_in_processes(_link_shard, shards, jobs, "shards") as linked:
        for done, (folder, name, sha256, count) in enumerate(linked, start=1):
            hashes[folder][name] = sha256
            tokens[folder.parent.name] += count
            on_progress(round(100 * done / len(shards)), 100)
    for split, index in indexes.items():
        folder = out / split / "00000"
        for shard in index:
            shard["raw_data"]["hashes"] = {"sha256": hashes[folder][shard["raw_data"]["basename"]]}
        write_json(folder / INDEX, {"version": 2, "shards": index})
        fsync_path(folder)
    windows = {split: sum(shard["samples"] for shard in index) for split, index in indexes.items()}
    summary = {"tokens": tokens, "windows": windows}
    schema = replace(token_schema(plan.window, tokenizer, plan.identity, [ONE_DOMAIN]), columns=columns)
    origin = {
        **identity,
        "fingerprint": source.fingerprint,
        "contents": source.content_hash(file.hash() for file in source.files),
        "summary": summary,
    }
    write_description(out, schema, {split: [out / split / "00000"] for split in SPLITS}, origin, {})
    return summary


def _lists_shards(folder: Path) -> bool:
    return "shards" in (read_json(folder / INDEX) or {})


def _read_index(folder: Path) -> list[dict[str, Any]]:
    """Return what an index says about its shards."""
    shards = (read_json(folder / INDEX) or {}).get("shards")
    if not isinstance(shards, list) or not shards:
        raise damaged_archive(folder / INDEX, "it lists no shards")
    return shards


def _name(folder: Path, shard: dict[str, Any]) -> str:
    """Return the name of a shard's file, which lies in the folder of the index."""
    try:
        name = shard["raw_data"]["basename"]
        if Path(name).name == name and int(shard["samples"]) >= 0:
            return str(name)
    except INVALID_JSON_ERRORS:
        pass
    raise damaged_archive(folder / INDEX, "it does not describe its shards")


def _columns(shard: dict[str, Any]) -> dict[str, str]:
    return dict(zip(shard.get("column_names", ()), shard.get("column_encodings", ()), strict=False))


def _check_form(folder: Path, shard: dict[str, Any], columns: dict[str, str]) -> None:
    """Refuse a shard that cannot be read at an offset, or holds no tokens."""
    file = quote_path(folder / _name(folder, shard))
    if shard.get("format") != "mds" or shard.get("compression") or shard.get("zip_data"):
        raise DataError(f"{file} is compressed or no MDS shard; only MDS shards without compression can be used")
    encoding = _columns(shard).get(TOKENS, "")
    if not (encoding == "bytes" or encoding.startswith("ndarray")):
        raise DataError(f"{file} has no column tokens of arrays or bytes: it has {_columns(shard)}")
    if _columns(shard) != columns:
        raise DataError(f"{file} has other columns than the shards before it")


def _link_shard(shard: _Shard) -> tuple[Path, str, str, int]:
    """Link and check a shard, and return its folder, its name, its hash, and its number of tokens."""
    from ...compat.streaming_package import reader_from_json

    name = shard.entry["raw_data"]["basename"]
    file = shard.folder / name
    link_or_copy(file.resolve(), shard.out / name)
    try:
        check_offsets(shard.out / name, shard.entry["samples"])
        counts = [
            _check_tokens(read_tokens(record[TOKENS]), shard, str(file))
            for record in reader_from_json(str(shard.out), None, shard.entry)
        ]
    except (ValueError, LookupError, TypeError) as error:  # what streaming raises depends on the damage
        raise damaged_archive(file, str(error)) from None
    return shard.out, name, hash_file(shard.out / name), sum(counts)


def _check_tokens(tokens: NDArray[Any], shard: _Shard, file: str) -> int:
    """Refuse a sample of another length, or with tokens that the tokenizer does not have; return its length."""
    least = shard.window + 1 if shard.out.parent.name == "train" else 2
    if tokens.ndim != 1 or not least <= len(tokens) <= shard.window + 1:
        raise ConfigError(
            f"--window {shard.window}: {quote_path(file)} has a sample of {len(tokens):,} tokens; use --window"
            f" {len(tokens) - 1} if all have as many"
        )
    if tokens.min() < 0 or tokens.max() >= shard.vocabulary:
        wrong = tokens.min() if tokens.min() < 0 else tokens.max()
        raise DataError(
            f"{quote_path(file)} has the token {wrong}, but the tokenizer has {shard.vocabulary:,}; give the"
            " tokenizer.json that the tokens were made with"
        )
    return len(tokens)
