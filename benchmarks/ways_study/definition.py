"""The definition of a study, read from a TOML file: ways, search spaces, budgets, seeds and primary comparisons."""

from __future__ import annotations

import math
import random
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from bigincubate.config import Recipe, load_recipe
from bigincubate.errors import ConfigError

Kind = Literal["incubate", "expand", "end_to_end", "meta_alone", "expand_average", "expand_best"]
Measure = Literal["flops", "path"]
SplitName = Literal["development", "validation"]
Unit = Literal["incubation", "TFLOP"]
Settings = dict[str, Any]
"""A point of a search space: a value or the name of a choice, by the name of the parameter."""

FOLDER = Path(__file__).resolve().parent
DISTRIBUTIONS = ("log", "uniform", "choice", "sets")


@dataclass(frozen=True)
class Parameter:
    """A dimension of a search space: a recipe key, `share.STAGE`, `meta_depth`, or a name for lists of recipe changes.

    Attributes:
        distribution: ``log`` or ``uniform`` (``values`` are the lowest and the highest value), ``choice`` (``values``
            are all values) or ``sets`` (``values`` are recipe changes by name).
        values: See above.
    """

    distribution: str
    values: Any

    def draw(self, generator: random.Random) -> Any:
        """Draw a value. Numbers are rounded to three significant digits, so that tables show them as they are."""
        if self.distribution in ("choice", "sets"):
            return generator.choice(list(self.values))
        low, high = self.values
        if self.distribution == "log":
            return float(f"{math.exp(generator.uniform(math.log(low), math.log(high))):.3g}")
        return float(f"{generator.uniform(low, high):.3g}")


@dataclass(frozen=True)
class Way:
    """A way to train the target.

    Attributes:
        name: Its name in the log.
        kind: The phases of which it consists; see `lengths.py`.
        title: Its name in tables.
        measure: What a budget limits: all training FLOPs (``flops``), or those on the critical path (``path``).
        budgets: Budgets of the final trials.
        space: The parameters of its search space by name.
        sets: Recipe changes of every trial.
        points: Number of points of the random search.
        tuned_as: The way whose settings it uses, at the nearest budget in FLOPs of a worker; None if it is tuned.
    """

    name: str
    kind: Kind
    title: str
    measure: Measure
    budgets: tuple[float, ...]
    space: dict[str, Parameter] = field(default_factory=dict)
    sets: tuple[str, ...] = ()
    points: int = 12
    tuned_as: str | None = None


@dataclass(frozen=True)
class Comparison:
    """A primary comparison: a way against a rival at a budget, paired by seed."""

    way: str
    rival: str
    budget: float


@dataclass(frozen=True)
class Score:
    """The metric by which ways are compared; lower is better.

    Attributes:
        name: Its name in the results of a phase.
        title: Its name in tables.
        digits: Decimal places in tables.
        also: Another metric that tables show; missing in the results of some tasks.
        also_title: Its name in tables.
        also_digits: Decimal places of it.
    """

    name: str = "loss"
    title: str = "loss"
    digits: int = 3
    also: str = "top1"
    also_title: str = "top-1"
    also_digits: int = 1


@dataclass(frozen=True)
class Margin:
    """How much worse than its rival a way may be without being behind.

    Attributes:
        value: The margin.
        absolute: Whether it is in the unit of the metric; otherwise it is a share of the rival's value.
    """

    value: float
    absolute: bool = False


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        name: Its name.
        file: The file of the definition; the log and the chosen settings are in the same folder.
        recipe: Name or path of the recipe.
        splits: Recipe changes of the development and of the validation split.
        ways: The ways by name.
        workers: Number of workers, K.
        warmup_epochs: Longest warm-up of a phase, in epochs.
        warmup_share: Longest warm-up of a phase, as a share of its steps.
        tuning_budgets: Budgets of the random search.
        tuning_seed: Seed of its trials.
        seeds: Seeds of exploratory trials.
        primary_seeds: Seeds of primary comparisons.
        primary: The primary comparisons.
        margin: How much worse a way may be without being behind.
        lead: The aim of the study: how much a way should be ahead at equal critical path, in the unit of the metric;
            at equal FLOPs, it should not be behind. None if there is no such aim.
        score: The metric.
        unit: What a budget of 1 is: the recipe's own incubation, or 10^12 training FLOPs.
        best_ways: How many of the ways with the measure ``flops`` are also trained with the budgets ``best_budgets``.
        best_budgets: These budgets.
        max_remainder: Largest share of a budget that may remain unused.
        rate: FLOP/s of one core, for estimates before any trial is logged.
        settings_of: The study whose chosen settings are used; None if this study chooses its own.
    """

    name: str
    file: Path
    recipe: str
    splits: dict[str, tuple[str, ...]]
    ways: dict[str, Way]
    workers: int
    warmup_epochs: float
    warmup_share: float
    tuning_budgets: tuple[float, ...]
    tuning_seed: int
    seeds: tuple[int, ...]
    primary_seeds: tuple[int, ...]
    primary: tuple[Comparison, ...]
    margin: Margin
    max_remainder: float
    rate: float
    lead: float | None = None
    score: Score = Score()
    unit: Unit = "incubation"
    best_ways: int = 0
    best_budgets: tuple[float, ...] = ()
    settings_of: str | None = None

    @property
    def log_file(self) -> Path:
        """Return the file of the log of all trials."""
        return self.file.with_name(f"trials-{self.name}.jsonl")

    @property
    def settings_file(self) -> Path:
        """Return the file of the chosen settings."""
        return self.file.with_name(f"settings-{self.settings_of or self.name}.toml")

    @property
    def tuned_ways(self) -> list[Way]:
        """Return the ways that have a random search of their own."""
        return [] if self.settings_of else [way for way in self.ways.values() if way.tuned_as is None]

    def load_recipe(self, split: SplitName, sets: tuple[str, ...] = ()) -> Recipe:
        """Return the recipe with the changes of a split and others."""
        return load_recipe(self.recipe, [*self.splits[split], *sets])

    def draw(self, way: Way, index: int) -> Settings:
        """Return a point of a way's search space.

        Each parameter has a generator of its own, so that a new parameter does not change the values of the others.
        """
        return {
            name: parameter.draw(random.Random(f"{self.name}/{way.name}/{index}/{name}"))
            for name, parameter in way.space.items()
        }

    def with_best(self, chosen: dict[str, Any] | None) -> Study:
        """Return the study in which the best ways have further budgets.

        The best ways are those with the lowest value on the development split at the largest tuned budget, among those
        that are tuned and whose budgets limit all FLOPs.

        Args:
            chosen: The chosen settings; None before they are chosen: the first ways then stand for the best ones.
        """
        names = [way.name for way in self.tuned_ways if way.measure == "flops"]
        if chosen is not None and self.best_ways:
            budget = f"{max(self.tuning_budgets):g}"
            names.sort(key=lambda name: chosen[name][budget][self.score.name])
        best = {
            name: replace(self.ways[name], budgets=(*self.ways[name].budgets, *self.best_budgets))
            for name in names[: self.best_ways]
        }
        return replace(self, ways=self.ways | best)

    def seeds_of(self, way: Way, budget: float) -> tuple[int, ...]:
        """Return the seeds of the final trials of a way at a budget."""
        is_primary = any(way.name in (each.way, each.rival) and each.budget == budget for each in self.primary)
        return self.primary_seeds if is_primary else self.seeds


def load_study(name: str) -> Study:
    """Load a definition.

    Args:
        name: The name of a definition in this folder, or the path of a .toml file.

    Raises:
        ConfigError: There is no such file, or its content is inconsistent.
    """
    file = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.toml") if not path.stem.startswith("settings-")))
        raise ConfigError(f"{file} is not a file; give the path of a definition, or one of {known}")
    table = tomllib.loads(file.read_text())
    tuning, final, primary = table["tuning"], table["final"], table["primary"]
    ways = {key: _read_way(key, value, tuning, final) for key, value in table["ways"].items()}
    if other := table.get("settings_of"):  # the settings are points of the other study's spaces
        spaces = load_study(str(file.with_name(f"{other}.toml"))).ways
        ways = {name: replace(way, space=spaces[name].space) for name, way in ways.items()}
    local = (file.parent / table["recipe"]).resolve()
    study = Study(
        name=table["name"],
        file=file.resolve(),
        recipe=str(local) if local.is_file() else table["recipe"],
        splits={split: tuple(table["splits"][split]) for split in get_args(SplitName)},
        ways=ways,
        workers=table["workers"],
        warmup_epochs=table["warmup"]["epochs"],
        warmup_share=table["warmup"]["share"],
        tuning_budgets=tuple(tuning["budgets"]),
        tuning_seed=tuning["seed"],
        seeds=tuple(final["seeds"]),
        primary_seeds=tuple(primary["seeds"]),
        primary=tuple(Comparison(*row) for row in primary["comparisons"]),
        margin=_read_margin(primary["margin"]),
        lead=primary.get("lead"),
        score=_read_score(table.get("metric", {})),
        unit=table.get("unit", "incubation"),
        best_ways=final.get("best", {}).get("ways", 0),
        best_budgets=tuple(final.get("best", {}).get("budgets", ())),
        max_remainder=table["max_remainder"],
        rate=table["rate"],
        settings_of=table.get("settings_of"),
    )
    _check(study)
    return study


def _read_score(table: dict[str, Any]) -> Score:
    if unknown := table.keys() - Score.__dataclass_fields__.keys():
        raise ConfigError(
            f"metric: unknown {', '.join(sorted(unknown))}; it has {', '.join(Score.__dataclass_fields__)}"
        )
    return Score(**table)


def _read_margin(value: float | dict[str, float]) -> Margin:
    if isinstance(value, dict):
        return Margin(value["absolute"], absolute=True)
    return Margin(value)


def _read_way(name: str, table: dict[str, Any], tuning: dict[str, Any], final: dict[str, Any]) -> Way:
    space = {}
    for parameter, content in table.get("space", {}).items():
        ((distribution, values),) = content.items()
        if distribution not in DISTRIBUTIONS:
            raise ConfigError(f"ways.{name}.space.{parameter}: {distribution} is not one of {', '.join(DISTRIBUTIONS)}")
        space[parameter] = Parameter(distribution, values)
    if table["kind"] not in get_args(Kind):
        raise ConfigError(f"ways.{name}.kind = {table['kind']!r}: expected one of {', '.join(get_args(Kind))}")
    return Way(
        name=name,
        kind=table["kind"],
        title=table["title"],
        measure=table.get("measure", "flops"),
        budgets=tuple(table.get("budgets", final["budgets"])),
        space=space,
        sets=tuple(table.get("sets", ())),
        points=table.get("points", tuning["points"]),
        tuned_as=table.get("tuned_as"),
    )


def _check(study: Study) -> None:
    """Check that names in a definition exist.

    Raises:
        ConfigError: One does not.
    """
    if study.unit not in get_args(Unit):
        raise ConfigError(f"unit = {study.unit!r}: expected one of {', '.join(get_args(Unit))}")
    for way in study.ways.values():
        if way.tuned_as is not None and (way.tuned_as not in study.ways or way.space):
            raise ConfigError(f"ways.{way.name}: tuned_as is the name of another way, and replaces space")
        if way.kind == "expand_best" and way.tuned_as is None:
            raise ConfigError(f"ways.{way.name}: set tuned_as, because its workers already use the development split")
        if way.kind in ("expand_average", "expand_best") and way.measure != "path":
            raise ConfigError(f'ways.{way.name}: set measure = "path"; K workers are compared at equal critical path')
    for each in study.primary:
        for name in (each.way, each.rival):
            if name not in study.ways or each.budget not in study.ways[name].budgets:
                raise ConfigError(f"primary.comparisons: there is no way {name} with the budget {each.budget:g}")
