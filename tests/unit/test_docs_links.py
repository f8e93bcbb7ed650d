"""The pages of the project and of docs/ name only files, links and recipe keys that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from bigincubate.config import PHASES, Recipe, Settings, SlurmJobConfig
from bigincubate.config.slurm import SlurmConfig

JOBS = (*PHASES, "gate")
ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED_FILE = re.compile(
    r"(?<![\w/])(?:bigincubate|tests|benchmarks|examples|scripts|slurm|ds_configs)/[\w./-]*\.(?:py|toml|json|sh|sbatch)\b"
)
PACKAGE_FILE = re.compile(r"`((?!bigincubate/|tests/|benchmarks/|examples/|scripts/)[a-z_]+/[\w/]*\.py)`")
# a key in backticks, possibly with a value: `train.lr`, `finetune.model.img_size = 384`, `drop_path.*`
KEY = re.compile(r"`([a-z_0-9]+(?:\.[a-z_0-9]+)*\.(?:[a-z_0-9]+|\*))(?: ?= ?[^`]*)?`")
SET = re.compile(r"--set ([a-z_0-9.]+)=")
NOT_KEYS = re.compile(r"\.(py|json|jsonl|toml|md|out|sh|sbatch|pth|safetensors|css|html|log|config)$")


def tables(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Return the sub-tables of a table of the schema."""
    found = {}
    for name, field in model.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found[name] = kind
    return found


def is_key(path: list[str], model: type[BaseModel] = Recipe) -> bool:
    """Return whether a dotted path is a key or a table of the schema; a phase's tables override the common ones."""
    if not path or path == ["*"]:
        return True
    name, *rest = path
    if model is Recipe and name in PHASES and rest and rest[0] in Settings.model_fields:
        return is_key(rest, Settings)
    if model is SlurmConfig and name in JOBS and rest:
        return is_key(rest, SlurmJobConfig)
    if (table := tables(model).get(name)) is not None:
        return is_key(rest, table)
    return name in model.model_fields and (not rest or name == "args")


def named_keys(text: str) -> Iterator[str]:
    """Yield each recipe key that a page names in backticks or after ``--set``."""
    for key in [*KEY.findall(text), *SET.findall(text)]:
        if key.split(".")[0] in tables(Recipe) and not NOT_KEYS.search(key):
            yield key


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    text = page.read_text()
    missing = [name for name in NAMED_FILE.findall(text) if not (ROOT / name).exists()]
    missing += [name for name in PACKAGE_FILE.findall(text) if not (ROOT / "bigincubate" / name).exists()]
    assert not missing


def test_files_named_in_code_exist() -> None:
    for file in (ROOT / "bigincubate").rglob("*.py"):
        named = [name for name in NAMED_FILE.findall(file.read_text()) if not name.startswith("slurm/")]
        assert not [name for name in named if not (ROOT / name).exists()], file


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_recipe_keys_exist(page: Path) -> None:
    assert not [key for key in named_keys(page.read_text()) if not is_key(key.split("."))]


def test_unknown_keys_are_found() -> None:
    known = "`train.lr`, `finetune.train.lr = 1`, `sharding.fsdp2.*`, `slurm.gate.time`, `model.args.depth`"
    unknown = "`train.nothing`, `finetune.nothing.lr`, `slurm.gate.nothing`, --set train.none=1"
    assert all(is_key(key.split(".")) for key in named_keys(known))
    assert not any(is_key(key.split(".")) for key in named_keys(unknown))
    assert len([*named_keys(known), *named_keys(unknown)]) == 9
