"""Prepare text: write the documents of a source as windows of tokens in MDS shards.

The documents are extracted (:mod:`.extraction`) and divided into training and validation by the hashes of their names.
If requested, a tokenizer is trained on the training documents. Then the tokens are written in chunks (:mod:`.chunks`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError, DataError, check_integer
from ...files import quote_path, unreadable_error, write_text
from .. import dataset
from ..chunk_records import RECORDS
from ..dataset import DESCRIPTION, UNFINISHED, DatasetInfo, open_dataset
from ..descriptions import write_descriptions
from ..partitions import PartitionFunction, partition_path
from ..process_pool import run_in_processes
from ..samples import Sample
from ..source_summary import report_unreadable
from ..splits import sort_by_name_hash
from ..unfinished import begin_folder, preparing, refuse_inside
from .chunks import TextChunk, document_bytes, make_chunks, write_text_chunk
from .division import divide_documents
from .documents import PIECE_BYTES
from .extraction import EXTRACTED, Extracted, extract
from .files import EMBEDDED_TEXT, TextFile, TextSource, find_text
from .stored_tokenizer import TokenizerChoice, choose_tokenizer, copy_tokenizer, store_tokenizer
from .summary import summarize_text, text_summary_lines
from .tokenizers import BYTES
from .windows import token_schema

DOCUMENTS = "documents.jsonl"  # name, domain, split and partition of each document; not part of the digest
EXTRACTION_SHARE = 0.3  # fraction of the progress that the extraction accounts for


@dataclass(frozen=True)
class TextOptions:
    """The arguments of `prepare_text`; see there.

    Attributes:
        choice: The tokenizer that ``tokenizer`` selects.
    """

    window: int
    val_fraction: float
    domain_bytes: int | None
    development: bool
    column: str
    jobs: int
    skip_bad: bool
    check: bool
    partition: PartitionFunction | None
    on_progress: Callable[[int, int], None]
    report: Callable[[str], None]
    choice: TokenizerChoice

    def identify(self, source: TextSource) -> dict[str, Any]:
        """Return everything that determines the data, except the files of the source and the partitions.

        The values None are those of options that are not used; the description of the data does not have them.
        """
        identity: dict[str, Any] = {
            "kind": source.kind,
            "window": self.window,
            "tokenizer": self.choice.identity,
            "val_fraction": self.val_fraction,
            "domain_bytes": self.domain_bytes,
            "development": self.development or None,
        }
        if source.has_columns:
            identity["column"] = self.column
        return identity


def prepare_text(
    source: str,
    out: Path,
    *,
    window: int,
    tokenizer: str = BYTES,
    val_fraction: float = 0.05,
    domain_bytes: int | None = None,
    development: bool = False,
    column: str | None = None,
    jobs: int = 1,
    partition: PartitionFunction | None = None,
    skip_bad: bool = False,
    check: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    report: Callable[[str], None] | None = None,
) -> DatasetInfo:
    """Write ``source`` as windows of tokens to ``out``, unless they exist. Processes with the same ``out`` take turns.

    Args:
        source: A folder or file of text, JSON lines or Parquet files; ``stdlib``, the standard library of the running
            interpreter; or ``made-up-text``.
        out: A folder that is missing, empty, or completely or partly prepared from the same source.
        window: Number of tokens that a language model reads at once.
        tokenizer: ``bytes``; ``bpe:N``, to train a tokenizer with N tokens on the training documents; or a file of a
            byte-level tokenizer (``tokenizer.json``).
        val_fraction: Fraction of the documents of each domain to hold out, or of ``domain_bytes``.
        domain_bytes: Number of bytes of text to use of each domain, in whole documents; None to use all.
        development: Whether to divide the training documents again, for tuning: the same share of them is held out,
            and the documents that would be held out otherwise are not used at all.
        column: The field of JSON lines, or the column of Parquet files, that holds the text; by default ``text``.
        jobs: Number of processes, which does not affect the result.
        partition: Divides the training documents into partitions, each of which is also written as a data set.
        skip_bad: Whether to leave out documents that cannot be read.
        check: Whether to compare the contents of all files with what was prepared before, even if their sizes and
            modification times are the same.
        on_progress: Called with the percentage that is done, and 100.
        report: Called with each line of the summary, or with each document that cannot be read.

    Returns:
        The description of the data set.

    Raises:
        ConfigError: If ``out`` is inside the source, or an argument is invalid, or the tokenizer is refused.
        MissingDependencyError: If the form or the tokenizer needs a package that is not installed.
        DataError: If the source does not exist, documents cannot be read, or ``out`` contains other files.
        SystemResourceError: If a file cannot be written, or a process was killed.
    """
    check_integer("jobs", jobs)
    check_integer("window", window)
    if domain_bytes is not None:
        check_integer("domain_bytes", domain_bytes)
    if not 0 < val_fraction < 1:
        raise ConfigError(f"val_fraction = {val_fraction}: expected a number greater than 0 and less than 1")
    out = Path(os.path.abspath(out))
    if source not in EMBEDDED_TEXT:
        refuse_inside(out, source)
    options = TextOptions(
        window,
        val_fraction,
        domain_bytes,
        development,
        column or "text",
        jobs,
        skip_bad,
        check,
        partition,
        on_progress or (lambda done, total: None),
        report or (lambda line: None),
        choose_tokenizer(tokenizer, window),
    )
    with preparing(source, out):
        found = find_text(source)
        if column and not found.has_columns:
            name = source if source in EMBEDDED_TEXT else quote_path(source)
            raise ConfigError(
                f"--column {column}: {name} has no JSON lines or Parquet files, which have columns; omit it"
            )
        if (out / DESCRIPTION).exists():
            return _reopen(found, out, options)
        return _prepare(found, out, options)


def _prepare(source: TextSource, out: Path, options: TextOptions) -> DatasetInfo:
    begin_folder(out, source.kind, source.folder)
    found = extract(
        source.files,
        out,
        options.column,
        jobs=options.jobs,
        again=options.check,
        on_progress=lambda share: options.on_progress(round(100 * EXTRACTION_SHARE * share), 100),
    )
    total = len(found.documents) + len(found.unreadable)
    report_unreadable(found.unreadable.items(), total, "document", out, options.report, skip=options.skip_bad)
    splits = divide_documents(
        found.documents,
        found.domains,
        options.val_fraction,
        domain_bytes=options.domain_bytes,
        development=options.development,
    )
    for split, documents in splits.items():
        if not documents:
            raise DataError(
                f"{quote_path(source.folder or source.kind)} has too few different documents with text,"
                f" {len(found.documents):,}, which leaves none for"
                f" {'training' if split == 'train' else 'validation'}; add some (a single file of text is divided"
                f" into documents of at least {PIECE_BYTES:,} bytes)"
            )
    parts = options.partition(splits["train"]) if options.partition else []
    identity = {key: value for key, value in options.identify(source).items() if value is not None} | _hash_parts(parts)
    plan = store_tokenizer(out, splits["train"], found.contents, options.choice, options.jobs)
    groups = {"train": parts or [splits["train"]], "val": [splits["val"]]}
    chunks = {split: make_chunks(out / split, own, found.contents, plan) for split, own in groups.items()}
    _write_chunks([*chunks["train"], *chunks["val"]], out, options)
    for part, _ in enumerate(groups["train"]):
        if not any(_counts(chunk)["windows"] for chunk in chunks["train"] if chunk.part == part):
            where = f"part {part}" if parts else "the training split"
            raise DataError(f"{where} has no {options.window + 1:,} tokens for one window; use a shorter --window")
    counts = {split: [_counts(chunk) for chunk in own] for split, own in chunks.items()}
    summary = summarize_text(source, found, splits, counts)
    identity |= {"fingerprint": source.fingerprint, "contents": source.content_hash(found.files), "summary": summary}
    _list_documents(out, groups, found)
    for part, _ in enumerate(parts):
        copy_tokenizer(plan, Path(partition_path(out, part)))
    schema = token_schema(plan.window, plan.load(), plan.identity, found.domains)
    write_descriptions(out, schema, chunks, identity, len(parts), summary["windows"]["train"])
    _finish(out)
    for line in text_summary_lines(summary, found.domains):
        options.report(line)
    return open_dataset(out)


def _finish(out: Path) -> None:
    """Remove the files that are only needed to resume."""
    for name in (RECORDS, EXTRACTED):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / UNFINISHED).unlink(missing_ok=True)


def _counts(chunk: TextChunk) -> dict[str, int]:
    counts = chunk.counts()
    if counts is None:
        raise DataError(f"{quote_path(chunk.folder)} was changed by another process; run the same command again")
    return counts


def _hash_parts(parts: Sequence[Sequence[Sample]]) -> dict[str, str]:
    """Return the entry of the description that identifies the partitions; empty if there are none.

    Raises:
        DataError: If a partition is empty.
    """
    if not parts:
        return {}
    if not all(parts):
        raise DataError(f"part {next(n for n, part in enumerate(parts) if not part)} would be empty; use fewer parts")
    names = [sorted(document.name for document in part) for part in parts]
    return {"parts": hashlib.sha256(repr(names).encode()).hexdigest()}


def _write_chunks(chunks: list[TextChunk], out: Path, options: TextOptions) -> None:
    """Write the chunks that are missing or were made from other documents."""
    folders = {chunk.folder for chunk in chunks}
    for split in {folder.parent for folder in folders}:
        split.mkdir(exist_ok=True)
        for folder in split.iterdir():
            if folder not in folders and folder.is_dir():  # from when the source had more documents
                shutil.rmtree(folder)
    (out / RECORDS).mkdir(exist_ok=True)
    missing = [chunk for chunk in chunks if chunk.counts() is None]
    total = sum(document_bytes(document) for chunk in chunks for document in chunk.documents)
    done = total - sum(document_bytes(document) for chunk in missing for document in chunk.documents)
    with run_in_processes(write_text_chunk, missing, options.jobs, "tokens") as written:
        for size in written:
            done += size
            options.on_progress(round(100 * (EXTRACTION_SHARE + (1 - EXTRACTION_SHARE) * done / total)), 100)
    options.on_progress(100, 100)


def _list_documents(out: Path, groups: dict[str, list[list[Sample]]], found: Extracted) -> None:
    """Write a list of all documents with their domain, split and partition."""
    rows = sorted(
        (document.name, found.domains[document.label], split, part)
        for split, parts in groups.items()
        for part, documents in enumerate(parts)
        for document in documents
    )
    keys = ("name", "domain", "split", "part")
    write_text(out / DOCUMENTS, "".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))


# ------------------------------------------------------------------------------------------------ complete data


def _reopen(source: TextSource, out: Path, options: TextOptions) -> DatasetInfo:
    """Return the data set in ``out`` if it was prepared from the same source.

    Raises:
        DataError: If it was prepared from another source, in another way, or from files that changed since.
    """
    stored = dataset.read_json(out / DESCRIPTION).get("source")
    hint = "delete it or use another folder"
    if not isinstance(stored, dict) or stored.get("kind") != source.kind:
        raise DataError(f"{quote_path(out)} holds data from another source; {hint}")
    for key, value in options.identify(source).items():
        if stored.get(key) != value:
            raise DataError(f"{quote_path(out)} was prepared with {key} {stored.get(key)}, not {value}; {hint}")
    info = open_dataset(out)
    if _identify_parts(info, options.partition) != stored.get("parts"):
        raise DataError(f"{quote_path(out)} was prepared with other parts; {hint}")
    if options.check or stored.get("fingerprint") != source.fingerprint:
        with ThreadPoolExecutor(options.jobs) as pool:
            contents = source.content_hash(pool.map(TextFile.hash, source.files))
        if contents != stored.get("contents"):
            raise DataError(
                f"{quote_path(out)} holds data from another source: files were added, removed or changed since; {hint}"
            )
    _finish(out)
    for line in text_summary_lines(stored["summary"], info.schema.metadata["domains"]):
        options.report(line)
    return info


def _identify_parts(info: DatasetInfo, partition: PartitionFunction | None) -> str | None:
    """Return the hash of the partitions that ``partition`` would make of a data set's training documents."""
    if partition is None:
        return None
    labels = {domain: label for label, domain in enumerate(info.schema.metadata["domains"])}
    try:
        rows = [json.loads(line) for line in (info.path / DOCUMENTS).read_text().splitlines()]
        documents = [Sample(row["name"], labels[row["domain"]], "") for row in rows if row["split"] == "train"]
    except OSError as error:
        raise unreadable_error(error, info.path / DOCUMENTS, DataError, dataset.REPREPARE_HINT) from None
    except dataset.INVALID_JSON_ERRORS:
        raise DataError(f"{info.path / DOCUMENTS} is damaged; {dataset.REPREPARE_HINT}") from None
    return _hash_parts(partition(sort_by_name_hash(documents))).get("parts")
