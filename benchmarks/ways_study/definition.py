"""The definition of a study, read from a TOML file: ways, search spaces, budgets, seeds and primary comparisons."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from bigincubate.config import Recipe, load_recipe
from bigincubate.config.reading import read_toml
from bigincubate.config.tables import ConfigTable, Count
from bigincubate.config.validation import validate
from bigincubate.errors import ConfigError

Kind = Literal["incubate", "expand", "end_to_end", "meta_alone", "expand_average", "expand_best"]
Measure = Literal["flops", "path"]
SplitName = Literal["development", "validation"]
Settings = dict[str, Any]
"""A point of a search space: a value or the name of a choice, by the name of the parameter."""

Seed = Annotated[int, Field(ge=0)]
Seeds = Annotated[list[Seed], Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Range = Annotated[list[float], Field(min_length=2, max_length=2)]

FOLDER = Path(__file__).resolve().parent


class Parameter(ConfigTable):
    """A dimension of a search space: a recipe key, `share.STAGE`, `meta_depth`, or a name for lists of recipe changes.

    It has exactly one of these distributions.
    """

    log: Range | None = None
    """The lowest and the highest value of a log-uniform distribution."""
    uniform: Range | None = None
    """The lowest and the highest value of a uniform distribution."""
    choice: Annotated[list[int | float | str], Field(min_length=1)] | None = None
    """All values."""
    sets: Annotated[dict[str, list[str]], Field(min_length=1)] | None = None
    """Lists of recipe changes by name."""

    @model_validator(mode="after")
    def _check(self) -> Parameter:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError(f"expected exactly one of {', '.join(type(self).model_fields)}")
        for low, high in filter(None, (self.log, self.uniform)):
            if low > high or (self.log and low <= 0):
                raise ValueError("expected [low, high] with low <= high, and for log with 0 < low")
        return self

    def draw(self, generator: random.Random) -> Any:
        """Draw a value. Numbers are rounded to three significant digits, so that tables show them as they are."""
        if values := self.choice or self.sets:
            return generator.choice(list(values))
        if self.log:
            value = math.exp(generator.uniform(*map(math.log, self.log)))
        else:
            assert self.uniform is not None  # one of the four is set
            value = generator.uniform(*self.uniform)
        return float(f"{value:.3g}")


class Way(ConfigTable):
    """A way to train the target."""

    name: str
    """Its name in the log: its key in the definition."""
    kind: Kind
    """The phases of which it consists; see `lengths.py`."""
    title: str
    """Its name in tables."""
    measure: Measure = "flops"
    """What a budget limits: all training FLOPs (``flops``), or those on the critical path (``path``)."""
    budgets: list[Positive]
    """Budgets of the final trials; by default those of the study."""
    space: dict[str, Parameter] = Field({})
    """The parameters of its search space by name."""
    sets: list[str] = Field([])
    """Recipe changes of every trial."""
    points: Annotated[int, Field(ge=0)]
    """Number of points of the random search; by default that of the study."""
    tuned_as: str | None = None
    """The way whose settings it uses; None if it is tuned."""
    tuned_budget: Positive | None = None
    """The tuned budget whose settings it uses; by default the nearest one in FLOPs of a worker."""

    @model_validator(mode="after")
    def _check(self) -> Way:
        if self.kind == "expand_best" and self.tuned_as is None:
            raise ValueError("set tuned_as, because its workers already use the development split")
        if self.kind in ("expand_average", "expand_best") and self.measure != "path":
            raise ValueError('set measure = "path"; K workers are compared at equal critical path')
        if self.tuned_as and self.space:
            raise ValueError("tuned_as is the name of another way, and replaces space")
        return self


class Splits(ConfigTable):
    """Recipe changes of the splits on which trials are evaluated."""

    development: list[str]
    validation: list[str]


class Warmup(ConfigTable):
    """The longest warm-up of a phase, by two limits."""

    epochs: Annotated[float, Field(ge=0)]
    share: Annotated[float, Field(ge=0, le=1)]
    """A share of the steps of the phase."""


class Tuning(ConfigTable):
    """The random search on the development split."""

    points: Annotated[int, Field(ge=0)]
    """Number of points of each way."""
    budgets: Annotated[list[Positive], Field(min_length=1)]
    seed: Seed
    """The seed of all trials."""


class Best(ConfigTable):
    """Further budgets of the best ways with the measure ``flops``."""

    ways: Annotated[int, Field(ge=0)] = 0
    budgets: list[Positive] = Field([])


class Final(ConfigTable):
    """The trials on the validation split."""

    budgets: list[Positive]
    seeds: Seeds
    """Seeds of exploratory trials."""
    best: Best = Best()


class Comparison(ConfigTable):
    """A primary comparison: a way against a rival at a budget, paired by seed."""

    way: str
    rival: str
    budget: float

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if not isinstance(value, list) or len(value) != 3:
            raise ValueError("expected [way, rival, budget]")
        return dict(zip(cls.model_fields, value, strict=True))


class Margin(ConfigTable):
    """How much worse than its rival a way may be without being behind."""

    value: Positive
    absolute: bool = False
    """Whether the value is in the unit of the metric; otherwise it is a share of the rival's value."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.keys() == {"absolute"}:
            return {"value": value["absolute"], "absolute": True}
        return value if isinstance(value, dict) else {"value": value}


class Primary(ConfigTable):
    """The primary comparisons."""

    seeds: Seeds
    margin: Margin
    comparisons: list[Comparison]
    lead: Positive | None = None
    """The aim of the study: how much a way should be ahead at equal critical path, in the unit of the metric; at equal
    FLOPs, it should not be behind. None if there is no such aim."""


class Score(ConfigTable):
    """The metric by which ways are compared; lower is better."""

    name: str = "loss"
    """Its name in the results of a phase."""
    title: str = "loss"
    """Its name in tables."""
    digits: Annotated[int, Field(ge=0)] = 3
    """Decimal places in tables."""
    also: str = "top1"
    """Another metric that tables show; missing in the results of some tasks."""
    also_title: str = "top-1"
    """Its name in tables."""
    also_digits: Annotated[int, Field(ge=0)] = 1
    """Decimal places of it."""


class Study(ConfigTable):
    """A study."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    file: Path
    """The file of the definition; the log and the chosen settings are in the same folder."""
    recipe: str
    """Name or path of the recipe; a path is relative to the folder of the definition."""
    recipe_name: str | None = None
    """Name of the recipe in the digests of trials; None for the name in ``recipe``. With it, a recipe can be moved."""
    unit: Literal["incubation", "TFLOP"] = "incubation"
    """What a budget of 1 is: the recipe's own incubation, or 10^12 training FLOPs."""
    metric: Score = Score()
    workers: Count
    """Number of workers, K."""
    warmup: Warmup
    max_remainder: Share
    """Largest share of a budget that may remain unused."""
    rate: Positive
    """FLOP/s of one core, for estimates before any trial is logged."""
    settings_of: str | None = None
    """The study whose chosen settings are used; None if this study chooses its own."""
    splits: Splits
    tuning: Tuning
    final: Final
    primary: Primary
    ways: Annotated[dict[str, Way], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> Study:
        for way in self.ways.values():
            if way.tuned_as is not None and way.tuned_as not in self.ways:
                raise ValueError(f"ways.{way.name}.tuned_as: there is no way {way.tuned_as}")
            if way.tuned_budget is not None and way.tuned_budget not in self.tuning.budgets:
                raise ValueError(f"ways.{way.name}.tuned_budget: {way.tuned_budget:g} is not one of tuning.budgets")
        for each in self.primary.comparisons:
            for name in (each.way, each.rival):
                if name not in self.ways or each.budget not in self.ways[name].budgets:
                    raise ValueError(f"primary.comparisons: there is no way {name} with the budget {each.budget:g}")
        return self

    @property
    def log_file(self) -> Path:
        """Return the file of the log of all trials."""
        return self.file.with_name(f"trials-{self.name}.jsonl")

    @property
    def digest_name(self) -> str:
        """Return the name of the recipe in the digests of trials."""
        return self.recipe_name or Path(self.recipe).name

    @property
    def lease_folder(self) -> Path:
        """Return the folder of the lease of the process that runs trials."""
        return self.file.with_name(f".trials-{self.name}.lease")

    @property
    def settings_file(self) -> Path:
        """Return the file of the chosen settings."""
        return self.file.with_name(f"settings-{self.settings_of or self.name}.toml")

    @property
    def tuned_ways(self) -> list[Way]:
        """Return the ways that have a random search of their own."""
        return [] if self.settings_of else [way for way in self.ways.values() if way.tuned_as is None]

    def split_sets(self, split: SplitName) -> list[str]:
        """Return the recipe changes of a split."""
        sets: list[str] = getattr(self.splits, split)
        return sets

    def load_recipe(self, split: SplitName, sets: tuple[str, ...] = ()) -> Recipe:
        """Return the recipe with the changes of a split and others."""
        return load_recipe(self.recipe, [*self.split_sets(split), *sets])

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
        best = self.final.best
        names = [way.name for way in self.tuned_ways if way.measure == "flops"]
        if chosen is not None and best.ways:
            budget = f"{max(self.tuning.budgets):g}"
            names.sort(key=lambda name: chosen[name][budget][self.metric.name])
        longer = {
            name: self.ways[name].model_copy(update={"budgets": [*self.ways[name].budgets, *best.budgets]})
            for name in names[: best.ways]
        }
        return self.model_copy(update={"ways": self.ways | longer})

    def seeds_of(self, way: Way, budget: float) -> list[int]:
        """Return the seeds of the final trials of a way at a budget."""
        compared = self.primary.comparisons
        is_primary = any(way.name in (each.way, each.rival) and each.budget == budget for each in compared)
        return self.primary.seeds if is_primary else self.final.seeds


def load_study(name: str) -> Study:
    """Load a definition.

    Args:
        name: The name of a definition in this folder, or the path of a .toml file.

    Raises:
        ConfigError: There is no such file, or its content is invalid.
    """
    file = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.toml") if not path.stem.startswith("settings-")))
        raise ConfigError(f"{file} is not a file; give the path of a definition, or one of {known}")
    raw, where = read_toml(file), str(file)
    tuning = validate(Tuning, _inner(raw, "tuning", where), "tuning", where)
    final = validate(Final, _inner(raw, "final", where), "final", where)
    defaults = {"points": tuning.points, "budgets": final.budgets}
    tables = _inner(raw, "ways", where)
    ways = {key: _read_way(key, {**defaults, **_inner(tables, key, f"{where}: ways")}, where) for key in tables}
    if isinstance(other := raw.get("settings_of"), str):  # the settings are points of the other study's spaces
        if read_toml(file.with_name(f"{other}.toml")).get("settings_of") is not None:
            raise ConfigError(f"{where}: settings_of = {other!r}: that study does not choose settings of its own")
        spaces = load_study(str(file.with_name(f"{other}.toml"))).ways
        own = {key for key, way in ways.items() if way.tuned_as is None}
        if missing := own - spaces.keys():
            raise ConfigError(
                f"{where}: {other} has no way {', '.join(sorted(missing))}, so there are no settings to reuse"
            )
        ways |= {key: ways[key].model_copy(update={"space": spaces[key].space}) for key in own}
    if isinstance(recipe := raw.get("recipe"), str) and (local := (file.parent / recipe).resolve()).is_file():
        raw["recipe"] = str(local)
    return validate(Study, {**raw, "file": file.resolve(), "tuning": tuning, "final": final, "ways": ways}, "", where)


def _read_way(key: str, table: dict[str, Any], where: str) -> Way:
    spaces = _inner(table, "space", f"{where}: ways.{key}")
    space = {name: validate(Parameter, each, f"ways.{key}.space.{name}", where) for name, each in spaces.items()}
    return validate(Way, {**table, "name": key, "space": space}, f"ways.{key}", where)


def _inner(table: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """Return an inner table; an empty one if it is missing.

    Raises:
        ConfigError: The value is no table.
    """
    found = table.get(key, {})
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: {key}: expected a table (given: {found!r})")
    return found
