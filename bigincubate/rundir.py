"""The run directory: one deterministic tree, no timestamps, so that a job that runs again finds its own past.

::

    RUN/
      recipe.toml           the resolved recipe
      plan.json             depths, sizes and costs of every phase
      events.jsonl          what happened, a line an event
      summary.json          the results, a phase each
      data/                 embedded data only; other data stays where it is
      meta/                 pre-training of the meta model
      modules/00 … K-1/     incubation of module k
      modules/logs/         of the loader that co-trained modules share
      assembled/            the modules joined, before fine-tuning
      finetune/  end_to_end/
        checkpoints/step-00000500/    resume checkpoints
        artifact/                     what the phase hands on: weights.safetensors, manifest.json, COMMITTED
        metrics.jsonl  tb/  logs/
        attempts/1.json               running, preempted, failed or done
        owners/1.json                 whose the folder is; the last one counts
        partial.json                  of a module: its score beside those that were finished when it was
        rollback.json                 where training went back to after too many gradients that were not finite
        requeues.jsonl                of a Slurm job: why, and from which checkpoint it goes on
        DONE                          the result; last thing written
      fleet/                how far each phase is, for TensorBoard: the same tags for all
      partial/              the scores of partial.json, for TensorBoard, over the number of modules
      report.html           of `bigincubate report`, as things stood then
      slurm/  jobs.json     logs of jobs and their ranks; what was submitted, and how often
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import Phase, Recipe, differences, load_recipe
from .errors import ArtifactError, ConfigError
from .files import append_line, read_json, write_json, write_text

FOLDERS: dict[str, str] = {"pretrain": "meta", "finetune": "finetune", "end_to_end": "end_to_end"}


@dataclass(frozen=True)
class PhaseDir:
    """The folder of one phase, or of one module's incubation."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def artifact(self) -> Path:
        return self.path / "artifact"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def result(self) -> dict[str, Any] | None:
        """What the phase ended with; None while it has not."""
        return read_json(self.path / "DONE") or None

    def finish(self, result: dict[str, Any]) -> None:
        write_json(self.path / "DONE", result)

    @property
    def rollback(self) -> dict[str, Any] | None:
        """The one return to a checkpoint (step ``to``) after too many gradients that were not finite; None without."""
        return read_json(self.path / "rollback.json")

    def note_rollback(self, to: int, **fields: Any) -> None:
        write_json(self.path / "rollback.json", {"to": to, **fields})

    @property
    def partial(self) -> dict[str, Any] | None:
        """Of a module: how it did, when it was finished, beside the modules ``joined`` that were (itself included) and
        the meta model for the others: ``top1``, ``top5`` (percent), ``loss``. None before."""
        return read_json(self.path / "partial.json")

    def note_partial(self, scores: dict[str, Any]) -> None:
        write_json(self.path / "partial.json", scores)

    def attempts(self) -> list[dict[str, Any]]:
        """Every attempt at this phase, oldest first."""
        files = sorted((self.path / "attempts").glob("*.json"), key=lambda file: int(file.stem))
        return [attempt for file in files if (attempt := read_json(file))]

    def record(self, number: int, **fields: Any) -> None:
        write_json(self.path / "attempts" / f"{number}.json", {"attempt": number, "time": time.time(), **fields})


@dataclass(frozen=True)
class RunDir:
    path: Path

    def phase(self, phase: Phase, module: int | None = None) -> PhaseDir:
        if phase == "incubate":
            assert module is not None
            return PhaseDir(self.path / "modules" / f"{module:02d}")
        return PhaseDir(self.path / FOLDERS[phase])

    @property
    def assembled(self) -> PhaseDir:
        return PhaseDir(self.path / "assembled")

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.toml"

    def note(self, event: str, **fields: Any) -> None:
        append_line(self.path / "events.jsonl", {"time": time.time(), "event": event, **fields})

    def open(self, recipe: Recipe) -> None:
        """Make the directory this recipe's own.

        Raises:
            ConfigError: it belongs to a recipe that differs in an identity key; the message shows the difference.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file; give a directory with --run-dir")
        if not self.recipe_file.exists() and write_text(self.recipe_file, recipe.toml(), exclusive=True):
            self.note("created", recipe=recipe.name, digest=recipe.digest)
            return
        before = self.recipe()
        if changed := differences(before, recipe):
            raise ConfigError(
                f"{self.path} belongs to another experiment; it differs in {'; '.join(changed)}."
                " Use another --run-dir, or the settings it was made with"
            )
        if moved := differences(before, recipe, execution_keys=True):
            write_text(self.recipe_file, recipe.toml())
            self.note("execution_changed", changes=moved)

    def recipe(self) -> Recipe:
        if not self.recipe_file.exists():
            raise ArtifactError(f"{self.path} is not a run directory (no recipe.toml in it)")
        return load_recipe(str(self.recipe_file))

    def summary(self) -> dict[str, Any]:
        """The results that are there, and ``summary.json`` brought up to date with them."""
        modules = sorted((self.path / "modules").glob("[0-9]*"))
        results: dict[str, Any] = {
            "meta": self.phase("pretrain").result,
            "modules": [PhaseDir(folder).result for folder in modules],
            "assembled": self.assembled.result,
            "finetune": self.phase("finetune").result,
            "end_to_end": self.phase("end_to_end").result,
        }
        if results != read_json(self.path / "summary.json"):
            write_json(self.path / "summary.json", results)
        return results
