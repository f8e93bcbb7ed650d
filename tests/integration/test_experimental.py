"""Core never imports `bigincubate.experimental`; recipes name experiments, and each one that is named runs."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_import_rules import FILES, ROOT, imports

EXPERIMENTAL = "bigincubate.experimental"
CORE = [file for file in FILES if "experimental" not in file.relative_to(ROOT).parts]


def imports_experimental(file: Path, *, top: bool = False) -> bool:
    return any(f"{name}.".startswith(f"{EXPERIMENTAL}.") for name in imports(file, top=top))


def string_constants(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_core_does_not_import_experimental() -> None:
    assert {file.relative_to(ROOT).as_posix() for file in CORE if imports_experimental(file)} == {"cli/training.py"}


def test_command_line_imports_experimental_only_inside_a_command() -> None:
    assert not any(imports_experimental(file, top=True) for file in CORE)


def test_core_names_no_experiment() -> None:
    named = {file.name for file in CORE if any(EXPERIMENTAL in text for text in string_constants(file))}
    assert named == set()


@pytest.mark.parametrize(
    "setting",
    [
        "loss.name=bigincubate.experimental.fused_loss:soft_cross_entropy_loss",
        "optim.lr_scaling=bigincubate.experimental.adascale:AdaScale",
        "augment.batch_transform=bigincubate.experimental.device_augment:DeviceAugment",
    ],
)
def test_recipe_that_names_an_experiment_trains(harness: Callable[..., Any], setting: str) -> None:
    made = harness(setting, "train.max_steps=2", "train.micro_batch=16", "log.every_steps=1")
    assert made.train("pretrain")["steps"] == 2
    assert len(made.log("pretrain")) == 2
