"""What the description of prepared data says about its source: counts, what was skipped, and what deserves a look."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError, format_count
from ..files import quote_path, write_text
from .chunk_records import Chunk, ChunkRecord
from .samples import Source

UNREADABLE_FILES = "unreadable-files.txt"
MAX_LISTED_CLASSES = 20


def summarize_source(source: Source, chunks: Iterable[tuple[str, Chunk, ChunkRecord]]) -> dict[str, Any]:
    """Return the summary of a source that has been read, as plain JSON values.

    Args:
        source: The source.
        chunks: Split, chunk and record of all chunks.
    """
    counts = {split: [0] * len(source.classes) for split in source.splits}
    names: dict[str, dict[str, str]] = {"train": {}, "val": {}}  # content -> name
    same: list[list[str]] = []
    unreadable, turned, chunks = 0, 0, list(chunks)
    for split, chunk, record in chunks:
        turned += record.turned
        unreadable += len(record.unreadable)
        for sample, content in zip(chunk.samples, record.contents, strict=True):
            if sample.name not in record.unreadable:
                counts[split][sample.label] += 1
                names[split].setdefault(content, sample.name)
    for split, chunk, record in chunks:
        if split == "val":
            for sample, content in zip(chunk.samples, record.contents, strict=True):
                if sample.name not in record.unreadable and content in names["train"]:
                    same.append([sample.name, names["train"][content]])
    return {
        **source.notes,
        "counts": counts,
        "unreadable": unreadable,
        "turned": turned,
        "in_both_splits": {"count": len(same), "examples": sorted(same)[:3]},
    }


def report_unreadable(
    bad: Iterable[tuple[str, str]], total: int, what: str, out: Path, report: Callable[[str], None], *, skip: bool
) -> None:
    """List what cannot be read, also in a file.

    Args:
        bad: Path and reason of each.
        total: Number of all, also those that can be read.
        what: What they are, such as ``image``.
        out: The folder of the data.
        report: Called with each line of the list.
        skip: Whether they are to be left out.

    Raises:
        DataError: If there are any, unless they are to be left out.
    """
    file, bad = out / UNREADABLE_FILES, sorted(bad)
    if not bad:
        file.unlink(missing_ok=True)
        return
    lines = [f"{path}: {why}".encode(errors="backslashreplace").decode() for path, why in bad]
    write_text(file, "".join(f"{line}\n" for line in lines))
    for line in lines:
        report(f"unreadable: {line}")
    if not skip:
        first = f"{len(bad):,} of {total:,} {what}s cannot be read" if len(bad) > 1 else f"1 {what} cannot be read"
        raise DataError(
            f"{first}: {lines[0]}{', …' if len(bad) > 1 else ''}; repair or remove {'them' if len(bad) > 1 else 'it'},"
            f" or add --skip-bad, then run the same command again to resume (list: {quote_path(file)})"
        )


def summary_lines(summary: Mapping[str, Any], classes: Sequence[str]) -> list[str]:
    """Return the summary as lines of text."""
    counts, lines = summary["counts"], []
    if origins := _describe_origins(summary):
        parts = [f"{split}: {format_count(sum(counts[split]), 'image')}{origins[split]}" for split in ("train", "val")]
        lines.append("; ".join(parts))
    lines.append(describe_counts("classes", counts, classes))
    if missing := [name for name, count in zip(classes, counts["val"], strict=True) if not count]:
        lines.append(f"no validation images of: {_list_some(missing)}")
    if empty := summary.get("empty_classes"):
        lines.append(f"classes without training images, left out: {_list_some(empty)}")
    if skipped := summary.get("skipped"):
        lines.append("skipped files: " + ", ".join(f"{reason}: {count:,}" for reason, count in skipped.items()))
    for path, other in summary.get("linked", [])[:1]:
        lines.append(f"links are counted once: {path} leads to {other}")
    if unused := summary.get("unused"):
        lines.append("unused folders: " + ", ".join(f"{name}/" for name in unused))
    if count := summary["unreadable"]:
        lines.append(f"left out: {format_count(count, 'unreadable image')}, listed in {UNREADABLE_FILES}")
    if count := summary["in_both_splits"]["count"]:
        name, other = summary["in_both_splits"]["examples"][0]
        images = format_count(count, "validation image")
        lines.append(f"warning: {images} also in the training images; {name} is equal to {other}")
    if summary["turned"]:
        lines.append(
            f'images with an EXIF orientation: {summary["turned"]:,}; augment.exif = "apply" turns them upright'
        )
    return lines


def _list_some(names: Sequence[str]) -> str:
    """Return the first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def _describe_origins(summary: Mapping[str, Any]) -> dict[str, str]:
    """Return where the images of each split come from; nothing for built-in data."""
    folders, others = summary.get("folders", {}), summary.get("origins", {})
    origins = {split: f" from {folder}/" if folder != "." else "" for split, folder in folders.items()}
    origins |= {split: f" from {origin}" for split, origin in others.items()}
    if origins and "val" not in origins:
        origins["val"] = f", {summary['val_fraction']:.0%} of each class held out"
    return origins


def describe_counts(what: str, counts: Mapping[str, Sequence[int]], classes: Sequence[str]) -> str:
    """Return how many samples of each class there are, as a line of text that calls the classes ``what``."""
    pairs = list(zip(classes, counts["train"], counts["val"], strict=True))
    text = f"{what} (training + validation): "
    if len(pairs) <= MAX_LISTED_CLASSES:
        return text + ", ".join(f"{name} {train:,} + {val:,}" for name, train, val in pairs)
    pairs.sort(key=lambda pair: pair[1])
    (least, few, few_val), (most, many, many_val) = pairs[0], pairs[-1]
    sizes = f"from {least} {few:,} + {few_val:,} to {most} {many:,} + {many_val:,}"
    return f"{text}{len(pairs):,}, {sizes}; all are in dataset.json"
