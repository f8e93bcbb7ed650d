"""Read a recipe from a TOML file and ``--set`` values."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import expand_path, unreadable_error
from .recipe import Recipe, merge
from .schema import resolve_paths
from .sections import PHASES, Settings
from .set_option import find_problem, parse_set
from .slurm import JOB_KINDS, SlurmJobConfig
from .validation import validate

MAX_BYTES = 2**20  # of a recipe file
Overlay = Callable[[Recipe], dict[str, Any]]


def list_shipped_recipes() -> dict[str, Path]:
    """Return the files of the recipes in the package, by name."""
    folder = Path(str(resources.files("bigincubate") / "recipes"))
    return {file.stem: file for file in sorted(folder.rglob("*.toml"), key=lambda file: file.stem)}


def load_recipe(name_or_path: str | Path, sets: Sequence[str] = (), overlay: Overlay | None = None) -> Recipe:
    """Read a shipped recipe by name, or a file by path, and apply ``--set`` values.

    Args:
        name_or_path: Name of a shipped recipe, or path of a .toml file. A path in it is relative to its folder.
        sets: ``KEY=VALUE`` strings, with dotted keys. A path in them is relative to the working directory.
        overlay: Takes the recipe and returns tables that override it; ``sets`` override these tables, and a key that
            they set for all phases also overrides those of a phase.

    Returns:
        The validated recipe.

    Raises:
        ConfigError: The recipe is invalid. The message has file and key, with the closest valid key for an unknown one.

    Example:
        >>> recipe = bi.load_recipe("digits", ["train.seed=1", "finetune.train.epochs=5"])
    """
    if isinstance(sets, str):
        raise ConfigError(f"sets = {sets!r}: expected a list of KEY=VALUE strings, such as [{sets!r}]")
    if not isinstance(name_or_path, str | Path):
        raise ConfigError(f"a recipe is the name of a shipped one or a path, not a {type(name_or_path).__name__}")
    file = _find_recipe_file(str(name_or_path))
    raw = _read_tables(file)
    if overlay is not None:
        tables = overlay(load_recipe(name_or_path, sets))
        for table, phase in product(map(parse_set, sets), PHASES):
            _replace_values(tables.get(phase, {}), table)
        raw = merge(raw, tables)
    for item in sets:
        raw = merge(raw, parse_set(item))
    where = f"{file} with --set" if sets else str(file)
    raw.setdefault("name", file.stem)
    recipe = validate(Recipe, raw, "", where)
    for kind in JOB_KINDS:
        validate(SlurmJobConfig, recipe.slurm.job_values(kind), f"slurm.{kind}", where)
    for phase in PHASES:
        own = recipe.phase_overrides(phase)
        merged = {}
        for key in Settings.model_fields:
            common, over = getattr(recipe, key), getattr(own, key)
            merged[key] = validate(type(common), merge(common.model_dump(), over), f"{phase}.{key}", where)
            # store validated values, so that 26 and 26.0 are the same recipe
            over.update({name: getattr(merged[key], name) for name in over if name != "args"})
        settings = validate(Settings, merged, phase, where)
        if own.export == "ema" and not settings.ema.decay:
            raise ConfigError(f'{where}: {phase}.export = "ema" needs {phase}.ema.decay (or ema.decay) above 0')
    if recipe.pretrain.handover == "before_decay" and (shape := recipe.settings("pretrain").schedule.name) != "wsd":
        raise ConfigError(
            f'{where}: pretrain.handover = "before_decay" needs pretrain.schedule.name = "wsd" (or schedule.name):'
            f" {shape} has no stable part"
        )
    if recipe.finetune.init is not None:
        _check_finished_model(recipe, where)
    return recipe


def _replace_values(tables: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Replace the values of the keys in nested tables that are also in ``given``."""
    for name, value in given.items():
        if isinstance(value, dict) and isinstance(tables.get(name), dict):
            _replace_values(tables[name], value)
        elif name in tables:
            tables[name] = value


def _check_finished_model(recipe: Recipe, where: str) -> None:
    """Check that no other key asks for a meta model or modules, if fine-tuning starts from a finished model.

    Raises:
        ConfigError: One does; the message says what to do.
    """
    others = {
        "meta.init is of the meta model; remove it": recipe.meta.init is not None,
        'plan.incubate is of the modules; set it to "all", its default': recipe.plan.incubate != "all",
        "data.decentralized is of the modules; set it to false": recipe.data.decentralized,
    }
    if problem := next((text for text, given in others.items() if given), None):
        raise ConfigError(
            f"{where}: finetune.init is a finished model, so there is no meta model and no module, but {problem}"
        )


def read_toml(file: Path) -> dict[str, Any]:
    """Return the tables of a TOML file.

    Raises:
        ConfigError: The file is missing, is not valid TOML, or has a number that TOML does not allow.
        SystemResourceError: The file cannot be read.
    """
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{file}: larger than {MAX_BYTES} bytes, which is too large for a file of settings")
        raw = tomllib.loads(file.read_text("utf-8-sig"))  # some editors write a byte order mark
    except (ValueError, RecursionError) as error:  # RecursionError: nested more deeply than Python's limit
        raise ConfigError(f"{file}: not valid TOML: {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise unreadable_error(error, file, ConfigError) from None
    if (problem := find_problem(raw)) is not None:
        raise ConfigError(f"{file}: {problem}")
    return raw


def _read_tables(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the tables of a file, which override those of the shipped recipe ``base``, if the file names one."""
    raw = read_toml(file)
    try:
        raw = resolve_paths(Recipe, raw, file.parent)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    if (name := raw.pop("base", None)) is None:
        return raw
    if not isinstance(name, str) or name not in list_shipped_recipes():
        raise ConfigError(f"{file}: base = {name!r} is not a shipped recipe; use {' or '.join(list_shipped_recipes())}")
    chain = (*above, file)
    if list_shipped_recipes()[name] in chain:
        raise ConfigError(f"{file}: base = {name!r} is circular, through {' and '.join(map(str, chain))}")
    base = _read_tables(list_shipped_recipes()[name], chain)
    base.pop("name", None)
    model = raw.get("model")
    if isinstance(model, dict) and "name" in model and isinstance(base.get("model"), dict):
        base["model"].pop("args", None)  # arguments of another model
    return merge(base, raw)


def _find_recipe_file(name_or_path: str) -> Path:
    known = list_shipped_recipes()
    if name_or_path in known:
        return known[name_or_path]
    if name_or_path.endswith(".toml"):
        path = expand_path(name_or_path)
        if path.is_file():
            return path
        raise ConfigError(f"{path}: no such recipe file")
    near = difflib.get_close_matches(name_or_path, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"shipped recipes: {', '.join(known)}"
    raise ConfigError(f"no recipe {name_or_path!r}; {hint} (a path must end in .toml)")
