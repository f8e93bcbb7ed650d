"""Every recipe key is described in the schema, and docs/recipe_keys.md shows what the schema says."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Command

from bigincubate.config import PHASES, Recipe, format_recipe_keys, list_recipe_keys, load_recipe
from bigincubate.config.keys import PAGE_COMMAND
from bigincubate.errors import ConfigError

PAGE = Path(__file__).parents[2] / "docs" / "recipe_keys.md"
KEYS = {entry.key: entry for entry in list_recipe_keys()}


@pytest.mark.parametrize("key", KEYS)
def test_recipe_key_has_a_meaning(key: str) -> None:
    meaning = KEYS[key].meaning
    assert meaning.endswith("."), f"{key}: add a docstring under the key in config/, one or two sentences"
    assert "Unit:" not in meaning
    assert "|" not in meaning + KEYS[key].type  # would end a cell of the page


def test_listed_keys_are_those_of_a_recipe() -> None:
    flat = load_recipe("digits", ["optim.layer_decay=0.9", "data.remote=s3://bucket"]).flat()
    common = {key for key in flat if key.partition(".")[0] not in PHASES and not key.startswith("model.args.")}
    assert len(common) > 60
    assert common - KEYS.keys() == set()
    assert set(Recipe.model_fields) == {key.partition(".")[0] for key in KEYS}


def test_type_default_and_unit_come_from_the_schema() -> None:
    pad = KEYS["augment.pad"]
    assert (pad.type, pad.default, pad.unit, pad.execution) == ("integer ≥ 0", "4", "pixels", False)
    assert KEYS["optim.betas"].type == "list of numbers ≥ 0 and < 1"
    assert KEYS["ema.decay"].type == "number ≥ 0 and < 1"
    assert KEYS["train.precision"].type == '"fp32" or "bf16"'
    assert (KEYS["train.micro_batch"].default, KEYS["train.micro_batch"].execution) == ("none", True)
    assert KEYS["plan.target_depths"].type == "list of integers ≥ 0 or list of lists of integers ≥ 0"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("mixup.*", ["mixup.mixup", "mixup.cutmix", "mixup.prob", "mixup.switch_prob"]),
        ("target_d", ["plan.target_depths"]),
    ],
)
def test_pattern_selects_keys(pattern: str, expected: list[str]) -> None:
    assert [entry.key for entry in list_recipe_keys(pattern)] == expected


def test_pattern_without_match_names_the_nearest_key() -> None:
    with pytest.raises(ConfigError, match=r"'train\.lrr'; did you mean 'train\.lr'\?"):
        list_recipe_keys("train.lrr")


def test_page_of_recipe_keys_is_up_to_date() -> None:
    text = PAGE.read_text()
    assert PAGE_COMMAND in text
    assert text == format_recipe_keys(list_recipe_keys()) + "\n", f"run: {PAGE_COMMAND}"


def test_command_prints_keys_and_page(bigincubate: Command) -> None:
    assert bigincubate("recipes", "--keys", "--markdown").stdout == PAGE.read_text()
    shown = bigincubate("recipes", "--keys", "checkpoint.keep").stdout
    assert shown == f"{KEYS['checkpoint.keep']}\n"
    refused = bigincubate("recipes", "train.lr")
    assert refused.returncode == 2
    assert "--keys" in refused.stderr
