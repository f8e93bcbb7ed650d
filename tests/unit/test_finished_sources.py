"""What identifies the weights that fine-tuning may start from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bigincubate.errors import ArtifactError
from bigincubate.files import drop_folders
from bigincubate.storage.finished_models import describe_weights, identify_weights


@pytest.mark.parametrize("prefix", ["timm:local-dir:", "transformers:"])
def test_local_folder_that_a_library_names_is_identified_by_its_content(prefix: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    name = f"{prefix}{folder}"
    before = identify_weights(name)
    assert before == identify_weights(str(folder))
    assert drop_folders(describe_weights(name, before)) == f"{prefix}model (SHA-256 {before})"
    (folder / "model.safetensors").write_bytes(b"others")
    assert identify_weights(name) != before
    os.mkfifo(folder / "more.safetensors")  # reading it would never end
    with pytest.raises(ArtifactError, match="not a file but a folder, pipe or device"):
        identify_weights(name)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("/home/me/run", "run"),
        ("~/run, timm:vit_tiny", "run, timm:vit_tiny"),
        ("timm:hf-hub:owner/name", "timm:hf-hub:owner/name"),
        ("timm:local-dir:/home/me/x", "timm:local-dir:x"),
        ("transformers:~/x", "transformers:x"),
        ("transformers:owner/name", "transformers:owner/name"),
    ],
)
def test_paths_are_published_without_their_folders(text: str, says: str) -> None:
    assert drop_folders(text) == says
