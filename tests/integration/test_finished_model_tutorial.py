"""The commands of the tutorial that fine-tune a finished model."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from forked import run
from test_finished_model import other, source

__all__ = ["other", "source"]


def test_commands_of_the_tutorial_work(
    source: Any, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any
) -> None:
    """Of its section, with a narrow model and two steps."""
    page = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text()
    section = page.partition("### Fine-tune a finished model on other data\n")[2].partition("\n### ")[0]
    [recipe] = re.findall(r"```toml\n(.*?)```", section, re.DOTALL)
    small = 'name = "vit_tiny_patch16_224"\nargs = { patch_size = 2, embed_dim = 24, num_heads = 3 }\nimg_size = 8'
    changes = {'name = "vit_small_patch16_224"\nimg_size = 96': small, "epochs = 20": "max_steps = 2"}
    changes["modules = 4"] = "target_depths = [1, 1, 1, 1]"
    for before, after in changes.items():
        assert recipe.count(before) == 1
        recipe = recipe.replace(before, after)
    source.copy(tmp_path / "runs" / "flowers")
    shutil.copytree(source.run.exported, tmp_path / "flowers-model")
    shutil.copytree(other, tmp_path / "data" / "birds")
    (tmp_path / "birds.toml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line)[1:] for line in section.splitlines() if line.startswith("bigincubate ")]
    assert [words[0] for words in commands] == ["plan", "run", "evaluate", "report", "submit", "train"]
    for words in commands:
        if words[0] == "run":
            ended = run(*words)
            assert ended.wait(240) == 0, ended.out + ended.err
            continue
        code, _, err = call(*words)
        assert code == 0, (words, err)
    assert (tmp_path / "runs" / "birds" / "export" / "model.safetensors").exists()
    assert (tmp_path / "runs" / "birds-2" / "finetune" / "DONE").exists()
