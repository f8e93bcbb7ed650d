"""The lineage that the artifact of a phase must have, from the plan and the artifacts that the phase reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..config import Phase
from ..config.seeds import phase_key
from ..errors import ArtifactError
from ..storage.artifacts import Lineage, load_manifest
from ..storage.run_directory import RunDir


def expected_lineage(run: RunDir, phase: Phase, module: int | None = None) -> Lineage:
    """Return the lineage that the artifact of a phase must have in the current state of the run.

    Raises:
        ArtifactError: The plan does not have the phase, or an artifact that the phase reads is missing or damaged.
    """
    row = next((row for row in run.planned_rows if row["key"] == phase_key(phase, module)), None)
    if row is None:
        raise ArtifactError(f"{phase_key(phase, module)} is not in the plan of {run.path}")
    inputs = {
        name: load_manifest(run.phase(source.phase, source.module).artifact).digest
        for name, source in phase_inputs(row["identity"]).items()
    }
    return Lineage(row["identity"], row["data"], inputs)


class PhaseInput(NamedTuple):
    """A phase whose artifact another phase reads."""

    phase: Phase
    module: int | None

    @property
    def key(self) -> str:
        """Return the key of the phase."""
        return phase_key(self.phase, self.module)


def phase_inputs(identity: Mapping[str, Any]) -> dict[str, PhaseInput]:
    """Return the phases whose artifacts a phase reads, by artifact name, such as ``meta`` or ``module/0``."""
    inputs: dict[str, PhaseInput] = {}
    first = 0
    for slot in identity["slots"]:
        if slot["source"] in ("meta", "expand"):
            inputs["meta"] = PhaseInput("pretrain", None)
        elif slot["source"] == "module":
            inputs |= {f"module/{k}": PhaseInput("incubate", k) for k in range(first, first + slot["modules"])}
        first += slot["modules"]
    return inputs
