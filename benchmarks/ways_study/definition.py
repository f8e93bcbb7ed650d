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
        margin: Share of the rival's loss by which a way may be worse without being behind.
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
    margin: float
    max_remainder: float
    rate: float
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
        margin=primary["margin"],
        max_remainder=table["max_remainder"],
        rate=table["rate"],
        settings_of=table.get("settings_of"),
    )
    _check(study)
    return study


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
