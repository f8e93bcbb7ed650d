"""Files that the package writes have the mode that the umask gives."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigincubate.data.prepare import prepare_dataset
from bigincubate.interchange.export import export, export_official


@pytest.fixture
def set_umask() -> Any:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_files_have_the_mode_of_the_umask(
    umask: int, harness: Callable[..., Any], set_umask: Callable[[int], None], tmp_path: Path
) -> None:
    """Every file: of prepared data, a run, checkpoints, artifacts and exports."""
    set_umask(umask)
    prepare_dataset("digits-dev", tmp_path / "data")
    made = harness("train.max_steps=2", "log.every_steps=1", f"data.path={tmp_path / 'data'}")
    made.train("end_to_end")
    made.run.update_summary()
    export(made.run.path, tmp_path / "export")
    export_official(made.run.path, tmp_path / "official.pth")
    files = [path for root in (made.run.path, tmp_path) for path in root.rglob("*")]
    assert {path.suffix for path in files} >= {".json", ".jsonl", ".mds", ".safetensors", ".pth", ".toml", ".lock"}
    for path in files:
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert (path, stat.S_IMODE(path.stat().st_mode)) == (path, expected)
