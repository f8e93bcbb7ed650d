"""Record schemas: a task refuses records of another kind, and the digest covers all of the schema."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bigincubate.config import DataConfig, Settings
from bigincubate.data.chunks import write_chunk, write_description
from bigincubate.data.dataset import RecordSchema, compute_dataset_digest, open_dataset
from bigincubate.errors import ConfigError
from bigincubate.tasks.registry import make_task

SCHEMA = RecordSchema("tokens", {"tokens": "bytes"}, {"vocabulary": 7})


def test_task_refuses_records_of_another_kind_naming_both(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        write_chunk(tmp_path / split / "00000", SCHEMA.columns, [{"tokens": b"abc"}])
    chunks = {split: [tmp_path / split / "00000"] for split in ("train", "val")}
    digest = write_description(tmp_path, SCHEMA, chunks, {}, {})
    info = open_dataset(tmp_path)
    assert (info.schema, info.digest, info.samples) == (SCHEMA, digest, {"train": 1, "val": 1})
    settings = Settings.model_validate({"model": {"name": "vit_tiny_patch16_224"}})
    with pytest.raises(ConfigError, match="kind tokens; the task reads labelled_image") as caught:
        make_task(settings, DataConfig()).check_dataset(info)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"kind": "image"}, {"columns": {"tokens": "int"}}, {"metadata": {"vocabulary": 8}}], ids=str
)
def test_dataset_digest_changes_with_the_schema(change: dict[str, object]) -> None:
    splits = {"train": {"samples": 1, "index": "0" * 64}}
    before = compute_dataset_digest(SCHEMA, splits, {})
    assert compute_dataset_digest(replace(SCHEMA), splits, {}) == before
    assert compute_dataset_digest(replace(SCHEMA, **change), splits, {}) != before  # type: ignore[arg-type]
