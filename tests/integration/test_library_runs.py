"""Planning, running and evaluating from Python: the same results and errors as the commands, and nothing printed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import bigincubate as bi

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def finished(done: Any, tmp_path: Path) -> Path:
    """A copy of a finished run that has not been exported."""
    return Path(shutil.copytree(done.run.path, tmp_path / "run"))


def test_plan_is_that_of_the_command(counted: None, fast: Path, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["data.train_samples=1149"]
    costs = bi.plan(bi.load_recipe(fast, sets), world_sizes=[1, 4], cluster="nodes=1,gpus=4,tflops=1", ways=True)
    assert capsys.readouterr() == ("", "")
    options = ["--world", "1,4", "--cluster", "nodes=1,gpus=4,tflops=1", "--ways", "--json"]
    assert json.loads(json.dumps(costs)) == json.loads(call("plan", fast, "--set", *sets, *options)[1])
    assert [row["key"] for row in costs["rows"]] == ["pretrain", "incubate/0", "incubate/1", "finetune", "end_to_end"]


def test_phase_has_the_result_of_the_harness(
    harness: Callable[..., Any], done: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained through the library it has the same metrics and weights, and leaves no variable of a rank behind."""
    before = dict(os.environ)
    lines: list[str] = []
    result = bi.train_phase(done.recipe, tmp_path / "run", "pretrain", report=lines.append)
    assert dict(os.environ) == before
    assert capsys.readouterr() == ("", "")
    assert len(lines) == 1
    assert lines[0].startswith("meta model: done, top-1 ")
    assert result["metrics"] == done.run.phase("pretrain").result["metrics"]
    other = harness("train.max_steps=2", "log.every_steps=1", folder=tmp_path / "run")
    expected = done.weights("pretrain")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in other.weights("pretrain").items())


@pytest.mark.parametrize(
    ("phase", "module", "error", "message"),
    [
        ("pretraining", None, bi.errors.ConfigError, "phase = 'pretraining'"),
        ("incubate", 2, bi.errors.ConfigError, "0 to 1"),
        ("incubate", 1, bi.errors.ArtifactError, "the meta model is missing"),
        ("finetune", None, bi.errors.ArtifactError, "the meta model is missing"),
    ],
)
def test_phase_that_cannot_be_trained_raises(
    done: Any, tmp_path: Path, phase: Any, module: int | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        bi.train_phase(done.recipe, tmp_path / "run", phase, module)


def test_finished_run_is_exported_once(done: Any, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = bi.run(done.recipe, finished), bi.run(done.recipe, str(finished))
    assert capsys.readouterr() == ("", "")
    assert (first.already_done, second.already_done) == (False, True)
    assert first.load_code is not None
    assert second.load_code is None
    assert first.results == second.results
    assert first.results["finetune"] == done.run.phase("finetune").result
    model, images = timm.create_model(f"local-dir:{first.export}", pretrained=True), torch.randn(2, 3, 8, 8)
    assert not bi.load_model(finished).training
    assert torch.equal(model.eval()(images), bi.load_model(finished)(images))


def test_failed_run_names_phase_reason_and_log(done: Any, finished: Path) -> None:
    """Exit code 3 of a phase is the error that has it; no process is started, because no log file can be created."""
    shutil.rmtree(finished / "modules")
    (finished / "modules").mkdir()
    for module in ("00", "01"):
        (finished / "modules" / module).write_text("in the way")
    with pytest.raises(bi.errors.ExternalError) as caught:
        bi.run(done.recipe, finished)
    assert caught.value.code == 3
    assert str(caught.value).count("\n") == 0
    for number in (0, 1):
        assert f"module {number}: {finished / 'modules' / f'0{number}'}" in str(caught.value)
        assert str(finished / "modules" / f"0{number}" / "logs" / "train.log") in str(caught.value)


def test_evaluation_is_that_of_the_command(
    finished: Path, digits: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    before = dict(os.environ)
    lines: list[str] = []
    scores = bi.evaluate(finished, digits, report=lines.append)
    assert dict(os.environ) == before
    assert capsys.readouterr() == ("", "")
    assert scores == json.loads(call("evaluate", finished, "--data", digits, "--json")[1])
    assert call("evaluate", finished, "--data", digits)[1] == f"{lines[0]}\n"
    with pytest.raises(bi.errors.ConfigError, match="expected linear or knn"):
        bi.evaluate(finished, digits, probe="tree")  # type: ignore[call-overload]
    with pytest.raises(bi.errors.ArtifactError):
        bi.load_model(finished / "nothing")


def test_every_exit_code_has_its_error() -> None:
    errors = bi.errors
    without = {errors.Exit.DONE, errors.Exit.INTERRUPTED}  # Python raises KeyboardInterrupt for the latter
    found = {code: errors.error_of_code(code) for code in errors.Exit if code not in without}
    assert {code: error.code for code, error in found.items()} == {code: code for code in found}
    assert errors.error_of_code(137) is errors.ExternalError


def test_source_without_a_finished_model_is_refused(done: Any, finished: Path, digits: Path, tmp_path: Path) -> None:
    """A wrong path, a part of a model, an unfinished phase, data, and what is no path at all."""
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    shutil.rmtree(finished / "finetune" / "artifact")
    sources = ["nowhere", "file", "empty", "run", "run/modules", "run/modules/00", "run/finetune", "run/meta/tb"]
    for source in (*(tmp_path / name for name in sources), digits):
        for call in (bi.load_model, lambda source: bi.evaluate(source, digits)):
            with pytest.raises(bi.errors.ArtifactError) as caught:
                call(source)
            assert "\n" not in str(caught.value)
    for wrong in (None, 3, done.recipe):
        with pytest.raises(TypeError):
            bi.load_model(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True, "2"])
def test_batch_size_of_an_evaluation_is_checked(batch_size: Any, finished: Path, digits: Path) -> None:
    with pytest.raises(bi.errors.ConfigError, match="batch_size = "):
        bi.evaluate(finished, digits, batch_size=batch_size)


def test_data_of_an_evaluation_is_checked(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for data in (tmp_path / "nowhere", tmp_path / "file", finished):
        with pytest.raises(bi.errors.DataError, match="no data in"):
            bi.evaluate(finished, data)


def test_run_directory_that_is_a_file_is_refused(done: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for call in (bi.run, lambda recipe, path: bi.train_phase(recipe, path, "pretrain")):
        with pytest.raises(bi.errors.BigincubateError) as caught:
            call(done.recipe, tmp_path / "file")
        assert "file" in str(caught.value)
    assert (tmp_path / "file").read_text() == "text"
