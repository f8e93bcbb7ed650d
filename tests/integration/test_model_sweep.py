"""Every timm name that a family claims can be cut and assembled, as docs/models.md lists it."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("sweep_models", ROOT / "scripts" / "sweep_models.py")
assert SPEC is not None
assert SPEC.loader is not None
sweep_models = importlib.util.module_from_spec(SPEC)
sys.modules["sweep_models"] = sweep_models
SPEC.loader.exec_module(sweep_models)

PAGE = sweep_models.PAGE.read_text()
REFUSED = PAGE.partition("## Refused")[2]
NAME = re.compile(r"^\| `(\S+)` \|", flags=re.MULTILINE)
SAMPLED = sweep_models.sampled_names(PAGE)


def test_page_lists_every_claimed_name_once() -> None:
    assert sorted(NAME.findall(PAGE)) == sorted(sweep_models.claimed_names()), sweep_models.COMMAND
    assert len(SAMPLED) > 20


@pytest.mark.parametrize("name", SAMPLED)
def test_model_of_each_configuration_is_cut_assembled_and_priced(name: str) -> None:
    found = sweep_models.sweep_model(name)
    assert not found.refused
    assert f"| `{name}` | {' + '.join(map(str, found.depths))} | {found.img_size} |" in PAGE


@pytest.mark.parametrize("name", NAME.findall(REFUSED))
def test_refused_model_gives_the_message_of_the_page(name: str) -> None:
    found = sweep_models.sweep_model(name)
    assert found.refused
    assert f"| `{name}` | {found.refused} |" in REFUSED


@pytest.mark.full
def test_page_of_models_is_up_to_date() -> None:
    """All names, with the costs of all."""
    results = [sweep_models.sweep_model(name) for name in sweep_models.claimed_names()]
    assert sweep_models.render(results) == PAGE, f"run: {sweep_models.COMMAND}"
