"""Read a recipe from a TOML file and ``--set`` values. An error names the key and the closest valid key."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ..errors import ConfigError
from .recipe import Recipe, merge
from .sections import PHASES, Settings

MAX_BYTES, MAX_NESTING = 2**20, 20  # of a recipe file
Overlay = Callable[[Recipe], dict[str, Any]]


def list_shipped_recipes() -> dict[str, Path]:
    """Return the files of the recipes in the package, by name."""
    folder = Path(str(resources.files("bigincubate") / "recipes"))
    return {file.stem: file for file in sorted(folder.rglob("*.toml"), key=lambda file: file.stem)}


def load_recipe(name_or_path: str | Path, sets: Sequence[str] = (), overlay: Overlay | None = None) -> Recipe:
    """Read a shipped recipe by name, or a file by path, and apply ``--set`` values.

    Args:
        name_or_path: Name of a shipped recipe, or path of a .toml file.
        sets: ``KEY=VALUE`` strings, with dotted keys.
        overlay: Takes the recipe and returns tables that override it; ``sets`` override these tables.

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
        raw = merge(raw, overlay(load_recipe(name_or_path, sets)))
    for item in sets:
        raw = merge(raw, _parse_set(item))
    where = f"{file} with --set" if sets else str(file)
    raw.setdefault("name", file.stem)
    recipe: Recipe = _validate(Recipe, raw, "", where)
    for phase in PHASES:
        own = recipe.phase_overrides(phase)
        merged = {}
        for key in Settings.model_fields:
            common, over = getattr(recipe, key), getattr(own, key)
            merged[key] = _validate(type(common), merge(common.model_dump(), over), f"{phase}.{key}", where)
            # store validated values, so that 26 and 26.0 are the same recipe
            over.update({name: getattr(merged[key], name) for name in over if name != "args"})
        settings: Settings = _validate(Settings, merged, phase, where)
        if own.export == "ema" and not settings.ema.decay:
            raise ConfigError(f'{where}: {phase}.export = "ema" needs {phase}.ema.decay (or ema.decay) above 0')
    return recipe


def _read_tables(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the tables of a file, which override those of the shipped recipe ``base``, if the file names one."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{file}: larger than {MAX_BYTES} bytes; is this a recipe?")
        raw = tomllib.loads(file.read_text())
    except (ValueError, RecursionError) as error:  # RecursionError: nested more deeply than Python's limit
        raise ConfigError(f"{file}: not valid TOML: {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    if _nesting(raw) > MAX_NESTING:
        raise ConfigError(f"{file}: tables or lists are nested more than {MAX_NESTING} levels deep")
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


def _nesting(value: Any) -> int:
    """Return the nesting depth of tables and lists, without recursion to avoid recursion errors."""
    depth, level = 0, [value]
    while level := [
        inner
        for each in level
        if isinstance(each, dict | list)
        for inner in (each.values() if isinstance(each, dict) else each)
    ]:
        depth += 1
    return depth


def _find_recipe_file(name_or_path: str) -> Path:
    known = list_shipped_recipes()
    if name_or_path in known:
        return known[name_or_path]
    path = Path(name_or_path)
    if path.suffix == ".toml" and path.is_file():
        return path
    if path.suffix == ".toml":
        raise ConfigError(f"{path}: no such recipe file")
    near = difflib.get_close_matches(name_or_path, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"shipped recipes: {', '.join(known)}"
    raise ConfigError(f"no recipe {name_or_path!r}; {hint} (a path must end in .toml)")


def _parse_set(item: str) -> dict[str, Any]:
    key, equals, text = item.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", key):
        raise ConfigError(f"--set {item}: expected KEY=VALUE, such as --set train.lr=1e-3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _validate(table: type[Any], raw: Any, prefix: str, where: str) -> Any:
    try:
        return table.model_validate(raw)
    except ValidationError as error:
        problems = error.errors()
        first = problems[0]
        # pydantic adds the branch of a union to the path; keep only names in the recipe
        names = [str(part) for part in first["loc"] if isinstance(part, int) or re.fullmatch(r"\w+", str(part))]
        key = ".".join([prefix, *names] if prefix else names)
        if first["type"] == "extra_forbidden":
            message = f"unknown key {key!r}{_nearest_key(table, names)}"
        elif first["type"] == "missing":
            message = f"the table [{key}] is missing"
        else:
            text = first["msg"].removeprefix("Value error, ")
            given = "" if isinstance(first["input"], dict | BaseModel) else f" (given: {first['input']!r})"
            message = f"{key}: {text}{given}" if key else text
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{where}: {message}{more}") from None


def _nearest_key(table: type[BaseModel], names: list[str]) -> str:
    for part in names[:-1]:
        annotation = table.model_fields[part].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            table = annotation
    near = difflib.get_close_matches(names[-1], table.model_fields, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(table.model_fields)}"
