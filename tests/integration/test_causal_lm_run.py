"""A complete run of a language model, from built-in text to an exported model that transformers loads."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TrainingHarness
from forked import die_before, run
from hub_server import code_of, serve_hub
from huggingface_hub import ModelCard
from token_data import write_recipe

from bigincubate.files import read_json
from bigincubate.storage.run_directory import PhaseDir

Command = Callable[..., Any]
FOLDERS = ["meta", "modules/00", "modules/01", "assembled", "finetune", "end_to_end"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def finished(recipe: Path, bigincubate: Command) -> Path:
    folder = recipe.parent / "run"
    ended = bigincubate("run", recipe, "--run-dir", folder, "--jobs", 2, "--baseline")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "bits/byte" in ended.stdout
    assert "example of the model's output:\n    a" in ended.stdout
    return folder


def test_every_phase_has_the_metrics_of_the_task(finished: Path) -> None:
    results = [read_json(finished / folder / "DONE") for folder in FOLDERS]
    for result in filter(None, results):
        assert (result["headline"], result["unit"]) == ("bits_per_byte", "tokens")
        assert 0 < result["metrics"]["bits_per_byte"] < 9
    meta, tuned = results[0], results[4]
    assert meta is not None
    assert tuned is not None
    assert meta["seen"] == meta["steps"] * 16 * 16  # windows per batch, and tokens per window
    assert meta["metrics"]["bits_per_byte"] < 8
    rows = PhaseDir(finished / "finetune").read_metrics()
    assert rows[-1]["perf/tokens_per_sec"] > 0
    assert rows[-1]["val/bits_per_byte"] == tuned["metrics"]["bits_per_byte"]
    plan = {row["key"]: row for row in json.loads((finished / "plan.json").read_text())["rows"]}
    for key, result in (("pretrain", meta), ("finetune", tuned)):
        planned = plan[key]
        assert (planned["seen"], planned["total_flops"]) == (result["seen"], result["flops"])
        assert planned["approximate_flops"] == 6 * planned["cost"]["parameters"] * planned["seen"]


def test_reports_show_tokens_and_bits_per_byte(finished: Path, bigincubate: Command) -> None:
    for command in ("status", "compare", "report", "verify"):
        ended = bigincubate(command, finished)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        if command in ("status", "compare"):
            assert "bits/byte" in ended.stdout
            assert "top-1" not in ended.stdout
    page = (finished / "report.html").read_text()
    assert "bits/byte" in page
    assert "tokens" in page
    planned = bigincubate("plan", finished / "recipe.toml", "--set", "data.train_samples=1000")
    assert planned.returncode == 0, planned.stderr
    assert "6ND" in planned.stdout


def test_pushed_model_is_loaded_by_the_code_in_its_card(finished: Path, bigincubate: Command, tmp_path: Path) -> None:
    """The hub is a server of the test, because the Hugging Face Hub is out of reach."""
    with serve_hub() as hub:
        ended = bigincubate("export", finished, "--push-to-hub", "me/model", env=hub.environment(tmp_path / "home"))
        assert ended.returncode == 0, ended.stderr
        files = hub.repositories["me/model"].files
        card = ModelCard(files["README.md"].decode())
        data: Any = card.data
        assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
        script = (
            "import sys, torch; tokens = tokenizer('a bc', return_tensors='pt').input_ids;"
            " torch.save((tokens, model.eval()(tokens).logits), sys.argv[1])"
        )
        hub.run_python(f"{code_of(card.text)}\n{script}", tmp_path / "logits", home=tmp_path / "home")
    assert files.keys() == {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    tokens, logits = torch.load(tmp_path / "logits")
    assert tokens.tolist() == [[*b"a bc"]]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(finished / "export").eval()
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, logits)
    result = read_json(finished / "finetune" / "DONE")
    assert result is not None
    scores = {each.metric_type: each.metric_value for each in data.eval_results}
    assert scores["bits_per_byte"] == pytest.approx(result["metrics"]["bits_per_byte"], abs=5e-5)
    assert "augment" not in card.text  # settings that the task does not read


def test_export_is_evaluated_to_the_same_score(finished: Path, bigincubate: Command) -> None:
    expected = read_json(finished / "finetune" / "DONE")
    assert expected is not None
    for source in (finished, finished / "export"):
        ended = bigincubate("evaluate", source, "--data", finished / "data", "--json")
        assert ended.returncode == 0, ended.stderr
        scores = json.loads(ended.stdout)
        assert scores["bits_per_byte"] == pytest.approx(expected["metrics"]["bits_per_byte"], rel=1e-6)
    refused = bigincubate("evaluate", finished, "--data", finished / "data", "--probe", "knn")
    assert refused.returncode == 2
    assert "probe" in refused.stderr


def test_several_data_sets_are_a_table(finished: Path, bigincubate: Command) -> None:
    words = ("evaluate", finished, "--data", finished / "data", "--data", finished / "data")
    ended = bigincubate(*words)
    assert ended.returncode == 0, ended.stderr
    _, heading, *rows = ended.stdout.splitlines()
    assert heading.split()[:3] == ["data", "tokens", "bits/byte"]
    assert "interval" not in heading
    assert len(rows) == 2
    for option in (["--per-class"], ["--classes", finished / "recipe.toml"]):
        refused = bigincubate(*words, *option)
        assert refused.returncode == 2
        assert f"{option[0]}" in refused.stderr
        assert "the task causal_lm has no classes" in refused.stderr
        assert refused.stderr.count("\n") == 1


def test_tensorboard_has_the_example(finished: Path, recipe: Path) -> None:
    harness = TrainingHarness(recipe, finished)
    assert "example/text_summary" in harness.events("finetune").Tags()["tensors"]


def test_killed_phase_resumes_to_the_same_bits(recipe: Path, finished: Path) -> None:
    folder = recipe.parent / "killed"
    folder.mkdir()
    shutil.copytree(finished / "data", folder / "data")
    train = ("train", recipe, "--run-dir", folder, "--phase", "pretrain")
    place = ("bigincubate.training.trainer", "Trainer.finish")
    assert run(*train, before=partial(die_before, *place)).wait() == -signal.SIGKILL
    shutil.rmtree(folder / "meta" / "checkpoints" / "step-00000012", ignore_errors=True)
    assert not (folder / "meta" / "DONE").exists()
    resumed = run(*train)
    assert resumed.wait() == 0, resumed.err
    manifests = [read_json(each / "meta" / "artifact" / "manifest.json") for each in (finished, folder)]
    assert manifests[0]
    assert manifests[0]["digest"] == manifests[1]["digest"]  # type: ignore[index]
