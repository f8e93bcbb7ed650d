"""Replays to the real W&B and MLflow, which are installed in a separate environment: `make test-extras`."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import wandb_server
from tracked_runs import KEYS, finish, finished_run, log, logged, make_run, phase_of

from bigincubate.files import append_json_line, write_text
from bigincubate.interchange.trackers import background
from bigincubate.interchange.trackers.registry import make_tracker
from bigincubate.interchange.trackers.replay import Replay, tracked_phase
from bigincubate.storage.run_directory import RunDir

pytestmark = [
    pytest.mark.extras,
    pytest.mark.skipif(
        not (find_spec("wandb") and find_spec("mlflow")), reason="needs W&B and MLflow: run `make test-extras`"
    ),
]
PROGRAMS = Path(sys.executable).parent
Points = dict[int, dict[str, float]]  # metrics by step
ReadPoints = Callable[[RunDir, str], list[tuple[int, dict[str, float]]]]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Set the environment variables of W&B and MLflow, and a home directory without their settings."""
    for name in os.environ:
        if name.startswith(("WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def track(run: RunDir, *words: object, code: int = 0) -> str:
    """Run the command, and return its output."""
    command = [sys.executable, "-m", "bigincubate", "track", str(run.path), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(Path(background.__file__).parents[3])}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert ended.returncode == code, ended.stderr
    return ended.stderr if code else ended.stdout


def id_of(run: RunDir, key: str) -> str:
    rows = json.loads((run.path / "plan.json").read_text())["rows"]
    return next(tracked_phase(run, run.load_recipe(), row).id for row in rows if row["key"] == key)


# ------------------------------------------------------------------------------------------------ W&B


def read_wandb(run: RunDir, key: str, kind: str = "history") -> list[dict[str, Any]]:
    """Return the records of a kind in all offline files of a phase, oldest first, read with W&B's own code."""
    found = []
    for file in sorted(run.path.glob(f"trackers/wandb/offline-run-*/run-{id_of(run, key)}.wandb")):
        command = [str(PROGRAMS / "wandb"), "leet", "inspect", "--json", str(file)]
        lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
        found += [record[kind] for record in map(json.loads, lines) if record["type"] == kind]
    return found


def wandb_points(run: RunDir, key: str) -> list[tuple[int, dict[str, float]]]:
    return [
        (
            record["step"]["num"],
            {name: float(value) for name, value in record["item"].items() if not name.startswith("_")},
        )
        for record in read_wandb(run, key)
    ]


def wandb_summary(run: RunDir, key: str) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for record in read_wandb(run, key, "summary"):
        summary |= record["update"]
    return summary


def test_wandb_offline_files_have_the_log_once(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "run")
    out = track(run, "--to", "wandb", "--project", "mine")
    files = sorted(run.path.glob("trackers/wandb/offline-run-*/*.wandb"))
    track(run, "--to", "wandb", "--project", "mine")
    assert sorted(run.path.glob("trackers/wandb/offline-run-*/*.wandb")) == files
    assert len(files) == len(KEYS)
    for key in KEYS:
        assert wandb_points(run, key) == list(logged(run, key).items())
        summary = wandb_summary(run, key)
        assert (summary["result/top1"], summary["result/seconds"]) == (91.5, 3.5)
        (about,) = read_wandb(run, key, "run")
        assert (about["project"], about["run_id"]) == ("mine", id_of(run, key))
        assert about["run_group"] == f"run-{id_of(run, key)[:10]}"
        assert about["config"]["update"]["train.lr"] == run.load_recipe().settings(key.split("/")[0]).train.lr  # type: ignore[arg-type]
    # the printed command names exactly these folders
    command = out.splitlines()[-1].partition("upload with: ")[2]
    shown = subprocess.run(
        f"{PROGRAMS}/{command} --dry-run", shell=True, capture_output=True, text=True, timeout=60, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert all(id_of(run, key) in shown.stdout + shown.stderr for key in KEYS)


def test_wandb_later_replay_adds_only_later_steps(tmp_path: Path) -> None:
    """The second replay may follow within the same second, which is in the name of the folder, or after a rollback."""
    run = make_run(tmp_path / "run")
    log(run, "pretrain", 2, 4)
    for steps in ((), (6,), (8,)):
        log(run, "pretrain", *steps)
        with Replay(run, "wandb", make_tracker("wandb", run)) as replay:
            replay.update()
    assert wandb_points(run, "pretrain") == list(logged(run, "pretrain").items())
    before = logged(run, "pretrain")
    phase_of(run, "pretrain").metrics.unlink()
    log(run, "pretrain", 2, 4, 5, 6, 10, loss=2.0)
    finish(run, "pretrain", 10)
    run = RunDir(run.path.rename(tmp_path / "moved"))
    track(run, "--to", "wandb")
    track(run, "--to", "wandb")
    after = {10: logged(run, "pretrain")[10]}
    assert wandb_points(run, "pretrain") == [*before.items(), *after.items()]
    assert wandb_summary(run, "pretrain")["result/steps"] == 10


def test_wandb_file_of_a_killed_process_is_continued(tmp_path: Path) -> None:
    """A record may be truncated at any byte, and a file may have many blocks."""
    run = make_run(tmp_path / "run")
    for step in range(1, 201):
        values = {f"layer/{number}/norm": step + number / 7 for number in range(40)}
        append_json_line(phase_of(run, "pretrain").metrics, {"step": step, **values, "nan": math.nan})
    track(run, "--to", "wandb")
    (file,) = run.path.glob("trackers/wandb/offline-run-*/*.wandb")
    whole = file.read_bytes()
    assert len(whole) > 4 * 32768
    from bigincubate.compat.wandb import read_recorded

    assert read_recorded(file)[0] == 200
    for size in (0, 5, 7, 9, 3000, 32768 * 2 - 3, 32768 * 2 + 4, len(whole) - 1):
        file.write_bytes(whole[:size])
        seen = [step for step, _ in wandb_points(run, "pretrain")] if size > 7 else []
        assert read_recorded(file)[0] == max(seen, default=-1)
    file.write_bytes(whole[: len(whole) // 2])
    track(run, "--to", "wandb")
    assert [step for step, _ in wandb_points(run, "pretrain")] == list(range(1, 201))
    write_text(file, "something else")
    assert "not a file of W&B; move its folder away" in track(run, "--to", "wandb", code=3)


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_wandb_server_gets_each_step_once(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each replay may be uploaded separately; in offline mode, also several folders of one run at once."""
    run = make_run(tmp_path / "run")
    with wandb_server.serve() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
        if mode == "online":
            monkeypatch.setenv("WANDB_MODE", mode)
        for steps, upload in (((2, 4), True), ((6,), False), ((8, 10), True), ((), True)):
            log(run, "pretrain", *steps)
            out = track(run, "--to", "wandb")
            if mode == "offline" and upload:
                command = out.splitlines()[-1].partition("upload with: ")[2]
                subprocess.run(f"{PROGRAMS}/{command}", shell=True, capture_output=True, timeout=120, check=True)
        assert server.steps(id_of(run, "pretrain")) == [2, 4, 6, 8, 10]
        assert server.groups == {id_of(run, "pretrain"): f"run-{id_of(run, 'pretrain')[:10]}"}


# ------------------------------------------------------------------------------------------------ MLflow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow server on this machine."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(PROGRAMS / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--default-artifact-root", str(folder)]
    uri = f"http://127.0.0.1:{port}"
    with (folder / "log").open("wb") as output:
        # in a separate session, because it starts workers that must be ended with it
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder, start_new_session=True)
    try:
        while True:
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=5).close()
                break
            except OSError:
                try:
                    process.wait(0.2)
                except subprocess.TimeoutExpired:
                    continue
                pytest.fail((folder / "log").read_text())
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def mlflow_run(uri: str, run: RunDir, key: str, experiment: str) -> tuple[Any, Any]:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    number = client.get_experiment_by_name(experiment).experiment_id
    (found,) = client.search_runs([number], f"tags.`bigincubate.id` = '{id_of(run, key)}'")
    return client, found


def mlflow_points(uri: str, run: RunDir, key: str, experiment: str) -> list[tuple[int, str, float]]:
    """Return all points of a phase's run except those of its result, sorted."""
    client, found = mlflow_run(uri, run, key, experiment)
    histories = (client.get_metric_history(found.info.run_id, name) for name in found.data.metrics)
    points = [(point.step, point.key, point.value) for history in histories for point in history]
    return sorted(point for point in points if not point[1].startswith("result/"))


def log_points(run: RunDir, key: str) -> list[tuple[int, str, float]]:
    return sorted((step, name, value) for step, row in logged(run, key).items() for name, value in row.items())


def test_mlflow_server_has_the_log_once(tmp_path: Path, server: str) -> None:
    run = make_run(tmp_path / "run")
    for key in KEYS:
        log(run, key, *range(1, 600))  # more points than fit in one request
    finish(run, "pretrain", 599)
    for _ in range(2):
        assert server in track(run, "--to", "mlflow", "--out", server, "--project", "once")
        for key in KEYS:
            assert mlflow_points(server, run, key, "once") == log_points(run, key)
    _, found = mlflow_run(server, run, "pretrain", "once")
    assert found.info.status == "FINISHED"
    assert found.data.metrics["result/top1"] == 91.5
    assert found.data.params["train.lr"] == str(run.load_recipe().settings("pretrain").train.lr)
    assert found.data.tags["bigincubate.run"] == f"run-{id_of(run, 'pretrain')[:10]}"
    assert mlflow_run(server, run, "finetune", "once")[1].info.status == "RUNNING"


def test_mlflow_run_continues_after_a_move_and_a_rollback(tmp_path: Path, server: str) -> None:
    run = make_run(tmp_path / "run")
    log(run, "pretrain", 2, 4)
    track(run, "--to", "mlflow", "--out", server, "--project", "moved")
    before = log_points(run, "pretrain")
    phase_of(run, "pretrain").metrics.unlink()
    log(run, "pretrain", 2, 6, loss=2.0)
    shutil.copytree(run.path, tmp_path / "copy")
    run = RunDir(run.path.rename(tmp_path / "renamed"))
    for each in (run, RunDir(tmp_path / "copy")):
        track(each, "--to", "mlflow", "--out", server, "--project", "moved")
    later = [point for point in log_points(run, "pretrain") if point[0] == 6]
    assert mlflow_points(server, run, "pretrain", "moved") == sorted([*before, *later])


def test_mlflow_writes_nan_and_a_database_in_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    append_json_line(phase_of(run, "pretrain").metrics, {"step": 2, "train/loss": math.nan, "train/lr": 0.5})
    for _ in range(2):
        out = track(run, "--to", "mlflow")
    uri = f"sqlite:///{run.path}/trackers/mlflow.db"
    assert uri in out
    (step, name, loss), other = mlflow_points(uri, run, "pretrain", "bigincubate")
    assert (step, name, math.isnan(loss)) == (2, "train/loss", True)
    assert other == (2, "train/lr", 0.5)


def test_mlflow_server_that_does_not_answer_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished_run(tmp_path / "run")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{unused.getsockname()[1]}"
        message = track(run, "--to", "mlflow", "--out", uri, code=3)
    last = message.strip().splitlines()[-1]
    assert last.startswith("bigincubate: mlflow: ")
    assert "Traceback" not in message


# ------------------------------------------------------------------------------------------------ while training


def test_trackers_receive_a_phase_while_it_is_logged(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In a very short phase, the processes may be asked to end before they have started."""
    monkeypatch.setattr(background, "PATIENCE_S", 300.0)
    monkeypatch.setenv("PYTHONPATH", str(Path(background.__file__).parents[3]))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "live")
    run = make_run(tmp_path / "run")
    with background.track_in_background(run, phase_of(run, "pretrain"), "pretrain", ["wandb", "mlflow"]):
        log(run, "pretrain", 2, 4, 6, 8)
        finish(run, "pretrain")
    assert [record.getMessage() for record in caplog.records] == []
    assert wandb_points(run, "pretrain") == list(logged(run, "pretrain").items())
    assert mlflow_points(server, run, "pretrain", "live") == log_points(run, "pretrain")
