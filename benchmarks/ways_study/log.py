"""The trials of a study, the log that all of them are appended to, and the settings that are chosen from it."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from bigincubate.config.reading import read_toml
from bigincubate.config.validation import validate
from bigincubate.errors import ConfigError
from bigincubate.files import append_json_line, read_json_lines, write_text

from .definition import Settings, SplitName, Study, Way
from .lengths import Costs, TrialPlan, nearest_budget, plan_trial

Entry = dict[str, Any]
"""A line of the log."""


class ChosenSettings(BaseModel):
    """A table of the settings file. It also has the value of the metric on the development split."""

    model_config = ConfigDict(extra="allow", strict=True)

    index: int
    points: int
    settings: Settings


@dataclass(frozen=True)
class Trial:
    """A trial: a way with a budget and settings, trained once.

    Attributes:
        way: The way.
        split: The split on which it is evaluated.
        budget: The budget, in the unit of the study.
        seed: The seed.
        index: The number of the point in the random search; None for a final trial.
        settings: The settings.
        plan: The lengths of its stages.
        recipe: Name of the recipe.
    """

    way: Way
    split: SplitName
    budget: float
    seed: int
    index: int | None
    settings: Settings
    plan: TrialPlan
    recipe: str

    @property
    def name(self) -> str:
        """Return a name for folders and messages."""
        end = "" if self.index is None else f"-point-{self.index}"
        return f"{self.split}-{self.way.name}-{self.budget:g}-seed-{self.seed}{end}"

    @property
    def digest(self) -> str:
        """Return a digest of everything that the definition and the settings determine."""
        content = [self.recipe, self.way.kind, self.plan.sets, self.settings]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def key(self) -> tuple[Any, ...]:
        """Return what identifies the trial in the log."""
        return self.split, self.way.name, self.budget, self.seed, self.index, self.digest


def key_of(entry: Entry) -> tuple[Any, ...]:
    """Return what identifies the trial of a line of the log."""
    return tuple(entry[name] for name in ("split", "way", "budget", "seed", "index", "sets_digest"))


def ran_on_cpu(entry: Entry) -> bool:
    """Return whether a trial ran on a CPU. Old lines do not say what they ran on; they ran on CPUs."""
    return str(entry.get("device") or "CPU").startswith("CPU")


class LogLine(BaseModel):
    """What all lines of the log have."""

    model_config = ConfigDict(strict=True)

    split: SplitName
    way: str
    budget: FiniteFloat
    seed: int
    index: int | None
    sets_digest: str
    version: str
    settings_digest: str | None = None
    device: str | None = None
    torch: str | None = None

    @model_validator(mode="after")
    def _check(self) -> LogLine:
        if self.split == "validation" and self.settings_digest is None:
            raise ValueError("a trial on the validation split has the key settings_digest")
        return self


class FailedLine(LogLine):
    """What the line of a trial without a result has."""

    error: str
    diverged: bool = False


class FinishedLine(LogLine):
    """What the line of a finished trial has: its metrics, and its costs (`describe_cost`) as far as they are read."""

    metrics: Annotated[dict[str, FiniteFloat], Field(min_length=1)]
    seconds: NonNegativeFloat
    flops: PositiveInt
    path_flops: PositiveInt
    connected_path_flops: PositiveInt | None
    memory_before: NonNegativeInt
    memory_last: NonNegativeInt
    sent_before: NonNegativeInt
    sent_last: NonNegativeInt


class TrialLog:
    """The log of a study. Lines are only ever appended.

    Args:
        file: The file.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> list[Entry]:
        """Return all lines, without those that a crash truncated.

        Raises:
            ConfigError: One is not the line of a trial.
        """
        lines = read_json_lines(self.file)
        for line in lines:
            model = FinishedLine if "metrics" in line else FailedLine
            validate(model, line, "", f"{self.file}: {json.dumps(line)[:80]}")
        return lines

    def append(self, entry: Entry) -> None:
        """Append a line."""
        append_json_line(self.file, dict(sorted(entry.items())))

    def results(self) -> dict[tuple[Any, ...], Entry]:
        """Return the result of each trial: the first that is final, since a trial that has one is not repeated.

        A trial that diverged has a final result without metrics. Other failures are repeated, and are not returned.
        """
        found: dict[tuple[Any, ...], Entry] = {}
        for entry in self.read():
            if "metrics" in entry or entry.get("diverged"):
                found.setdefault(key_of(entry), entry)
        return found


def tuning_trials(costs: Costs) -> list[Trial]:
    """Return all trials of the random search."""
    study = costs.study
    return [
        _make_trial(costs, way, "development", budget, study.tuning.seed, index, study.draw(way, index))
        for index in range(max((way.points for way in study.tuned_ways), default=0))
        for way in study.tuned_ways
        if index < way.points
        for budget in study.tuning.budgets
    ]


def final_trials(costs: Costs, chosen: dict[str, Any] | None) -> list[Trial]:
    """Return all trials on the validation split.

    Args:
        costs: Counted costs.
        chosen: The chosen settings; None to estimate costs with point 0 before they are chosen.
    """
    study = costs.study
    trials = []
    for way in study.ways.values():
        for budget in way.budgets:
            settings = final_settings(costs, way, budget, chosen)
            trials += [
                _make_trial(costs, way, "validation", budget, seed, None, settings)
                for seed in study.seeds_of(way, budget)
            ]
    return sorted(trials, key=lambda trial: trial.seed)


def _make_trial(
    costs: Costs, way: Way, split: SplitName, budget: float, seed: int, index: int | None, settings: Settings
) -> Trial:
    plan = plan_trial(costs, way, settings, budget, split)
    return Trial(way, split, budget, seed, index, settings, plan, costs.study.digest_name)


def final_settings(costs: Costs, way: Way, budget: float, chosen: dict[str, Any] | None) -> Settings:
    """Return the settings of a way at a budget: those chosen at its tuned budget, or else at the nearest one."""
    study = costs.study
    tuned = study.ways[way.tuned_as or way.name]
    if chosen is None:
        return study.draw(tuned, 0)
    found: dict[str, Any] = chosen[tuned.name]
    nearest = way.tuned_budget or nearest_budget(costs, way, budget, tuned, [float(text) for text in found])
    settings: Settings = found[f"{nearest:g}"]["settings"]
    return settings


def choose_settings(costs: Costs, results: dict[tuple[Any, ...], Entry]) -> str:
    """Return the content of the settings file: the point with the lowest value of the metric, by way and budget.

    Raises:
        ConfigError: Trials are missing, or all of a way diverged.
    """
    study, trials = costs.study, tuning_trials(costs)
    if study.settings_of:
        raise ConfigError(f"{study.name} uses the settings of {study.settings_of}; choose them there")
    if missing := [trial for trial in trials if trial.key not in results]:
        raise ConfigError(f"{len(missing)} of {len(trials)} tuning trials are missing; run --tune first")
    chosen: dict[str, Any] = {}
    for way in study.tuned_ways:
        for budget in study.tuning.budgets:
            mine = [trial for trial in trials if (trial.way, trial.budget) == (way, budget)]
            scored = [(results[t.key]["metrics"][study.metric.name], t) for t in mine if "metrics" in results[t.key]]
            if not scored:
                raise ConfigError(f"all {len(mine)} points of {way.name} diverged at budget {budget:g}")
            value, best = min(scored, key=lambda pair: (pair[0], pair[1].index))
            row = {"index": best.index, study.metric.name: value, "points": len(mine), "settings": best.settings}
            chosen.setdefault(way.name, {})[f"{budget:g}"] = row
    title = study.metric.title
    head = f"# Written by `benchmarks/ways.py --choose`: the point with the lowest {title} on the development split.\n"
    return head + tomli_w.dumps(chosen)


def write_chosen(study: Study, text: str, results: Iterable[Entry]) -> None:
    """Write the settings file, unless trials on the validation split have been run with other settings.

    Raises:
        ConfigError: They have.
    """
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    if others := {entry["settings_digest"] for entry in results if entry["split"] == "validation"} - {digest}:
        raise ConfigError(
            f"{study.log_file.name} has validation trials with the settings {', '.join(sorted(others))}; settings are"
            " chosen before the first of them"
        )
    write_text(study.settings_file, text)


def read_chosen(study: Study) -> tuple[dict[str, Any], str] | None:
    """Return the chosen settings and their digest, or None before they are chosen.

    Raises:
        ConfigError: The file is not one that `write_chosen` has written for the ways of the study.
    """
    file = study.settings_file
    if not file.exists():
        return None
    advice = "restore this file or the definition; before the first trial on the validation split, --choose again"
    digest, chosen = hashlib.sha256(file.read_bytes()).hexdigest()[:12], read_toml(file)
    for name in dict.fromkeys(way.tuned_as or way.name for way in study.ways.values()):
        rows = chosen.get(name)
        if not isinstance(rows, dict) or not rows.keys() >= {f"{budget:g}" for budget in study.tuning.budgets}:
            raise ConfigError(f"{file} has no settings of {name} at every tuned budget; {advice}")
        for budget, row in rows.items():
            score = validate(ChosenSettings, row, f"{name}.{budget}", str(file)).model_dump().get(study.metric.name)
            if row["settings"].keys() != study.ways[name].space.keys() or not isinstance(score, float):
                raise ConfigError(f"{file}: {name}.{budget} does not fit the definition; {advice}")
    return chosen, digest


def check_protocol(study: Study, digest: str | None, entries: Iterable[Entry]) -> None:
    """Check that trials on the validation split may be run.

    Args:
        study: The study.
        digest: The digest of the chosen settings; None if they are missing.
        entries: The lines of the log.

    Raises:
        ConfigError: The settings are missing, they or the definition are not committed, or the log has validation
            trials with other settings.
    """
    file = study.settings_file
    if digest is None:
        raise ConfigError(f"{file} is missing: run --tune, then --choose, then commit it")
    for path in (file, study.file):
        if _git(path, "ls-files", "--error-unmatch") is None or _git(path, "status", "--porcelain"):
            raise ConfigError(f"{path} is not committed; commit it before a run on the validation split")
    used = {entry["settings_digest"] for entry in entries if entry["split"] == "validation"}
    if others := used - {digest}:
        raise ConfigError(
            f"{study.log_file.name} has validation trials with the settings {', '.join(sorted(others))}, but"
            f" {file.name} is {digest}; each way is run on the validation split with one choice of settings only"
        )


def check_once(trials: Iterable[Trial], results: Mapping[tuple[Any, ...], Entry]) -> None:
    """Check that no trial on the validation split would be run a second time.

    Raises:
        ConfigError: The log has a result of one that follows from another definition.
    """
    finished = {key[:-1] for key in results}
    for trial in trials:
        if trial.key not in results and trial.key[:-1] in finished:
            raise ConfigError(
                f"{trial.name} has been run with other recipe changes; restore the definition, because each trial on"
                " the validation split runs once"
            )


def _git(path: Path, *words: str) -> str | None:
    """Return the output of a git command on a file, or None if it fails."""
    done = subprocess.run(["git", *words, "--", path.name], cwd=path.parent, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
