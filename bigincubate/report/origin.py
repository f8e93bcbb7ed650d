"""Find the run that trained a model, and the artifacts that the model was made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import PHASES, Recipe
from ..data.dataset import DatasetInfo, describe_dataset
from ..errors import BigincubateError
from ..planning.lineage import phase_inputs
from ..storage.artifacts import ArtifactManifest, Lineage, check_lineage, load_manifest
from ..storage.finished_models import find_artifact
from ..storage.run_directory import RunDir, find_run, is_complete_export
from .run_data import PhaseData, RunData, read_run


@dataclass(frozen=True)
class Origin:
    """The run that trained a model.

    Attributes:
        run_data: All data of the run.
        manifest: Description of the artifact of the model.
        lineage: Descriptions of the artifacts that the model was made from, and of its own, by key of the phase.
        data: The data set of the last phase; None if it is not there any more.
    """

    run_data: RunData
    manifest: ArtifactManifest
    lineage: dict[str, ArtifactManifest]
    data: DatasetInfo | None

    @property
    def recipe(self) -> Recipe:
        """Return the recipe."""
        return self.run_data.recipe

    @property
    def phases(self) -> list[PhaseData]:
        """Return the finished phases that the model was made from, in order."""
        return [phase for phase in self.run_data.phases if phase.key in self.lineage and phase.result]

    @property
    def modules(self) -> list[PhaseData]:
        """Return the phases of the modules."""
        return [phase for phase in self.phases if phase.planned["phase"] == "incubate"]

    @property
    def assembled(self) -> dict[str, Any] | None:
        """Return the result of the assembled model before fine-tuning, or None if it is not in the lineage."""
        made_of_modules = self.manifest.phase in ("assembled", "finetune")
        route = self.run_data.main
        return route.assembled if made_of_modules and route else None

    @property
    def result(self) -> dict[str, Any] | None:
        """Return the result of the exported model."""
        own = next((phase.result for phase in self.phases if phase.key == self.manifest.phase), None)
        return self.assembled if self.manifest.phase == "assembled" else own

    @property
    def data_name(self) -> str | None:
        """Return the name of the data: that of built-in data, or otherwise that of its folder."""
        settings = self.recipe.data
        return settings.source or (Path(settings.path).name if settings.path else None)


def find_origin(source: Path) -> Origin | None:
    """Return the run that trained a model; None if it is unknown, or was changed since.

    Args:
        source: A run directory, a phase's directory, an artifact, or an exported folder, which does not name its run.

    Raises:
        ArtifactError: There is no complete model in ``source``.
    """
    if is_complete_export(source):
        return None
    artifact = find_artifact(source)
    manifest, run = load_manifest(artifact), find_run(artifact)
    if run is None or manifest.module is not None or not _is_artifact_of(run, manifest, artifact):
        return None
    try:
        run_data = read_run(run, lambda _: None)
    except BigincubateError:
        return None
    planned = {row["key"]: row for row in run_data.plan["rows"]}
    row = planned.get("finetune" if manifest.phase == "assembled" else manifest.phase)
    if row is None or check_lineage(manifest, Lineage(row["identity"], row["data"], {})) is not None:
        return None
    return Origin(run_data, manifest, _trace(run, manifest), _read_data(run_data, manifest))


def _is_artifact_of(run: RunDir, manifest: ArtifactManifest, artifact: Path) -> bool:
    """Return whether an artifact is in its place in a run."""
    folders = {phase: run.phase(phase) for phase in PHASES if phase != "incubate"} | {"assembled": run.assembled}
    return manifest.phase in folders and folders[manifest.phase].artifact.resolve() == artifact.resolve()


def _trace(run: RunDir, manifest: ArtifactManifest) -> dict[str, ArtifactManifest]:
    """Return the artifacts that an artifact was made from, as far as the run still has them, and itself, by key."""
    found: dict[str, ArtifactManifest] = {}
    for name, source in phase_inputs(manifest.identity).items():
        try:
            made_from = load_manifest(run.phase(source.phase, source.module).artifact)
        except BigincubateError:
            continue
        if made_from.digest == manifest.inputs.get(name):
            found |= _trace(run, made_from)
    key = manifest.phase if manifest.module is None else f"{manifest.phase}/{manifest.module}"
    return {**found, key: manifest}


def _read_data(run_data: RunData, manifest: ArtifactManifest) -> DatasetInfo | None:
    try:
        info = describe_dataset(run_data.run.data_path(run_data.recipe))
    except BigincubateError:
        return None
    return info if info.digest == manifest.data else None
