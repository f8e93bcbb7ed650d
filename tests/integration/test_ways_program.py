"""The study of ways to train, from the random search to the page, at toy size. A stopped search is resumed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bigincubate.launchers.fork_server import ForkedProcess

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TWO_WAYS = """
[ways.end_to_end]
kind = "end_to_end"
title = "end to end"
space = { "end_to_end.train.lr" = { log = [1e-3, 2e-3] } }

[ways.meta_alone]
kind = "meta_alone"
title = "shallow meta model alone"
space = { "pretrain.train.lr" = { log = [1e-3, 2e-3] } }
"""
PAGE = "<!-- ways toy: written by benchmarks/ways.py -->\n<!-- ways toy: end -->\n"


def _definition(budget: float, depths: str, ways: str, comparisons: list[list[Any]]) -> str:
    return f"""
name = "toy"
recipe = "digits"
workers = 4
warmup = {{ epochs = 2, share = 0.1 }}
max_remainder = 0.5
rate = 1e9

[splits]
development = ["data.source=digits-dev", "data.train_samples=1149", "plan.target_depths={depths}"]
validation = ["data.source=digits", "data.train_samples=1437", "plan.target_depths={depths}"]

[tuning]
points = 1
budgets = [{budget}]
seed = 100

[final]
budgets = [{budget}]
seeds = [0]

[primary]
seeds = [0, 1]
margin = 0.02
comparisons = {json.dumps(comparisons)}
{ways}"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the program in this process; return what it printed. The folder is a repository, for the definition."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    program = importlib.import_module("ways")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / ".gitignore").write_text("out\n")

    def run(*words: object, code: int = 0) -> str:
        common = ("--out", tmp_path / "out", "--jobs", 1)
        given = ["ways.py", *map(str, (tmp_path / "toy.toml", *common, *words))]
        monkeypatch.setattr(sys, "argv", given)
        with pytest.raises(SystemExit) as ended:
            program.main()
        printed = "".join(capsys.readouterr())
        assert ended.value.code == code, printed
        return printed

    return run


def _commit(folder: Path) -> None:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    for words in (("add", "."), ("commit", "-q", "-m", "Add files")):
        subprocess.run(["git", *identity, *words], cwd=folder, check=True)


def _read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trials-toy.jsonl").read_text().splitlines()]


def _stop_when(path: Path, pattern: str) -> None:
    """Send SIGTERM to this process as soon as there is a file."""

    def wait() -> None:
        while not any(path.glob(pattern)):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def test_study_from_search_to_page(study: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "toy.toml").write_text(_definition(0.01, "[1,1,1,1]", TWO_WAYS, []))
    _stop_when(tmp_path / "out", "trials/*/*.log")
    assert "run the same command again to resume" in study("--tune", code=75)
    assert not (tmp_path / "trials-toy.jsonl").exists()
    assert "2 trials, 2 left" in study("--tune")
    assert "commit it before --final" in study("--choose")
    _commit(tmp_path)
    study("--final", "--ways", "end_to_end")
    assert "1 trials, 0 left" in study("--final", "--ways", "end_to_end")
    log = _read(tmp_path)
    assert Counter((entry["split"], entry["way"]) for entry in log) == Counter(
        [("development", "end_to_end"), ("development", "meta_alone"), ("validation", "end_to_end")]
    )
    for entry in log:
        assert entry["trained_flops"] == entry["flops"] <= entry["budget_flops"]
        assert str(tmp_path) not in json.dumps(entry)
        assert entry["device"]
        assert entry["torch"] == importlib.metadata.version("torch")
    assert not any((tmp_path / "out" / "trials").iterdir())
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    study("--write", "--page", page)
    loss = next(entry for entry in log if entry["split"] == "validation")["metrics"]["loss"]
    assert f"| end to end | 0.01 (flops) | 1 | {loss:.3f} |" in page.read_text()
    assert "Missing: shallow meta model alone at budget 0.01: 1 of 1 seeds not run." in page.read_text()
    assert (tmp_path / "ways_toy.png").stat().st_size > 0


def test_log_that_cannot_be_written_ends_the_study_and_loses_no_trial(
    study: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "toy.toml").write_text(_definition(0.01, "[1,1,1,1]", TWO_WAYS, []))
    log = tmp_path / "trials-toy.jsonl"
    log.symlink_to(tmp_path / "missing" / "log")
    assert f"error: {log}: No such file or directory\n" in study("--tune", code=3)
    trials = tmp_path / "out" / "trials"
    trained = {file.relative_to(trials).parts[0] for file in trials.rglob("weights.safetensors")}
    assert len(trained) == 1  # it is kept, and the second trial was stopped
    log.unlink()
    for attempt in trials.glob("*/run/*/attempts/1.json"):  # says what the trial ran on
        attempt.write_text("damaged")
    study("--tune")
    assert all("metrics" in entry for entry in _read(tmp_path))
    assert sorted(entry["device"] is None for entry in _read(tmp_path)) == [False, True]
    assert not any(trials.iterdir())


def test_way_or_budget_without_trials_is_one_line(study: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "toy.toml").write_text(_definition(0.01, "[1,1,1,1]", TWO_WAYS, []))
    says = "error: --ways: no trial has end-to-end; expected one of end_to_end, meta_alone\n"
    assert study("--tune", "--ways", "meta_alone", "end-to-end", code=2) == says
    assert study("--tune", "--budgets", 7, code=2) == "error: --budgets: no trial has 7.0; expected one of 0.01\n"


@pytest.mark.parametrize(("option", "value"), [("--jobs", "0"), ("--jobs", "two"), ("--rate", "-1"), ("--rate", "nan")])
def test_number_of_the_command_line_is_above_0(study: Callable[..., str], option: str, value: str) -> None:
    kind = "integer" if option == "--jobs" else "number"
    assert f"argument {option}: '{value}' is not a positive {kind}\n" in study("--plan", option, value, code=2)


def test_only_one_process_runs_the_trials_of_a_study(study: Callable[..., str], tmp_path: Path) -> None:
    """Otherwise both would run trials on the validation split."""
    (tmp_path / "toy.toml").write_text(_definition(0.01, "[1,1,1,1]", TWO_WAYS, []))
    out = ("--out", str(tmp_path / "first"))
    words = [sys.executable, str(BENCHMARKS / "ways.py"), str(tmp_path / "toy.toml"), "--tune", "--jobs", "1", *out]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL) as first:
        while not (tmp_path / "first" / "trials").is_dir():
            assert first.poll() is None
            time.sleep(0.02)
        says = f"error: {tmp_path / '.trials-toy.lease'} belongs to process {first.pid} on "
        assert study("--tune", code=7).startswith(says)
        assert not (tmp_path / "out").exists()
        first.send_signal(signal.SIGINT)
        assert first.wait() == 75
    assert "2 trials, 2 left" in study("--tune")


def test_a_process_is_never_polled_by_two_threads_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both would read and close its pipe. A thread whose command has ended also polls the commands of others."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    trial = importlib.import_module("ways_study.trial")
    poll, polled, at_once = ForkedProcess.poll, set(), list[int]()

    def slow_poll(process: ForkedProcess) -> int | None:
        if id(process) in polled:
            at_once.append(threading.get_ident())
        polled.add(id(process))
        time.sleep(0.02)
        polled.discard(id(process))
        return poll(process)

    monkeypatch.setattr(ForkedProcess, "poll", slow_poll)
    with trial.Commands() as commands, ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(commands.run, tmp_path / str(number), "--version") for number in range(8)]:
            done.result()
    assert not at_once
    assert [(tmp_path / str(number)).read_text().split()[0] for number in range(8)] == ["bigincubate"] * 8


@pytest.mark.full
def test_every_way_of_digits_is_trained(study: Callable[..., str], tmp_path: Path) -> None:
    ways = (BENCHMARKS / "ways_study" / "digits.toml").read_text()
    ways = ways[ways.index("[ways.incubate_short]") :]
    primary = [["incubate_short_path", "expand_average", 0.02], ["incubate_short_path", "expand_best", 0.02]]
    (tmp_path / "toy.toml").write_text(_definition(0.02, "[2,2,2,2]", ways, primary))
    _commit(tmp_path)
    study("--tune")
    study("--choose")
    _commit(tmp_path)
    study("--final")
    log = _read(tmp_path)
    assert len(log) == 6 + 8 + 3
    for entry in log:
        assert entry["trained_flops"] == entry["flops"], entry["way"]
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    study("--write", "--page", page)
    assert "Missing: nothing." in page.read_text()


@pytest.mark.full
def test_language_model_is_incubated_with_a_domain_for_each_module(study: Callable[..., str], tmp_path: Path) -> None:
    from bigincubate.data.partitions import partition_by_domain
    from bigincubate.data.text.prepare import prepare_text

    ways = (BENCHMARKS / "ways_study" / "docs-llama.toml").read_text()
    ways = ways[ways.index("[ways.decentralized]") : ways.index("# at equal critical path")]
    text = _definition(0.02, "[2,2,2,2]", ways, []).replace("margin = 0.02", "margin = { absolute = 0.02 }")
    text = text.replace(
        'recipe = "digits"', 'recipe = "docs-llama"\nunit = "TFLOP"\nmetric = { name = "bits_per_byte" }'
    )
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8}
    sets = ["train.batch_size=8", "model.context_length=32", *(f"model.args.{key}={n}" for key, n in small.items())]
    for source, samples, name in (("digits-dev", 1149, "dev"), ("digits", 1437, "whole")):
        folder, development = tmp_path / "out" / name, name == "dev"
        info = prepare_text(
            "made-up-text", folder, window=32, partition=partition_by_domain, val_fraction=0.2, development=development
        )
        changes = [f"data.path={folder}", f"data.train_samples={info.samples['train']}", *sets]
        text = text.replace(f'"data.source={source}", "data.train_samples={samples}"', json.dumps(changes)[1:-1])
    (tmp_path / "toy.toml").write_text(text)
    _commit(tmp_path)
    study("--tune")
    study("--choose")
    _commit(tmp_path)
    study("--final")
    tuned, final = _read(tmp_path)
    for entry in (tuned, final):
        assert entry["trained_flops"] == entry["flops"] <= 2e10
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    study("--write", "--page", page)
    assert f"| 1 | {final['metrics']['bits_per_byte']:.3f} |" in page.read_text()
