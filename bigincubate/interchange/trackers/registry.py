"""Create trackers by name, with their default destinations."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ...config import TrackerName
from ...errors import ConfigError
from ...files import expand_path, quote_path
from ...storage.run_directory import RunDir
from .base import Tracker, explain_errors
from .replay import FOLDER

PROJECT = "bigincubate"
PACKAGES: dict[TrackerName, str | None] = {"wandb": "wandb", "mlflow": "mlflow", "csv": None}
PROJECT_VARIABLES = {"wandb": "WANDB_PROJECT", "mlflow": "MLFLOW_EXPERIMENT_NAME"}
URI_VARIABLE = "MLFLOW_TRACKING_URI"
URI = re.compile(r"(https?://|file:|sqlite:).*")


def make_tracker(name: TrackerName, run: RunDir, out: str | None = None, project: str | None = None) -> Tracker:
    """Return a tracker.

    Args:
        name: Its name.
        run: The run directory, in which files are written by default.
        out: A folder, or the tracking URI of MLflow.
        project: Project of W&B, or experiment of MLflow; by default that of their own environment variables.

    Raises:
        ConfigError: ``out`` is a URI for a tracker that needs a folder, or the opposite.
        MissingDependencyError: The tracker's package is not installed.
    """
    project = project or os.environ.get(PROJECT_VARIABLES.get(name, ""), "") or PROJECT
    if name == "mlflow":
        from .mlflow_tracker import MlflowTracker

        with explain_errors(name):
            return MlflowTracker(_tracking_uri(run, out), project)
    if out is not None and URI.fullmatch(out):
        raise ConfigError(f"--out {out}: {name} takes a folder, not a URI")
    if name == "wandb":
        from .wandb_tracker import WandbTracker

        return WandbTracker(_folder(run, out, ""), project)
    from .csv_tracker import CsvTracker

    return CsvTracker(_folder(run, out, "csv"))


def _folder(run: RunDir, out: str | None, name: str) -> Path:
    """Return the folder that a tracker writes to.

    Raises:
        ConfigError: It is a file.
    """
    folder = run.path / FOLDER / name if out is None else expand_path(out)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{quote_path(folder)} is a file; give a folder with --out")
    return folder


def _tracking_uri(run: RunDir, out: str | None) -> str:
    uri = out or os.environ.get(URI_VARIABLE) or f"sqlite:///{run.path / FOLDER / 'mlflow.db'}"
    if not URI.fullmatch(uri):
        raise ConfigError(
            f"{uri}: MLflow takes a tracking URI: http://HOST:5000, sqlite:////folder/mlflow.db or file:/folder"
        )
    return uri
