"""Fine-tuning of a finished language model on other text: `finetune.init`, from runs, exports and hubs."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TrainingHarness
from token_data import WINDOW, write_recipe, write_windows
from transformers import AutoModelForCausalLM, LlamaConfig

from bigincubate.errors import ConfigError
from bigincubate.interchange.export import export
from bigincubate.storage.artifacts import load_artifact
from bigincubate.training.builder import build_model

SHORT = "train.max_steps=2"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TrainingHarness:
    """A finished model of the built-in text, with its export."""
    folder = tmp_path_factory.mktemp("finished")
    made = TrainingHarness(write_recipe(folder), folder / "run", SHORT, "plan.incubate=none")
    made.train("pretrain")
    made.train("finetune")
    export(made.run.path, made.run.exported)
    return made


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other text, as bytes."""
    random = np.random.default_rng(0)
    windows = [random.integers(0, 257, WINDOW + 1) for _ in range(40)]
    return write_windows(tmp_path_factory.mktemp("other") / "data", windows[:32], windows[32:])


def moved(init: object, data: Path, folder: Path, *sets: str) -> TrainingHarness:
    """A run that fine-tunes this model on this data."""
    return TrainingHarness(
        write_recipe(folder), folder / "run", SHORT, f"finetune.init={init}", f"data.path={data}", *sets
    )


def start(made: TrainingHarness) -> dict[str, torch.Tensor]:
    return build_model(made.context("finetune"))[0].state_dict()


def test_finished_model_is_fine_tuned_on_other_text(
    finished: TrainingHarness, other: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained, _ = load_artifact(finished.run.phase("finetune").artifact)
    for form in (finished.run.path, finished.run.exported):
        folder = tmp_path / form.name
        folder.mkdir()
        made = moved(form, other, folder)
        with caplog.at_level(logging.INFO, "bigincubate"):
            state = start(made)
        assert caplog.messages[-1].endswith("new tensors: none")
        assert state.keys() == trained.keys()
        assert all(torch.equal(state[name], trained[name]) for name in trained)
    assert [row.key for row in made.rows] == ["finetune", "end_to_end"]
    assert made.train("finetune")["metrics"]["bits_per_byte"] > 0


def test_model_that_transformers_wrote_is_fine_tuned(finished: TrainingHarness, other: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**finished.recipe.model.args, max_position_embeddings=WINDOW)
    theirs = AutoModelForCausalLM.from_config(config)
    theirs.save_pretrained(tmp_path / "theirs")
    state = start(moved(tmp_path / "theirs", other, tmp_path))
    wanted = theirs.state_dict()["model.layers.3.mlp.up_proj.weight"]
    assert torch.equal(state["model.layers.3.mlp.up_proj.weight"], wanted)


def test_other_tokens_are_refused_in_one_line(finished: TrainingHarness, other: Path, tmp_path: Path) -> None:
    made = moved(finished.run.path, other, tmp_path)
    task, metadata = made.context("finetune").task, made.data.schema.metadata
    own, kept = {"name": "bpe", "sha256": "1" * 64}, {"name": "file", "sha256": "1" * 64}
    exported = {"name": "file", "sha256": "2" * 64}
    assert task.keeps_head({}, made.data)
    assert task.keeps_head({"tokenizer": {"name": "bytes"}}, made.data)
    with pytest.raises(ConfigError, match=r"tokenizer 111111111111, but .* has tokens of bytes: prepare the data with"):
        task.keeps_head({"tokenizer": own}, made.data)
    metadata["tokenizer"] = kept
    assert task.keeps_head({"tokenizer": own}, made.data)
    metadata["tokenizer"] = exported
    assert task.keeps_head({"tokenizer": own, "exported_tokenizer": "2" * 64}, made.data)
    with pytest.raises(ConfigError, match=r"of the tokenizer bytes, but .* has tokens of 222222222222: prepare"):
        start(made)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("model.args.vocab_size=300", "has vocab_size = 257, the recipe 300: set model.args.vocab_size = 257"),
        (
            "model.args.intermediate_size=64",
            "has intermediate_size = 32, the recipe 64: set model.args.intermediate_size",
        ),
        ("model.name=qwen3", "is a llama model, but model.name = 'qwen3'"),
    ],
)
def test_other_architecture_is_refused_in_one_line(
    key: str, says: str, finished: TrainingHarness, other: Path, tmp_path: Path
) -> None:
    for form in (finished.run.path, finished.run.exported):
        folder = tmp_path / form.name
        folder.mkdir()
        with pytest.raises(ConfigError) as caught:
            start(moved(form, other, folder, key))
        assert f"finetune.init = '{form}' {says}" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_other_depth_is_refused(finished: TrainingHarness, other: Path, tmp_path: Path) -> None:
    sets = ("plan.target_depths=[2, 1]", "model.args.num_hidden_layers=3")
    with pytest.raises(ConfigError, match=r"has 4 blocks, but the target 3: set plan.target_depths"):
        start(moved(finished.run.path, other, tmp_path, *sets))
