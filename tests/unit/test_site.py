"""The documentation site builds without a warning."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MISSING = [name for name in ("mkdocs", "material", "mkdocstrings_handlers") if find_spec(name) is None]


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (pip install 'bigincubate[dev]')")
def test_site_builds_strictly_with_the_api_reference(tmp_path: Path) -> None:
    """Broken links, pages that the navigation lacks, and names that the reference does not find are warnings."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    reference = (tmp_path / "site" / "api" / "index.html").read_text()
    for name in ("config.load_recipe", "models.partition.Partition", "api.run", "tasks.base.Task.loss"):
        assert f'id="bigincubate.{name}"' in reference
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages == {folder.parent.name for folder in (tmp_path / "site").glob("*/index.html")}
