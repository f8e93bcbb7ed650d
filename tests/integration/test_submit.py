"""What is submitted to Slurm, to the letter. Needs no Slurm."""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Command
from records import make_attempt, make_plan

from bigincubate.cli.slurm import shell_defaults
from bigincubate.config import load_recipe
from bigincubate.errors import ConfigError, SystemResourceError
from bigincubate.files import write_json
from bigincubate.launchers.slurm import client as slurm
from bigincubate.launchers.slurm import submission_log
from bigincubate.launchers.slurm.job_logs import list_job_logs
from bigincubate.launchers.slurm.sbatch import build_sbatch_command, find_script, format_submission, split_into_arrays
from bigincubate.launchers.slurm.submission_log import QueuedJob, Submission, SubmissionLog, job_name, run_comment
from bigincubate.report import status
from bigincubate.storage.run_directory import RunDir

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
    text = format_submission(recipe, RunDir(tmp_path / "a run"), [0, 1], baseline=True)
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


@pytest.mark.parametrize("key", ["slurm.extra", "slurm.gate.extra", "slurm.srun"])
def test_options_are_given_in_one_long_word_each(fast: Path, key: str) -> None:
    """The second word of an option would be taken for the script."""
    with pytest.raises(ConfigError, match=rf"{re.escape(key)}.*given: '?-p"):
        load_recipe(str(fast), [f'{key}=["-p", "gpu"]'])


def test_wrong_key_of_a_kind_of_job_is_named(fast: Path) -> None:
    with pytest.raises(ConfigError, match=r"slurm\.incubate\.nodes: Input should be greater than or equal to 1"):
        load_recipe(str(fast), ["slurm.incubate.nodes=0"])
    assert load_recipe(str(fast), ["slurm.gpus=8", "slurm.incubate.gpus=1"]).slurm.job("incubate").gpus == 1
    assert load_recipe(str(fast), ["slurm.gpus=8"]).slurm.job("gate").gpus == 0


@pytest.mark.parametrize(
    ("answer", "job"),
    [
        ("12", ("12", None)),
        ("12;west", ("12", "west")),
        ("Submitted batch job 12", ("12", None)),
        ("Submitted batch job 12 on cluster west", ("12", "west")),
        ("*** Welcome to cluster 9, 120 nodes ***\n12\nYour quota: 3 jobs", ("12", None)),
        ("12;west\nsee https://hpc.example/2026", ("12", "west")),
        ("sbatch: 4 CPUs charged to job 7\nSubmitted batch job 12\n", ("12", None)),
        ("Submitted batch job 12\n2026\n", ("12", None)),
        ("queued as JobID: 12, thanks", ("12", None)),
        ("sbatch: lua: job accepted", (None, None)),
        ("", (None, None)),
    ],
)
def test_job_id_is_found_in_what_sbatch_prints(answer: str, job: tuple[str | None, str | None]) -> None:
    assert slurm.parse_job_id(answer) == job


def test_state_of_a_job_is_read_past_other_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "run_slurm_command", lambda *words, **_: "Maintenance on 1 May\nRUNNING\nCOMPLETING")
    assert slurm.query_job_state("1").split() == ["RUNNING", "COMPLETING"]


@pytest.mark.parametrize(("incubate", "array"), [("[1, 3]", ["--array=1,3"]), ("none", [])])
def test_dry_run_shows_only_the_modules_that_are_incubated(
    incubate: str, array: list[str], fast: Path, tmp_path: Path, call: Any
) -> None:
    sets = ["plan.target_depths=[1, 1, 1, 1]", "plan.meta_depths=[1, 1, 1, 1]", f"plan.incubate={incubate}"]
    code, out, err = call("submit", fast, "--run-dir", tmp_path / "r", "--dry-run", *(f"--set={each}" for each in sets))
    assert code == 0, err
    commands = [line for line in out.splitlines() if line.startswith("sbatch ")]
    assert [word for line in commands for word in line.split() if word.startswith("--array")] == array
    gate = next(line for line in commands if "-gate" in line)
    assert ("--dependency=afterany:PRETRAIN:INCUBATE" in gate) == bool(array)
    assert "--dependency=afterany:PRETRAIN" in gate


# ------------------------------------------------------------------------------------------------ many modules


def test_modules_beyond_an_array_come_in_another_one(fast: Path, tmp_path: Path) -> None:
    assert list(split_into_arrays([0, 3, 999, 1000, 2500], 1000)) == [(0, [0, 3, 999]), (1000, [1000]), (2000, [2500])]
    recipe = load_recipe(str(fast), ["slurm.array_parallelism=8"])
    words = build_sbatch_command(recipe, RunDir(tmp_path), "incubate", modules=[1000, 1007], offset=1000)
    assert "--array=0,7%8" in words
    assert f"--job-name={tmp_path.name}-incubate+1000" in words
    assert list(split_into_arrays([3, 7], 0)) == [(3, [3]), (7, [7])]
    words = build_sbatch_command(recipe, RunDir(tmp_path), "incubate", offset=7)
    assert "BIGINCUBATE_OFFSET=7" in words
    assert not [word for word in words if word.startswith("--array")]


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
    names = [
        "pretrain_9.out",
        *incubate,
        "incubate+12_8.out",
        "incubate+1000_6_7.out",
        "finetune_12.out",
        "finetune_12.0.out",
        "gate_7.out",
    ]
    for name in [*sorted(names), "gate.error", "other_3.out"]:
        (folder / f"bigincubate-{name}").touch()

    def listed(module: int | None = None) -> list[str]:
        return [file.name.removeprefix("bigincubate-") for file in list_job_logs(RunDir(tmp_path), module)]

    assert listed() == names
    assert listed(7) == incubate[1:]
    assert listed(12) == ["incubate+12_8.out"]
    assert listed(1007) == ["incubate+1000_6_7.out"]
    assert job_name(RunDir(tmp_path / "my run"), "incubate", 1000) == "my_run-incubate+1000"


def test_dry_run_shows_everything_and_makes_nothing(fast: Path, tmp_path: Path, bigincubate: Command) -> None:
    sets = ["--set", "slurm.time=0:30:00", "--partition", "gpu", "--account", "project 7"]
    shown = bigincubate("submit", fast, "--run-dir", tmp_path / "run", "--dry-run", *sets)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("--partition=gpu '--account=project 7'") == 4
    assert "# ---- phase.sbatch" in shown.stdout
    assert not (tmp_path / "run").exists()
    refused = bigincubate("submit", fast, "--run-dir", tmp_path / "run", "--dry-run", "--partition", "gpu\nrm -rf x")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------ status


def test_queue_is_read_by_the_ids_that_were_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the jobs of others, whatever plugins did to the comment, and as long as an Epilog runs."""
    run, asked = RunDir(tmp_path / "run"), list[tuple[str, ...]]()
    noted = [
        Submission("incubate", "run-incubate+1000", "5", modules=(1007, 1008), offset=1000, user=7),
        Submission("gate", "run-gate", "6", user=7),
        Submission("pretrain", "run-pretrain", "10", user=7),
        Submission("finetune", "run-finetune", "9", cluster="west", user=8),
    ]
    SubmissionLog(run, noted).write()
    lines = [
        "5|7|RUNNING|n2|None|run-incubate+1000|overwritten by a plugin",
        "5|8|COMPLETING|n2|None|run-incubate+1000|overwritten",
        "6|N/A|PENDING||Dependency|run-gate|",
        "10|N/A|RUNNING|n3|None|other|a job that has reused the id 10",
        f"7|N/A|PENDING||Dependency|run-gate|{run_comment(run)}",
        "8|N/A|PENDING||Priority|a|b|a comment",
        "of two lines",
    ]

    def answer(*words: str, cluster: str | None = None) -> str:
        asked.append((*words, str(cluster)))
        if words[0] == "scancel":
            lines.clear()  # and with them the jobs of the other cluster
            return ""
        if not lines:
            return ""
        return "\n".join(lines) if cluster is None else "CLUSTER: west\n9|N/A|RUNNING|w1|None|run-finetune|"

    monkeypatch.setattr(submission_log, "run_slurm_command", answer)
    monkeypatch.setattr(submission_log, "hides_jobs_of_others", lambda: False)
    assert submission_log.list_queued_jobs(run) == [
        QueuedJob("5", "incubate", 1007, "RUNNING", "n2", "None"),
        QueuedJob("5", "incubate", 1008, "COMPLETING", "n2", "None"),
        QueuedJob("6", "gate", None, "PENDING", "", "Dependency"),
        QueuedJob("9", "finetune", None, "RUNNING", "w1", "None", "west"),
    ]
    assert [("--user=7" in words, "--user=8" in words, words[-1]) for words in asked] == [
        (True, False, "None"),
        (False, True, "west"),
    ]
    asked.clear()
    assert submission_log.cancel_jobs(run) == ["6", "5", "9"]
    canceled = [words for words in asked if words[0] == "scancel"]
    assert canceled == [("scancel", "6", "5", "None"), ("scancel", "9", "west")]
    monkeypatch.setattr(submission_log, "hides_jobs_of_others", lambda: True)
    with pytest.raises(SystemResourceError, match="belong to user id 7, 8, who must continue it"):
        submission_log.list_queued_jobs(run)


def test_programs_of_slurm_ignore_the_variables_of_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = ("SQUEUE_PARTITION", "SBATCH_ARRAY_INX", "SBATCH_PARTITION", "SRUN_CPUS_PER_TASK", "SLURM_JOB_ID")
    kept = ("SLURM_CONF", "SLURM_JWT", "SBATCH_EXPORT", "SLURMISH", "PATH")
    for name in (*dropped, *kept):
        monkeypatch.setenv(name, "/usr/bin" if name == "PATH" else "x")
    assert not set(dropped) & slurm.slurm_environment().keys()
    assert set(kept) <= slurm.slurm_environment().keys()


def test_variables_of_sbatch_become_part_of_the_recipe(fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate that submits the later phases does not have the variables of the user's shell."""
    monkeypatch.setenv("SBATCH_ACCOUNT", "physics")
    monkeypatch.setenv("SBATCH_PARTITION", "gpu")
    assert shell_defaults(load_recipe(str(fast))) == ["slurm.account=physics", "slurm.partition=gpu"]
    assert shell_defaults(load_recipe(str(fast), ["slurm.partition=cpu"])) == ["slurm.account=physics"]


def test_all_words_of_slurm_are_shown_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch = tmp_path / "sbatch"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def refusal(words: str) -> SystemResourceError:
        (tmp_path / "words").write_text(words)
        sbatch.write_text(f"#!/bin/bash\ncat {tmp_path}/words >&2\nexit 1\n")
        sbatch.chmod(0o755)
        with pytest.raises(SystemResourceError) as raised:
            slurm.submit_job(["sbatch"])
        return raised.value

    policy = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
    limit = refusal(f"sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: {policy}\n")
    assert isinstance(limit, slurm.JobRefusedError)
    assert (str(limit), limit.at_limit) == (f"QOSMaxSubmitJobPerUserLimit; {policy}", True)
    size = refusal(f"sbatch: error: QOSMinGRES\nsbatch: error: {policy}\n")
    assert isinstance(size, slurm.JobRefusedError)
    assert not size.at_limit  # fewer jobs would not help
    other = refusal("sbatch: error: invalid partition specified: gpu\nsbatch: error: Batch job submission failed\n")
    assert isinstance(other, slurm.JobRefusedError)
    assert not other.at_limit
    unknown = refusal("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation\n")
    assert not isinstance(unknown, slurm.JobRefusedError)  # Slurm may have accepted the job


def test_options_of_sbatch_reach_the_jobs_that_need_them(fast: Path, tmp_path: Path) -> None:
    common = ["--reservation=r", "--exclusive", "--gpus-per-task=1", "--ntasks=8", "--mem-per-gpu=9G"]
    sets = [f"slurm.extra={common}", "slurm.memory=64G", 'slurm.gate.extra=["--mail-type=FAIL"]', "slurm.time=9:00:00"]
    recipe, run = load_recipe(str(fast), [*sets, "slurm.gate.partition=cpu"]), RunDir(tmp_path)
    phase, gate = (build_sbatch_command(recipe, run, kind) for kind in ("finetune", "gate"))
    assert set(common) <= set(phase)
    assert not [word for word in phase if re.match("--(nodes|ntasks-per-node|gpus-per-node|mem)=", word)]
    assert {"--reservation=r", "--mail-type=FAIL", "--partition=cpu"} <= set(gate)
    assert {"--mem=4G", "--time=0:30:00", "--cpus-per-task=1", "--nodes=1"} <= set(gate)
    assert not set(common[1:]) & set(gate)


@pytest.mark.parametrize("option", ["--mem-per-cpu=1G", "--gres=gpu:8", "--gpus=8", "--gpus-per-task=1", "--mem=0"])
def test_option_replaces_the_key_of_the_same_meaning(option: str, fast: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(fast), ["slurm.gpus=4", "slurm.memory=2G", f'slurm.extra=["{option}"]'])
    words = build_sbatch_command(recipe, RunDir(tmp_path), "pretrain")
    assert ("--mem=2G" in words, "--gpus-per-node=4" in words) == ("gpu" in option, "gpu" not in option)


def test_ranks_may_run_in_a_container_and_the_scripts_outside_of_it(fast: Path, tmp_path: Path) -> None:
    sets = ['slurm.srun=["--container-image=a b.sqsh", "--cpu-bind=cores"]', "slurm.python=python3"]
    recipe = load_recipe(str(fast), sets)
    words = build_sbatch_command(recipe, RunDir(tmp_path), "pretrain")
    assert [word for word in words if word.startswith("SRUN=")] == [
        "SRUN=--container-image=a b.sqsh",
        "SRUN=--cpu-bind=cores",
    ]
    assert f"BIGINCUBATE_HOST_PYTHON={sys.executable}" in words
    assert not [word for word in build_sbatch_command(recipe, RunDir(tmp_path), "gate") if word.startswith("SRUN=")]


@pytest.mark.parametrize("folder", ["50% of it", "a+b"])
def test_log_is_written_to_the_run_directory_whatever_its_name(fast: Path, tmp_path: Path, folder: str) -> None:
    words = build_sbatch_command(load_recipe(str(fast)), RunDir(tmp_path / folder), "pretrain")
    (output,) = (word.partition("=")[2] for word in words if word.startswith("--output="))
    assert output.replace("%%", "%") == str(tmp_path / folder / "slurm" / "bigincubate-pretrain_%j.out")


def test_status_asks_slurm_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, answers, times = [0.0], iter([["a"], ["b"], ["b"], ["b"]]), list[float]()

    def answer(run: RunDir) -> Any:
        times.append(now[0])
        return next(answers, None)

    monkeypatch.setattr(status, "read_queue", answer)
    reader = status.QueueReader(RunDir(tmp_path), clock=lambda: now[0])
    for second in range(0, 240, 2):
        now[0] = second
        reader.read()
    assert times == [0, 30, 60, 120, 180]


def test_status_merges_the_files_with_the_queue(fast: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path / "run")
    write_json(run.path / "plan.json", make_plan("pretrain", "incubate/0", "incubate/1"))
    running = make_attempt(job="5")
    module = run.phase("incubate", 0)
    run.phase("pretrain").write_attempt(1, **running)
    run.phase("incubate", 0).write_attempt(1, **running)
    run.phase("incubate", 0).write_attempt(2, **running)
    killed = {"job": "5", "checkpoint": None, "reason": "a rank was ended by SIGKILL", "code": 137, "nodes": "n2"}
    module.log_requeue(**killed)
    queued = [
        QueuedJob("5", "incubate", 0, "RUNNING", "n2", "None"),
        QueuedJob("5", "incubate", 1, "PENDING", "", "Resources"),
    ]

    def shown() -> dict[str, list[object]]:
        keys = ("state", "job", "queue", "node", "restarts", "error")
        return {row["phase"]: [row[key] for key in keys] for row in status.run_status(run)}

    monkeypatch.setattr(status, "list_queued_jobs", lambda run: queued)
    resume = f"continue with: bigincubate resume {run.path}"
    alone = shown()
    assert alone["incubate/0"] == ["running", None, None, "n1", 1, "a rank was ended by SIGKILL"]
    SubmissionLog(run).write()
    assert shown() == {
        "pretrain": ["died", None, None, "n1", 0, None],
        "incubate/0": ["running", "5", "RUNNING", "n2", 1, "a rank was ended by SIGKILL"],
        "incubate/1": ["queued", "5", "PENDING (Resources)", None, 0, None],
        "finetune": ["waiting", None, None, None, 0, None],
        "gate": ["missing", None, None, None, 0, resume],
    }
    for _ in range(2):
        module.log_requeue(**{**killed, "reason": "exit code 1", "code": 1, "nodes": "n3"})
    assert shown()["incubate/0"][-1] == "exit code 1, twice in a row on n3"
    traces = {"pretrain": "no python", "incubate-0": "no python", "gate": "no setup script"}
    for name, text in traces.items():
        (run.path / "slurm").mkdir(exist_ok=True)
        (run.path / "slurm" / f"{name}.error").write_text(f"{text}\n")
    assert {key: (row[0], row[-1]) for key, row in shown().items()} == {
        "pretrain": ("died", "no python"),
        "incubate/0": ("running", "exit code 1, twice in a row on n3"),
        "incubate/1": ("queued", None),
        "finetune": ("waiting", "gate: no setup script"),
        "gate": ("missing", f"no setup script; {resume}"),
    }
    queued += [
        QueuedJob("6", "gate", None, "PENDING", "", "Dependency"),
        QueuedJob("7", "finetune", None, "PENDING", "", "JobHoldMaxRequeue"),
    ]
    assert shown()["gate"][:3] == ["queued", "6", "PENDING (Dependency)"]
    assert shown()["finetune"][0] == "held"
    assert shown()["finetune"][-1] == "held: scontrol release 7"
    queued[2] = replace(queued[2], reason="JobHeldAdmin")
    assert shown()["gate"][0] == "held"
    queued[2] = replace(queued[2], reason="Dependency")
    (run.path / "slurm" / "gate.exits").write_text("3\n3\n3\n")
    assert shown()["gate"][0] == "looping"
    del queued[2:]
    shutil.rmtree(run.path / "slurm")
    (run.phase("incubate", 0).path / "requeues.jsonl").unlink()
    module.log_requeue(**killed)
    SubmissionLog(run, [Submission("pretrain", "run-pretrain", "5")]).write()
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")  # no Slurm here
    assert shown() == alone
