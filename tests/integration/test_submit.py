"""What is submitted to Slurm, to the letter, and how a job decides that it ends. Needs no Slurm."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import Command

from bigincubate.config import load_recipe
from bigincubate.errors import ConfigError, SystemResourceError
from bigincubate.files import append_json_line, write_json
from bigincubate.launchers.slurm import client as slurm
from bigincubate.launchers.slurm import requeue as ending
from bigincubate.launchers.slurm.client import QueuedJob, job_name, list_job_logs, run_comment
from bigincubate.launchers.slurm.requeue import handle_job_exit
from bigincubate.launchers.slurm.sbatch import build_sbatch_command, find_script, format_submission, split_into_arrays
from bigincubate.report import status
from bigincubate.storage.run_directory import PhaseDir, RunDir
from bigincubate.tasks.metric import Metric

GOLDEN = Path(__file__).parents[1].joinpath("golden") / "submit.txt"


# ------------------------------------------------------------------------------------------------ what is submitted


def test_commands_and_scripts_are_the_golden_ones(fast: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`UPDATE_GOLDEN=1 pytest tests/integration/test_submit.py -k golden` writes them anew."""
    monkeypatch.setenv("PYTHONPATH", "/a checkout")
    monkeypatch.setenv("BIGINCUBATE_LOG_LEVEL", "debug")
    sets = [
        "slurm.python=/opt/python",
        "slurm.time=1:00:00",
        "slurm.array_parallelism=2",
        "slurm.finetune.nodes=2",
        "slurm.gpus=4",
        "slurm.ranks=4",
    ]
    recipe = load_recipe(str(fast), [*sets, 'slurm.extra=["--exclusive"]', "slurm.setup_script=/site/set up.sh"])
    text = format_submission(recipe, RunDir(tmp_path / "a run"), 2, baseline=True)
    text = text.replace(str(tmp_path), "/TMP").replace(str(find_script("gate").parent), "/SCRIPTS")
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


@pytest.mark.parametrize("table", ['extra = ["--mail-user=a\\nrm -rf /"]', '[slurm.incubate]\npartition = "a\\u0007"'])
def test_control_characters_never_reach_sbatch(fast: Path, tmp_path: Path, table: str) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(f"{fast.read_text()}[slurm]\n{table}\n")
    with pytest.raises(ConfigError, match="a control character in"):
        build_sbatch_command(load_recipe(str(file)), RunDir(tmp_path), "incubate", modules=[0])


def test_wrong_key_of_a_kind_of_job_is_named(fast: Path) -> None:
    with pytest.raises(ConfigError, match=r"slurm\.incubate\.nodes: Input should be greater than or equal to 1"):
        load_recipe(str(fast), ["slurm.incubate.nodes=0"])
    assert load_recipe(str(fast), ["slurm.gpus=8", "slurm.incubate.gpus=1"]).slurm.job("incubate").gpus == 1
    assert load_recipe(str(fast), ["slurm.gpus=8"]).slurm.job("gate").gpus == 0


@pytest.mark.parametrize(
    ("answer", "job"),
    [
        ("12", "12"),
        ("12;west", "12"),
        ("Submitted batch job 12", "12"),
        ("Submitted batch job 12 on cluster west", "12"),
        ("*** Welcome to cluster 9, 120 nodes ***\n12\nYour quota: 3 jobs", "12"),
        ("12;west\nsee https://hpc.example/2026", "12"),
        ("sbatch: 4 CPUs charged to job 7\nSubmitted batch job 12\n", "12"),
        ("queued as JobID: 12, thanks", "12"),
        ("sbatch: lua: job accepted", None),
        ("", None),
    ],
)
def test_job_id_is_found_in_what_sbatch_prints(answer: str, job: str | None) -> None:
    assert slurm.parse_job_id(answer) == job


def test_job_of_which_sbatch_prints_no_id_is_found_in_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "run")
    queue = [f"5|N/A|RUNNING|bigincubate-pretrain|n1|None|{run_comment(run)}"]
    answers = {"sbatch": "accepted, 3 of 10 jobs", "squeue": ""}
    monkeypatch.setattr(slurm, "run_slurm_command", lambda *words, **_: answers[words[0]])
    with pytest.raises(
        SystemResourceError, match=r"no job id \(accepted, 3 of 10 jobs\), and there is no new job"
    ) as raised:
        slurm.submit_job(["sbatch"], run, "pretrain", known=())
    assert "\n" not in str(raised.value)
    answers["squeue"] = "\n".join([*queue, queue[0].replace("5|", "11|", 1)])
    assert slurm.submit_job(["sbatch"], run, "pretrain", known={"5"}) == "11"


def test_state_of_a_job_is_read_past_other_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "run_slurm_command", lambda *words, **_: "Maintenance on 1 May\nRUNNING\nCOMPLETING")
    assert slurm.query_job_state("1").split() == ["RUNNING", "COMPLETING"]


@pytest.mark.parametrize("kind", ["pretrain", "incubate", "finetune", "end_to_end", "gate"])
@pytest.mark.parametrize(
    ("setup", "says"),
    [
        ("", "cannot start bigincubate: /nowhere: No module named bigincubate"),
        ("exit 5", "the setup script ended the job with exit code 5"),
    ],
)
def test_job_that_ends_before_python_leaves_a_trace(kind: str, setup: str, says: str, tmp_path: Path) -> None:
    """The script gets everything from its arguments, and the environment of a job with ``--export=NONE``."""
    tools, run = tmp_path / "bin", RunDir(tmp_path / "a run")
    tools.mkdir()
    for name, text in {
        "srun": "exit 1",
        "scontrol": "exit 0",
        "python": 'if [ "$*" = "-m bigincubate --version" ] && [ ! -e "$PYTHONPATH/fixed" ]; then\n'
        '  echo "/nowhere: No module named bigincubate" >&2; exit 1; fi',
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    (tmp_path / "setup.sh").write_text(setup)
    variables = [
        f"PYTHON={tools / 'python'}",
        f"PYTHONPATH={tmp_path}",
        f"BIGINCUBATE_SETUP_SCRIPT={tmp_path}/setup.sh",
    ]
    arguments = [run.path] if kind == "gate" else [tmp_path / "recipe.toml", run.path]
    names = {"JOB_ID": "7", "JOB_NODELIST": "n1", "ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "3"}
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", **{f"SLURM_{key}": value for key, value in names.items()}}

    def start() -> int:
        command = ["bash", str(find_script(kind)), *variables, *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, check=False).returncode

    assert start() == (5 if setup else 3)
    key = "incubate/3" if kind == "incubate" else kind
    assert re.fullmatch(rf"job 7(_3)? on \S+: {re.escape(says)}", slurm.read_job_trace(run, key))
    if not setup:
        (tmp_path / "fixed").touch()
        assert start() == 0
        assert slurm.read_job_trace(run, key) == ""


# ------------------------------------------------------------------------------------------------ how a job ends


@pytest.fixture
def requeued(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Slurm that says of every job that it runs, and notes what it was asked to requeue."""
    asked: list[str] = []
    monkeypatch.setattr(ending, "query_job_state", lambda job: "RUNNING")
    monkeypatch.setattr(ending, "requeue_job", asked.append)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    return asked


@pytest.mark.parametrize("code", [2, 4, 5, 6])
def test_job_that_would_fail_again_is_not_requeued(tmp_path: Path, code: int, requeued: list[str]) -> None:
    assert handle_job_exit(PhaseDir(tmp_path), "1", code)[0] == code
    assert requeued == []


def test_finished_phase_is_done_whatever_srun_returns(tmp_path: Path, requeued: list[str]) -> None:
    PhaseDir(tmp_path).write_result({"metrics": {"top1": 1.0}})
    assert handle_job_exit(PhaseDir(tmp_path), "1", 137)[0] == 0
    assert requeued == []


def test_job_ended_by_slurm_is_not_requeued(
    tmp_path: Path, requeued: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "query_job_state", lambda job: "COMPLETING")
    assert handle_job_exit(PhaseDir(tmp_path), "1", 75) == (
        75,
        "stopped with a checkpoint; Slurm has ended this job: COMPLETING",
    )
    assert requeued == []


def test_restarts_are_bounded(tmp_path: Path, requeued: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGINCUBATE_MAX_REQUEUES", "2")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    code, why = handle_job_exit(PhaseDir(tmp_path), "1", 137)
    assert (code, why) == (
        137,
        "a rank was ended by SIGKILL; not requeued: already requeued 2 times (slurm.max_requeues)",
    )
    assert requeued == []


def test_job_without_progress_is_requeued_three_times(tmp_path: Path, requeued: list[str]) -> None:
    folder = PhaseDir(tmp_path)
    for step in (5, 10, 10, 10):
        marker = folder.checkpoints / f"step-{step:08d}" / "COMMITTED"
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        assert "; requeued" in handle_job_exit(folder, "4_1", 137)[1]
    assert "no progress in 3 requeues" in handle_job_exit(folder, "4_1", 137)[1]
    assert requeued == ["4_1"] * 4
    assert (
        "; requeued" in handle_job_exit(folder, "9_1", 137)[1]
    )  # a job that a person submitted afterwards counts anew


# ------------------------------------------------------------------------------------------------ many modules


def test_modules_beyond_an_array_come_in_another_one(fast: Path, tmp_path: Path) -> None:
    assert list(split_into_arrays([0, 3, 999, 1000, 2500], 1000)) == [(0, [0, 3, 999]), (1000, [1000]), (2000, [2500])]
    recipe = load_recipe(str(fast), ["slurm.array_parallelism=8"])
    words = build_sbatch_command(recipe, RunDir(tmp_path), "incubate", modules=[1000, 1007], offset=1000)
    assert "--array=0,7%8" in words
    assert "--job-name=bigincubate-incubate+1000" in words


def test_logs_are_listed_by_module_and_in_the_order_of_the_pipeline(tmp_path: Path) -> None:
    folder = tmp_path / "slurm"
    folder.mkdir()
    incubate = [
        "incubate_10_2.out",
        "incubate_5_7.out",
        "incubate_5_7.0.out",
        "incubate_5_7.1.out",
        "incubate_11_7.out",
    ]
    names = ["pretrain_9.out", *incubate, "incubate+1000_6_7.out", "finetune_12.out", "finetune_12.0.out", "gate_7.out"]
    for name in [*sorted(names), "gate.error", "other_3.out"]:
        (folder / f"bigincubate-{name}").touch()

    def listed(module: int | None = None) -> list[str]:
        return [file.name.removeprefix("bigincubate-") for file in list_job_logs(RunDir(tmp_path), module)]

    assert listed() == names
    assert listed(7) == incubate[1:]
    assert listed(1007) == ["incubate+1000_6_7.out"]
    assert job_name("incubate", 1000) == "bigincubate-incubate+1000"


def test_dry_run_shows_everything_and_makes_nothing(fast: Path, tmp_path: Path, bigincubate: Command) -> None:
    sets = ["--set", "slurm.time=0:30:00", "--partition", "gpu", "--account", "project 7"]
    shown = bigincubate("submit", fast, "--run-dir", tmp_path / "run", "--dry-run", *sets)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("--partition=gpu '--account=project 7'") == 4
    assert "# ---- finetune.sbatch" in shown.stdout
    assert not (tmp_path / "run").exists()
    refused = bigincubate("submit", fast, "--run-dir", tmp_path / "run", "--dry-run", "--partition", "gpu\nrm -rf x")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------ status


def test_queue_is_read_past_the_jobs_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = (run_comment(RunDir(tmp_path / name)) for name in ("run", "other"))
    lines = [
        f"5|7|RUNNING|bigincubate-incubate+1000|n2|None|{mine}",
        f"5|8|COMPLETING|bigincubate-incubate+1000|n2|None|{mine}",
        f"6|N/A|PENDING|bigincubate-gate||Dependency|{mine}",
        f"7|N/A|PENDING|bigincubate-gate||Dependency|{theirs}",
        "8|N/A|PENDING|a|b||Priority|a comment",
        "of two lines",
    ]
    monkeypatch.setattr(slurm, "run_slurm_command", lambda *words: "\n".join(lines))
    assert slurm.list_queued_jobs(RunDir(tmp_path / "run")) == [
        QueuedJob("5", "incubate", 1007, "RUNNING", "n2", "None"),
        QueuedJob("6", "gate", None, "PENDING", "", "Dependency"),
    ]


def test_status_merges_the_files_with_the_queue(fast: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path / "run")
    rows = [("pretrain", None), ("incubate/0", 0), ("incubate/1", 1), ("finetune", None)]
    about = {"steps": 10, "batch_size": 8, "unit": "images", "metrics": [asdict(Metric("top1", "top-1", "%"))]}
    write_json(
        run.path / "plan.json",
        {
            "rows": [
                {"key": key, "phase": key.split("/")[0], "module": module, "title": key, **about}
                for key, module in rows
            ]
        },
    )
    running = {"state": "running", "host": "n1", "pid": 1, "job": "5"}
    run.phase("pretrain").write_attempt(1, **running)
    run.phase("incubate", 0).write_attempt(1, **running)
    run.phase("incubate", 0).write_attempt(2, **running)
    append_json_line(run.phase("incubate", 0).path / "requeues.jsonl", {"reason": "a rank was ended by SIGKILL"})
    queued = [
        QueuedJob("5", "incubate", 0, "RUNNING", "n2", "None"),
        QueuedJob("5", "incubate", 1, "PENDING", "", "Resources"),
    ]

    def shown() -> dict[str, list[object]]:
        keys = ("state", "job", "queue", "node", "restarts", "error")
        return {row["phase"]: [row[key] for key in keys] for row in status.run_status(run)}

    monkeypatch.setattr(status, "list_queued_jobs", lambda run: queued)
    alone = shown()
    assert alone["incubate/0"] == ["running", None, None, "n1", 1, "a rank was ended by SIGKILL"]
    write_json(run.path / "jobs.json", {})
    assert shown() == {
        "pretrain": ["died", None, None, "n1", 0, None],
        "incubate/0": ["running", "5", "RUNNING", "n2", 1, "a rank was ended by SIGKILL"],
        "incubate/1": ["queued", "5", "PENDING (Resources)", None, 0, None],
        "finetune": ["waiting", None, None, None, 0, None],
    }
    traces = {"pretrain": "no python", "incubate-0": "no python", "gate": "no setup script"}
    for name, text in traces.items():
        (run.path / "slurm").mkdir(exist_ok=True)
        (run.path / "slurm" / f"{name}.error").write_text(f"{text}\n")
    assert {key: (row[0], row[-1]) for key, row in shown().items()} == {
        "pretrain": ("died", "no python"),
        "incubate/0": ("running", "a rank was ended by SIGKILL"),
        "incubate/1": ("queued", None),
        "finetune": ("waiting", "gate: no setup script"),
    }
    shutil.rmtree(run.path / "slurm")
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")  # no Slurm here
    assert shown() == alone
