"""The run directory: fixed names without timestamps, so that a restarted job finds its earlier work.

::

    RUN/
      recipe.toml           the resolved recipe
      plan.json             depths, sizes and costs of every phase
      events.jsonl          events, one per line
      summary.json          the results of all phases
      data/                 built-in data only; other data is not copied
      meta/                 pre-training of the meta model
      modules/00 … K-1/     incubation of module k
      modules/logs/         logs of helper processes of the modules, such as a shared loader
      assembled/            the joined modules, before fine-tuning
      finetune/  end_to_end/
        checkpoints/step-00000500/    resume checkpoints
        artifact/                     the output of the phase: weights.safetensors, manifest.json, COMMITTED
        metrics.jsonl  tb/  logs/
        start_rate.json               GFLOP/s in the first steps of the last attempt, before there are metrics
        flight_recorder/1/            last collectives of each rank in attempt 1, if a rank hung
        profile/                      traces of the steps in train.profile
        attempts/1.json               running, preempted, failed or done
        owners/1.json                 the process that owns the folder; the highest number is valid
        stragglers.json               ranks that are currently slower than the others
        partial.json                  for a module: score of the partial assembly when the module was finished
        rollback.json                 the step that training rolled back to after too many non-finite gradients
        requeues.jsonl                for a Slurm job: why it was requeued, and from which checkpoint it resumes
        DONE                          the result; written last
      fleet/                progress of each phase for TensorBoard, in the same charts
      partial/              the scores in partial.json for TensorBoard, over the number of modules
      report.html           written by `bigincubate report`
      trackers/             files of `bigincubate track` and `log.trackers`, by default
      slurm/  jobs.json     logs of jobs and their ranks; submitted jobs and numbers of submissions
      slurm/PHASE.error     why the last job of a phase, or the gate, could not start bigincubate
      owners/               the process that is changing recipe.toml and plan.json
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Phase, Recipe, differences, load_recipe
from ..errors import ArtifactError, ConfigError, DataError
from ..files import (
    append_json_line,
    is_present,
    list_folder,
    quote_path,
    read_json,
    read_json_lines,
    write_json,
    write_text,
)
from .lease import current_owner
from .record_types import (
    ATTEMPT_TYPES,
    EVENT_TYPES,
    METRIC_TYPES,
    PARTIAL_TYPES,
    REQUEUE_TYPES,
    RESULT_TYPES,
    STRAGGLER_TYPES,
    ListOf,
    Types,
    has_types,
    is_plan,
    keep_numbers,
)

START_RATE = "start_rate.json"
FOLDERS: dict[str, str] = {"pretrain": "meta", "finetune": "finetune", "end_to_end": "end_to_end"}


@dataclass(frozen=True)
class PhaseDir:
    """The folder of one phase, or of the incubation of one module.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the resume checkpoints."""
        return self.path / "checkpoints"

    @property
    def artifact(self) -> Path:
        """Return the folder of the output of the phase."""
        return self.path / "artifact"

    @property
    def metrics(self) -> Path:
        """Return the file of the logged metrics, one JSON object per line."""
        return self.path / "metrics.jsonl"

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the logged metrics, one row per logged step.

        Raises:
            OSError: The file cannot be read.
        """
        return keep_numbers(_read_objects(self.metrics, METRIC_TYPES))

    def read_last_metrics(self) -> dict[str, Any]:
        """Return the latest value of each metric in the last rows that were logged; empty if there are none.

        Raises:
            OSError: The file cannot be read.
        """
        values: dict[str, Any] = {}
        for row in keep_numbers(_read_objects(self.metrics, METRIC_TYPES, last_bytes=4096)):
            values |= row
        return values

    @property
    def start_rate(self) -> float | None:
        """Return the GFLOP/s in the first steps of the last attempt, or None if they are unknown."""
        found = _read_object(self.path / START_RATE, {"gflops": float})
        return None if found is None else float(found["gflops"])

    @property
    def result(self) -> dict[str, Any] | None:
        """Return the result of the phase (``Task.make_result``), or None before it is done, or if it is damaged."""
        return _read_object(self.path / "DONE", RESULT_TYPES)

    def write_result(self, result: dict[str, Any]) -> None:
        """Write the result, which marks the phase as done."""
        write_json(self.path / "DONE", result)

    @property
    def begun(self) -> bool:
        """Return whether a changed recipe could destroy work of the phase: it has a result or a checkpoint, or it runs.

        Attempts that ended before their first checkpoint do not count, because the next attempt starts over.

        Raises:
            OSError: This is unknown, because a folder cannot be read.
        """
        kept = is_present(self.path / "DONE") or bool(list_folder(self.checkpoints))
        return kept or current_owner(self.path) is not None

    @property
    def rollback(self) -> dict[str, Any] | None:
        """Return the one rollback to a checkpoint (step ``to``) after too many non-finite gradients, or None."""
        return _read_object(self.path / "rollback.json", {"to": int})

    def write_rollback(self, to: int, **fields: Any) -> None:
        """Record that training rolled back to the checkpoint of step ``to``."""
        write_json(self.path / "rollback.json", {"to": to, **fields})

    @property
    def partial(self) -> dict[str, Any] | None:
        """Return the result of the partial assembly when this module was finished, or None before.

        The assembly consisted of the modules in ``joined`` (including this one), and the meta model in place of others.
        """
        return _read_object(self.path / "partial.json", PARTIAL_TYPES)

    def write_partial(self, scores: dict[str, Any]) -> None:
        """Write the score of the partial assembly."""
        write_json(self.path / "partial.json", scores)

    @property
    def stragglers(self) -> list[dict[str, Any]]:
        """Return the ranks that were slower than the others when the last attempt compared them, slowest first."""
        found = _read_object(self.path / "stragglers.json", {"ranks": ListOf(STRAGGLER_TYPES)})
        rows: list[dict[str, Any]] = found["ranks"] if found else []
        return rows

    def write_stragglers(self, rows: list[dict[str, Any]]) -> None:
        """Write the ranks that are slower than the others."""
        if rows or self.stragglers:
            write_json(self.path / "stragglers.json", {"ranks": rows})

    def read_attempts(self) -> list[dict[str, Any]]:
        """Return all attempts at this phase, oldest first. Damaged files and those with other names are ignored.

        Raises:
            OSError: The folder or a file in it cannot be read.
        """
        files = [file for file in list_folder(self.path / "attempts") if file.suffix == ".json"]
        found = {file.name: read_json(file) or {} for file in files}
        numbered = {
            number: attempt
            for name, attempt in found.items()
            if isinstance(number := attempt.get("attempt"), int) and name == f"{number}.json"
        }
        return [attempt for _, attempt in sorted(numbered.items()) if has_types(attempt, ATTEMPT_TYPES)]

    def read_requeues(self) -> list[dict[str, Any]]:
        """Return why and from which checkpoint the Slurm jobs of this phase were requeued, oldest first.

        Raises:
            OSError: The file cannot be read.
        """
        return _read_objects(self.path / "requeues.jsonl", REQUEUE_TYPES)

    def log_requeue(self, **fields: Any) -> None:
        """Append a requeue of a Slurm job; see :meth:`read_requeues`."""
        append_json_line(self.path / "requeues.jsonl", {"time": time.time(), **fields})

    def write_attempt(self, number: int, **fields: Any) -> None:
        """Write the state of an attempt."""
        write_json(self.path / "attempts" / f"{number}.json", {"attempt": number, "time": time.time(), **fields})


def _read_object(file: Path, types: Types) -> dict[str, Any] | None:
    value = read_json(file)
    return value if has_types(value, types) else None


def _read_objects(file: Path, types: Types, last_bytes: int | None = None) -> list[dict[str, Any]]:
    return [row for row in read_json_lines(file, last_bytes) if has_types(row, types)]


def find_run(path: Path) -> RunDir | None:
    """Return the run directory that a path is, or is in; None if there is none."""
    folders = (path, *path.absolute().parents)
    return next((RunDir(folder) for folder in folders if (folder / "recipe.toml").exists()), None)


# files of an exported model, in the order in which they are written; only language models have a tokenizer
EXPORTED_FILES = ("README.md", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "config.json")


def is_complete_export(folder: Path) -> bool:
    """Return whether the folder of an exported model is complete."""
    return (folder / EXPORTED_FILES[-1]).exists()


@dataclass(frozen=True)
class RunDir:
    """The directory of a run.

    Attributes:
        path: The directory.
    """

    path: Path

    @property
    def exported(self) -> Path:
        """Return the folder of the exported model."""
        return self.path / "export"

    def phase(self, phase: Phase, module: int | None = None) -> PhaseDir:
        """Return the folder of a phase; for incubation, the folder of ``module``."""
        if phase == "incubate":
            assert module is not None
            return PhaseDir(self.path / "modules" / f"{module:02d}")
        return PhaseDir(self.path / FOLDERS[phase])

    @property
    def phases(self) -> list[PhaseDir]:
        """Return the folders of all phases, also of modules that the current recipe does not have.

        Raises:
            OSError: The folder of the modules cannot be read.
        """
        modules = [folder for folder in list_folder(self.path / "modules") if folder.match("[0-9]*")]
        return [PhaseDir(folder) for folder in (*(self.path / name for name in FOLDERS.values()), *modules)]

    @property
    def begun(self) -> bool:
        """Return whether any phase has begun."""
        return any(folder.begun for folder in self.phases)

    def read_plan(self) -> dict[str, Any] | None:
        """Return the content of ``plan.json``, or None if it is missing or damaged.

        Raises:
            OSError: The file cannot be read.
        """
        plan = read_json(self.path / "plan.json")
        return plan if is_plan(plan) else None

    @property
    def planned_rows(self) -> list[dict[str, Any]]:
        """Return the phases in ``plan.json``; none if it is missing or damaged.

        Raises:
            OSError: The file cannot be read.
        """
        rows: list[dict[str, Any]] = (self.read_plan() or {"rows": []})["rows"]
        return rows

    @property
    def assembled(self) -> PhaseDir:
        """Return the folder of the assembled model before fine-tuning."""
        return PhaseDir(self.path / "assembled")

    @property
    def recipe_file(self) -> Path:
        """Return the file of the resolved recipe."""
        return self.path / "recipe.toml"

    def log_event(self, event: str, **fields: Any) -> None:
        """Append an event to ``events.jsonl``."""
        append_json_line(self.path / "events.jsonl", {"time": time.time(), "event": event, **fields})

    def read_events(self) -> list[dict[str, Any]]:
        """Return all events, oldest first.

        Raises:
            OSError: The file cannot be read.
        """
        return _read_objects(self.path / "events.jsonl", EVENT_TYPES)

    def create(self, recipe: Recipe) -> None:
        """Create the directory and write the recipe, unless there is one already.

        Raises:
            ConfigError: The path is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{quote_path(self.path)} is a file; give a directory with --run-dir")
        if not self.recipe_file.exists() and write_text(self.recipe_file, recipe.toml(), exclusive=True):
            self.log_event("created", recipe=recipe.name)

    def has_recipe(self, recipe: Recipe) -> bool:
        """Return whether the recipe of the run is this one, including execution keys."""
        try:
            return self.load_recipe() == recipe
        except ConfigError:
            return False

    def update_recipe(self, recipe: Recipe) -> list[str]:
        """Replace the recipe and log the changes, if there are any.

        Returns:
            One line per changed key.
        """
        try:
            before = self.load_recipe()
            changes, invalid = differences(before, recipe) + differences(before, recipe, execution_keys=True), {}
        except ConfigError as error:
            changes, invalid = [str(error)], {"older": self.recipe_file.read_text(errors="replace")}
        if changes:
            write_text(self.recipe_file, recipe.toml())
            self.log_event("recipe_changed", changes=changes, **invalid)
        return changes

    def load_recipe(self) -> Recipe:
        """Return the resolved recipe.

        Raises:
            ArtifactError: This is not a run directory.
        """
        if not self.recipe_file.exists():
            raise ArtifactError(f"{quote_path(self.path)} is not a run directory (no recipe.toml in it)")
        return load_recipe(str(self.recipe_file))

    def data_path(self, recipe: Recipe) -> Path:
        """Return the folder of the data that a recipe trains on in this run.

        Raises:
            DataError: The recipe has neither ``data.path`` nor ``data.source``.
        """
        if recipe.data.path is not None:
            return Path(recipe.data.path)
        if recipe.data.source is None:
            raise DataError(
                f"recipe {recipe.name!r} needs data: run `bigincubate data prepare SOURCE --out DIR` (with --window N"
                " for text), then add --set data.path=DIR"
            )
        return self.path / "data"

    def update_summary(self) -> dict[str, Any]:
        """Return the results so far (None for a phase that is not done), and update ``summary.json``.

        The result of module k is at index k of ``modules``; it is None for a module that the plan does not incubate.
        The list ends with the last module that has been started. Results of phases that the plan no longer has are
        left out. Without a valid plan, only those of fine-tuning and of the baseline are returned, and the file is
        unchanged.
        """
        rows = self.planned_rows
        with_meta = any(row["phase"] == "pretrain" for row in rows)
        modules = [self.phase("incubate", row["module"]) for row in rows if row["phase"] == "incubate"]
        found = {int(folder.path.name): folder.result for folder in modules if folder.path.exists()}
        results: dict[str, Any] = {
            "meta": self.phase("pretrain").result if with_meta else None,
            "modules": [found.get(module) for module in range(max(found, default=-1) + 1)],
            "assembled": self.assembled.result if with_meta else None,
            "finetune": self.phase("finetune").result,
            "end_to_end": self.phase("end_to_end").result,
        }
        if rows and results != read_json(self.path / "summary.json"):
            write_json(self.path / "summary.json", results)
        return results
