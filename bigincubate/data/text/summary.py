"""Summarize prepared text: counts of documents, tokens and windows, and what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import format_count
from ..samples import Sample
from ..source_summary import UNREADABLE_FILES, describe_counts
from .chunks import document_bytes
from .extraction import Extracted
from .files import TextSource


def summarize_text(
    source: TextSource,
    found: Extracted,
    splits: Mapping[str, Sequence[Sample]],
    counts: Mapping[str, Sequence[Mapping[str, int]]],
) -> dict[str, Any]:
    """Return the summary of prepared text as plain JSON values.

    Args:
        source: The source.
        found: The documents that were extracted from it.
        splits: The documents of each split.
        counts: The numbers of tokens and windows of the chunks of each split.
    """
    sizes = {
        split: [sum(document_bytes(each) for each in own if each.label == label) for label in range(len(found.domains))]
        for split, own in splits.items()
    }
    labels = {split: Counter(document.label for document in own) for split, own in splits.items()}
    return {
        **source.notes,
        "documents": {split: [own[label] for label in range(len(found.domains))] for split, own in labels.items()},
        "bytes": {split: sum(own) for split, own in sizes.items()},
        "domain_bytes": sizes,
        **{
            key: {split: sum(count[key] for count in own) for split, own in counts.items()}
            for key in ("tokens", "windows")
        },
        "duplicates": found.duplicates,
        "empty": found.empty,
        "unused": len(found.documents) - sum(map(len, splits.values())),
        "unreadable": len(found.unreadable),
    }


def text_summary_lines(summary: Mapping[str, Any], domains: Sequence[str]) -> list[str]:
    """Return the summary as lines of text."""
    lines = []
    for split, documents in summary["documents"].items():
        numbers = [format_count(sum(documents), "document")]
        numbers += [format_count(summary[f"{noun}s"][split], noun) for noun in ("byte", "token", "window")]
        lines.append(f"{split}: {', '.join(numbers)}")
    if len(domains) > 1:
        lines.append(describe_counts("domains", summary["documents"], domains))
        if summary.get("unused") and "domain_bytes" in summary:
            lines.append(describe_counts("bytes of domains", summary["domain_bytes"], domains))
    if "interpreter" in summary:
        lines.append(f"modules of {summary['interpreter']}")
    left_out = [
        _count(summary["duplicates"], "duplicate"),
        _count(summary["empty"], "empty document"),
        _count(summary.get("unused", 0), "document", " by --domain-bytes or --development"),
        _count(summary["unreadable"], "unreadable document", f", listed in {UNREADABLE_FILES}"),
        _count(summary.get("missing_modules", 0), "module", " that this interpreter lacks"),
    ]
    if any(left_out):
        lines.append("left out: " + "; ".join(filter(None, left_out)))
    if skipped := summary.get("skipped"):
        lines.append("skipped files: " + ", ".join(f"{suffix}: {count:,}" for suffix, count in skipped.items()))
    return [line.encode(errors="backslashreplace").decode() for line in lines]


def _count(count: int, what: str, more: str = "") -> str:
    """Return a count with its noun, in the plural if needed; an empty string for zero."""
    return format_count(count, what) + more if count else ""
