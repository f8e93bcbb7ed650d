"""How text is divided: the bytes of each domain, and a development split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_text_prepare import small_chunks
from text_files import read_listed, write_texts

from bigincubate.data.partitions import partition_by_domain
from bigincubate.data.text.prepare import prepare_text
from bigincubate.errors import ConfigError, DataError

__all__ = ["small_chunks"]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("many") / "source", per_domain=60)


def _bytes_of(folder: Path, source: Path) -> dict[tuple[str, str], int]:
    """Return the bytes of text of each split and domain."""
    sizes: dict[tuple[str, str], int] = {}
    for row in read_listed(folder):
        key = row["split"], row["domain"]
        sizes[key] = sizes.get(key, 0) + (source / row["name"]).stat().st_size
    return sizes


def test_domains_have_equally_many_bytes(many: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    options: dict[str, Any] = {"window": 16, "val_fraction": 0.25, "domain_bytes": 6000}
    info = prepare_text(str(many), tmp_path / "out", **options, partition=partition_by_domain, report=lines.append)
    sizes = _bytes_of(tmp_path / "out", many)
    assert len(sizes) == 6
    for (split, domain), size in sizes.items():
        wanted = 1500 if split == "val" else 4500
        assert 0.9 * wanted <= size <= wanted, domain
    assert len(info.parts) == 3
    used = len(read_listed(tmp_path / "out"))
    assert f"left out: {180 - used} documents by --domain-bytes or --development" in lines
    assert any(line.startswith("bytes of domains (training + validation): a 4,") for line in lines)
    assert prepare_text(str(many), tmp_path / "out", **options, partition=partition_by_domain) == info
    with pytest.raises(DataError, match="was prepared with domain_bytes 6000, not None"):
        prepare_text(str(many), tmp_path / "out", window=16, val_fraction=0.25)


@pytest.mark.parametrize(
    ("domain_bytes", "says"),
    [
        (10**6, r"domain a has documents of [\d,]+ bytes for the 250,000 bytes of its validation text"),
        (40, "use a larger --domain-bytes"),
        (10**6, "use a smaller --domain-bytes"),
        (0, "domain_bytes = 0"),
    ],
)
def test_wrong_number_of_bytes_is_refused(many: Path, tmp_path: Path, domain_bytes: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        prepare_text(str(many), tmp_path / "out", window=16, val_fraction=0.25, domain_bytes=domain_bytes)


@pytest.mark.parametrize("domain_bytes", [None, 6000])
def test_development_split_has_no_document_of_the_validation(
    many: Path, tmp_path: Path, domain_bytes: int | None
) -> None:
    options: dict[str, Any] = {"window": 16, "val_fraction": 0.25, "domain_bytes": domain_bytes}
    prepare_text(str(many), tmp_path / "whole", **options)
    prepare_text(str(many), tmp_path / "development", **options, development=True)
    names = {
        (folder, split): {row["name"] for row in read_listed(tmp_path / folder) if row["split"] == split}
        for folder in ("whole", "development")
        for split in ("train", "val")
    }
    train, val = names["development", "train"], names["development", "val"]
    assert train
    assert val
    assert not train & val
    assert train | val <= names["whole", "train"]
    with pytest.raises(DataError, match="was prepared with development True, not None"):
        prepare_text(str(many), tmp_path / "development", **options)
