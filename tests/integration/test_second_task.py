"""A task and a model family from outside the package go through everything, without a change in the package."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from second_task import write_vectors

RECIPE = """
name = "vectors"
[task]
name = "second_task:VectorRegression"
[model]
library = "second_task:find_mlp_family"
name = "residual-mlp"
args = { width = 16 }
[data]
path = "DATA"
[plan]
target_depths = [2, 2]
meta_depths = [1, 1]
[train]
batch_size = 32
epochs = 3
lr = 1e-2
[incubate]
init = "grow"
[log]
every_steps = 2
[checkpoint]
every_steps = 4
"""
KEYS = ["pretrain", "incubate/0", "incubate/1", "finetune", "end_to_end"]
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
}

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("second-task")
    file = folder / "vectors.toml"
    file.write_text(RECIPE.replace("DATA", str(write_vectors(folder / "data"))))
    return file


@pytest.fixture(scope="module")
def finished(recipe: Path, bigincubate: Command) -> Path:
    """A whole run: meta model, modules, assembly, fine-tuning, the baseline, an export."""
    folder = recipe.parent / "run"
    ended = bigincubate("run", recipe, "--run-dir", folder, "--jobs", 2, "--baseline", env=ENVIRONMENT)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "RMSE" in ended.stdout
    return folder


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def test_every_phase_has_the_metrics_of_the_task(finished: Path) -> None:
    folders = ["meta", "modules/00", "modules/01", "assembled", "finetune", "end_to_end"]
    results = [read(finished / folder / "DONE") for folder in folders]
    for result in results:
        assert result["metrics"].keys() == {"rmse", "mae"}
        assert (result["headline"], result["unit"], result["samples"]) == ("rmse", "vectors", 64)
    meta, assembled, finetuned = (results[index]["metrics"]["rmse"] for index in (0, 3, 4))
    assert finetuned < meta  # it learned
    assert assembled < 1


def test_grown_module_starts_as_the_meta_model(finished: Path, recipe: Path, bigincubate: Command) -> None:
    folder = recipe.parent / "unchanged"
    for phase in (["pretrain"], ["incubate", "--module", 0]):
        ended = bigincubate(
            "train",
            recipe,
            "--run-dir",
            folder,
            "--phase",
            *phase,
            "--set",
            "incubate.train.max_steps=0",
            env=ENVIRONMENT,
        )
        assert ended.returncode == 0, ended.stderr
    scores = [read(folder / phase / "DONE")["metrics"] for phase in ("meta", "modules/00")]
    assert scores[1] == pytest.approx(scores[0], rel=1e-6)


def test_plan_prices_every_phase(recipe: Path, bigincubate: Command) -> None:
    ended = bigincubate("plan", recipe, "--json", env=ENVIRONMENT)
    assert ended.returncode == 0, ended.stderr
    rows = json.loads(ended.stdout)["rows"]
    assert [row["key"] for row in rows] == KEYS
    assert all(row["cost"]["training_flops"] > 0 and row["cost"]["parameters"] > 0 for row in rows)


def test_status_and_compare_print_the_headline(finished: Path, bigincubate: Command) -> None:
    status = json.loads(bigincubate("status", finished, "--json", env=ENVIRONMENT).stdout)
    assert [row["phase"] for row in status] == KEYS
    assert all(row["state"] == "done" and row["metrics"]["rmse"] > 0 for row in status)
    assert "RMSE" in bigincubate("status", finished, env=ENVIRONMENT).stdout
    compared = bigincubate("compare", finished, env=ENVIRONMENT)
    assert compared.returncode == 0, compared.stderr
    assert "RMSE" in compared.stdout
    assert "top-1" not in compared.stdout


def test_report_is_about_the_task(finished: Path, bigincubate: Command) -> None:
    ended = bigincubate("report", finished, env=ENVIRONMENT)
    assert ended.returncode == 0, ended.stderr
    page = (finished / "report.html").read_text()
    assert "RMSE" in page
    assert "vectors" in page
    assert "top-1" not in page


def test_card_has_the_metrics_of_a_task_without_a_name_on_the_hub(finished: Path) -> None:
    card = ModelCard.load(finished / "export" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag, card.data.eval_results) == (None, None, None)
    row = next(line for line in card.text.splitlines() if line.startswith("| fine-tuning | "))
    metrics = read(finished / "finetune" / "DONE")["metrics"]
    assert row.startswith(f"| fine-tuning | {metrics['rmse']:.4f} | {metrics['mae']:.4f} |")
    assert "safetensors.torch.load_file" in card.text


def test_verify_and_export_know_the_model(finished: Path, bigincubate: Command) -> None:
    verified = bigincubate("verify", finished, env=ENVIRONMENT)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    data = finished.parent / "data"
    refused = bigincubate("evaluate", finished / "export", "--data", data, env=ENVIRONMENT)
    assert refused.returncode == 4
    assert (
        "needs code outside this package (second_task:VectorRegression, second_task:find_mlp_family)" in refused.stderr
    )
    evaluated = bigincubate("evaluate", finished, "--data", data, "--json", env=ENVIRONMENT)
    assert evaluated.returncode == 0, evaluated.stderr
    scores = json.loads(evaluated.stdout)
    assert scores["rmse"] == pytest.approx(read(finished / "finetune" / "DONE")["metrics"]["rmse"], rel=1e-6)


def test_tensorboard_has_the_metrics(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = EventAccumulator(str(finished / "finetune" / "tb")).Reload().Tags()
    assert {"train/loss", "val/RMSE", "val/MAE", "work/vectors per second"} <= set(tags["scalars"])
    assert tags["images"] == []


def test_interrupted_phase_resumes_to_the_bit(finished: Path, recipe: Path) -> None:
    from forked import Command as Forked
    from forked import hold_step

    folder = recipe.parent / "interrupted"
    command = ["train", recipe, "--run-dir", folder, "--phase", "pretrain"]
    first = Forked(*command, env=ENVIRONMENT, before=partial(hold_step, 6))
    assert first.until(lambda: list(folder.glob("meta/checkpoints/step-*/COMMITTED")))
    assert first.kill() == -signal.SIGKILL
    assert not (folder / "meta" / "DONE").exists()
    again = Forked(*command, env=ENVIRONMENT)
    assert again.wait() == 0, again.err
    weights = [(run / "meta" / "artifact" / "weights.safetensors").read_bytes() for run in (folder, finished)]
    assert weights[0] == weights[1]


def test_two_ranks_under_fsdp2_give_the_same_losses(finished: Path, recipe: Path, bigincubate: Command) -> None:
    folder = recipe.parent / "fsdp2"
    words = ["run", recipe, "--run-dir", folder, "--jobs", 1, "--nproc", 2, "--set", "sharding.strategy=fsdp2"]
    ended = bigincubate(*words, env=ENVIRONMENT)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for phase in ("meta", "modules/01", "finetune"):
        found, expected = (
            [json.loads(line) for line in (run / phase / "metrics.jsonl").read_text().splitlines()]
            for run in (folder, finished)
        )
        losses = [[row["train/loss"] for row in rows] for rows in (found, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
