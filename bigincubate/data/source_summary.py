"""What the description of prepared data says about its source: counts, what was skipped, and what deserves a look."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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


def summary_lines(summary: Mapping[str, Any], classes: Sequence[str]) -> list[str]:
    """Return the summary as lines of text."""
    counts, lines = summary["counts"], []
    if origins := _describe_origins(summary):
        parts = [f"{split}: {sum(counts[split]):,} images{origins[split]}" for split in ("train", "val")]
        lines.append("; ".join(parts))
    lines.append(_describe_classes(counts, classes))
    if missing := [name for name, count in zip(classes, counts["val"], strict=True) if not count]:
        lines.append(f"no validation images of: {_list_some(missing)}")
    if empty := summary.get("empty_classes"):
        lines.append(f"classes without training images, left out: {_list_some(empty)}")
    if skipped := summary.get("skipped"):
        lines.append("skipped files: " + ", ".join(f"{count:,} {reason}" for reason, count in skipped.items()))
    for path, other in summary.get("linked", [])[:1]:
        lines.append(f"links are counted once: {path} leads to {other}")
    if unused := summary.get("unused"):
        lines.append("unused folders: " + ", ".join(f"{name}/" for name in unused))
    if count := summary["unreadable"]:
        lines.append(f"left out: {count:,} unreadable image{'s' * (count != 1)}, listed in {UNREADABLE_FILES}")
    if count := summary["in_both_splits"]["count"]:
        name, other = summary["in_both_splits"]["examples"][0]
        lines.append(f"warning: {count:,} validation images are also training images: {name} is equal to {other}")
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


def _describe_classes(counts: Mapping[str, Sequence[int]], classes: Sequence[str]) -> str:
    pairs = list(zip(classes, counts["train"], counts["val"], strict=True))
    text = "classes (training + validation): "
    if len(pairs) <= MAX_LISTED_CLASSES:
        return text + ", ".join(f"{name} {train:,} + {val:,}" for name, train, val in pairs)
    pairs.sort(key=lambda pair: pair[1])
    (least, few, few_val), (most, many, many_val) = pairs[0], pairs[-1]
    sizes = f"from {least} {few:,} + {few_val:,} to {most} {many:,} + {many_val:,}"
    return f"{text}{len(pairs):,}, {sizes}; all are in dataset.json"
