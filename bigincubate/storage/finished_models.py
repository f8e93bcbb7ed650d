"""The finished model of a run: where its weights are."""

from __future__ import annotations

from pathlib import Path

from ..errors import ArtifactError, format_command
from ..files import quote_path
from .run_directory import RunDir


def best_artifact(run: RunDir) -> Path:
    """Return the artifact of a run's final model: the fine-tuned model, or otherwise the end-to-end model.

    Raises:
        ArtifactError: The run has neither yet.
    """
    for folder in (run.phase("finetune").artifact, run.phase("end_to_end").artifact):
        if (folder / "manifest.json").exists():
            return folder
    resume = format_command("run", run.recipe_file, "--run-dir", run.path)
    raise ArtifactError(f"{quote_path(run.path)} has no finished model yet; continue with: {resume}")
