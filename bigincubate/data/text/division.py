"""Divide the documents of a source into training and validation, if wanted with equally much text of each domain."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import ConfigError
from ..samples import Sample
from ..splits import sort_by_name_hash, split_train_val
from .chunks import document_bytes

SHORTFALL = 0.1  # largest share of the wanted bytes that may be missing, because documents are not cut


def divide_documents(
    documents: Sequence[Sample],
    domains: Sequence[str],
    fraction: float,
    *,
    domain_bytes: int | None = None,
    development: bool = False,
) -> dict[str, list[Sample]]:
    """Return the documents of ``"train"`` and ``"val"``.

    Args:
        documents: All documents, each with the number of its domain as label.
        domains: The names of the domains.
        fraction: Share of each domain to hold out: of its documents, or of ``domain_bytes``.
        domain_bytes: Bytes of text of each domain in both splits together; the documents that are too many are left
            out. None: all documents are used.
        development: Whether to divide the training documents again, without those that were held out.

    Raises:
        ConfigError: If a domain has too little text, or no document that is short enough.
    """
    ordered = sort_by_name_hash(documents)
    if domain_bytes is None:
        splits = split_train_val(ordered, fraction)
        return split_train_val(splits["train"], fraction) if development else splits
    held = round(domain_bytes * fraction)
    val, left = _take_bytes(ordered, domains, held, "validation")
    train, _ = _take_bytes(left, domains, domain_bytes - held, "training")
    if development:
        val, train = _take_bytes(train, domains, round((domain_bytes - held) * fraction), "validation")
    return {"train": train, "val": val}


def _take_bytes(
    documents: Sequence[Sample], domains: Sequence[str], size: int, what: str
) -> tuple[list[Sample], list[Sample]]:
    """Return documents with at most so many bytes of each domain, the last ones that fit, and all others."""
    totals, sizes = [0] * len(domains), [0] * len(domains)
    taken, left = list[Sample](), list[Sample]()
    for document in reversed(documents):
        fits = totals[document.label] + document_bytes(document) <= size
        (taken if fits else left).append(document)
        totals[document.label] += fits * document_bytes(document)
        sizes[document.label] += document_bytes(document)
    for domain, total, available in zip(domains, totals, sizes, strict=True):
        if not total or total < (1 - SHORTFALL) * size:
            raise ConfigError(
                f"domain {domain} has documents of {total:,} bytes for the {size:,} bytes of its {what} text; use a"
                f" {'smaller' if available < size else 'larger'} --domain-bytes, or another --val-fraction"
            )
    return taken[::-1], left[::-1]
