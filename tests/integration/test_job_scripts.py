"""The scripts in `slurm/`, run by bash with programs that write down how they were called. Needs no Slurm."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from bigincubate.launchers.slurm.job_logs import count_gate_failures, read_job_trace
from bigincubate.launchers.slurm.sbatch import find_script
from bigincubate.storage.run_directory import RunDir


@pytest.mark.parametrize("kind", ["pretrain", "incubate", "finetune", "end_to_end", "gate"])
@pytest.mark.parametrize(
    ("setup", "says"),
    [
        ("", "cannot start bigincubate: /nowhere: No module named bigincubate"),
        ("exit 5", "the setup script SETUP is missing, or ended the job; exit code 5"),
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
    arguments = [run.path] if kind == "gate" else [kind, tmp_path / "recipe.toml", run.path]
    names = {"JOB_ID": "7", "JOB_NODELIST": "n1"}
    if kind == "incubate":
        names |= {"ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "3"}
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", **{f"SLURM_{key}": value for key, value in names.items()}}

    def start() -> int:
        command = ["bash", str(find_script(kind)), *variables, *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, check=False).returncode

    assert start() == (5 if setup else 3)
    key = "incubate/3" if kind == "incubate" else kind
    says = re.escape(says.replace("SETUP", f"{tmp_path}/setup.sh"))
    assert re.fullmatch(rf"job 7(_3)? on \S+: {says}", read_job_trace(run, key))
    if not setup:
        (tmp_path / "fixed").touch()
        assert start() == 0
        assert read_job_trace(run, key) == ""


def test_site_functions_may_use_variables_that_are_not_set(tmp_path: Path) -> None:
    """As RHEL's /etc/bashrc does, which kills a script under ``set -u``."""
    ended = start_script(tmp_path, "pretrain", setup='if [ "$BASHRCSOURCED" != Y ]; then export SITE=$nothing; fi')
    assert "SITE=set" in (tmp_path / "ranks").read_text().split(), ended.stderr


@pytest.mark.parametrize("kind", ["pretrain", "gate"])
def test_setup_script_neither_gets_arguments_nor_changes_the_shell(kind: str, tmp_path: Path) -> None:
    """A script that sources conda's passes its own arguments on; one with ``set -e`` must not end the job."""
    setup = f'echo "$#" >{tmp_path}/count; set -e'
    ended = start_script(tmp_path, kind, setup=setup, ranks="exit 75", host="exit 7", options=["--set", "a=b"])
    assert (tmp_path / "count").read_text() == "0\n"
    if kind == "gate":
        assert "requeue 7" in (tmp_path / "scontrol").read_text(), ended.stderr
    else:
        assert "--code 75" in (tmp_path / "host").read_text(), ended.stderr
        assert "--set\na=b\n" in (tmp_path / "ranks").read_text()


def test_missing_setup_script_leaves_a_trace(tmp_path: Path) -> None:
    ended = start_script(tmp_path, "finetune", more=[f"BIGINCUBATE_SETUP_SCRIPT={tmp_path}/nowhere.sh"])
    assert ended.returncode == 1
    assert f"{tmp_path}/nowhere.sh is missing" in read_job_trace(RunDir(tmp_path / "a run"), "finetune")
    assert not (tmp_path / "ranks").exists()


def test_setup_script_chooses_the_rendezvous(tmp_path: Path) -> None:
    """As at sites where the name of a node's fast interface has another letter."""
    setup = 'MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)i"'
    start_script(tmp_path, "pretrain", setup=setup, given={"MASTER_PORT": "1", "RANK": "3"})
    assert {"ADDR=n1i", "RANK="} <= set((tmp_path / "ranks").read_text().split())
    assert "PORT=1" not in (tmp_path / "ranks").read_text().split()  # of the shell that submitted


def test_options_of_srun_and_the_container_are_those_of_the_ranks_alone(tmp_path: Path) -> None:
    more = ["SRUN=--container-image=a b", f"BIGINCUBATE_CONTAINER=env INSIDE={tmp_path}"]
    ended = start_script(tmp_path, "incubate", more=more)
    words = (tmp_path / "ranks").read_text()
    assert "--container-image=a b\n" in words, ended.stderr
    assert f"INSIDE={tmp_path}" in words
    assert "handle-job-exit" in (tmp_path / "host").read_text()
    assert f"INSIDE={tmp_path}" not in (tmp_path / "host").read_text()


def test_gate_that_was_killed_three_times_stops(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a run")
    for count in (1, 2, 3):
        restarts = {"SLURM_RESTART_COUNT": str(count - 1)}
        ended = start_script(tmp_path, "gate", host="kill -9 $$", given=restarts)
        assert ended.returncode == 137
        requeues = (tmp_path / "scontrol").read_text().count("requeue 7")
        assert requeues == min(count, 2), ended.stderr
    assert "killed three times (exit code 137) and has stopped; if it needs more memory" in read_job_trace(run, "gate")
    assert count_gate_failures(run) == 3
    start_script(tmp_path, "gate", host="kill -9 $$")  # a user has submitted another one
    assert count_gate_failures(run) == 1
    assert start_script(tmp_path, "gate").returncode == 0
    assert (read_job_trace(run, "gate"), count_gate_failures(run)) == ("", 0)


def start_script(
    folder: Path,
    kind: str,
    *,
    setup: str = "",
    more: Sequence[str] = (),
    host: str = "",
    ranks: str = "",
    options: Sequence[str] = (),
    given: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a job script with programs that write down how they were called: `srun` to "ranks", Python to "host"."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    programs = {
        "srun": f'for word; do echo "$word"; done >{folder}/ranks\n'
        f'echo "SITE=${{SITE-}}${{SITE+set}} ADDR=$MASTER_ADDR PORT=$MASTER_PORT RANK=${{RANK-}}" >>{folder}/ranks\n'
        f"{ranks}",
        "scontrol": f'echo "$*" >>{folder}/scontrol; if [ "$1" = show ]; then echo n1; fi',
        "python": f'if [ "$3" != --version ]; then echo "$* INSIDE=${{INSIDE-}}" >{folder}/host\n{host}\nfi',
    }
    for name, text in programs.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    (folder / "setup.sh").write_text(setup)
    run = folder / "a run"
    arguments = [run] if kind == "gate" else [kind, folder / "recipe.toml", run]
    variables = [f"PYTHON={tools}/python", f"BIGINCUBATE_SETUP_SCRIPT={folder}/setup.sh", *more]
    names = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    if kind == "incubate":
        names |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    return subprocess.run(
        ["bash", str(find_script(kind)), *variables, *map(str, arguments), *options],
        env={"PATH": f"{tools}:{os.environ['PATH']}", **names, **(given or {})},
        capture_output=True,
        text=True,
        check=False,
    )
