"""The scripts in `slurm/`, run by bash with programs that write down how they were called. Needs no Slurm."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from bigincubate.config import load_recipe
from bigincubate.launchers.slurm.job_logs import count_gate_failures, read_job_trace
from bigincubate.launchers.slurm.sbatch import build_sbatch_command, find_script
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


@pytest.mark.parametrize("kind", ["pretrain", "incubate", "gate"])
def test_job_needs_nothing_but_its_arguments(
    kind: str, smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``SBATCH_EXPORT=NONE`` it has no environment, and ``srun`` would not pass on what the script sets."""
    monkeypatch.setenv("PYTHONPATH", "/a checkout")
    bin_folder, run = tmp_path / "bin", RunDir(tmp_path / "a run")
    sets = [f"slurm.python={bin_folder}/python", f"slurm.host_python={bin_folder}/host-python"]
    sets += [f"slurm.setup_script={tmp_path}/setup.sh", 'slurm.srun=["--cpu-bind=cores"]']
    modules = [3] if kind == "incubate" else []
    words = build_sbatch_command(load_recipe(str(smoke), sets), run, kind, modules=modules)
    arguments = words[words.index(str(find_script(kind))) + 1 :]
    ended = start_script(tmp_path, kind, setup="export SITE=5", arguments=arguments)
    host = (tmp_path / "host").read_text()
    assert host.startswith(f"{bin_folder}/host-python -m bigincubate "), ended.stderr
    assert "SITE=5" in host
    assert "PYTHONPATH=/a checkout" in host
    if kind != "gate":
        ranks = (tmp_path / "ranks").read_text()
        module = "--module\n3\n" if modules else ""
        train = f"train\n{run.recipe_file}\n--run-dir\n{run.path}\n--phase\n{kind}\n{module}"
        assert f"--cpu-bind=cores\n{bin_folder}/python\n-m\nbigincubate\n{train}" in ranks
        assert "--export=ALL\n" in ranks
        assert "PYTHONPATH=/a checkout" in ranks


@pytest.mark.parametrize("kind", ["pretrain", "gate"])
def test_site_functions_may_use_variables_that_are_not_set(kind: str, tmp_path: Path) -> None:
    """As RHEL's /etc/bashrc does, which kills a script under ``set -u``."""
    ended = start_script(tmp_path, kind, setup='if [ "$BASHRCSOURCED" != Y ]; then export SITE=$nothing; fi')
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "SITE=set" in (tmp_path / "host").read_text().split()


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
    start_script(tmp_path, "pretrain", setup="export MASTER_PORT=2345")
    assert {"ADDR=n1", "PORT=2345"} <= set((tmp_path / "ranks").read_text().split())


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
    arguments: Sequence[str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a job script with programs that write down how they were called: `srun` to "ranks", Python to "host".

    Args:
        folder: Where the files are.
        kind: Kind of the job.
        setup: Content of the setup script.
        more: More variables, as arguments of the script.
        host: What the Python of the script does.
        ranks: What `srun` does.
        options: More options of the ranks.
        given: Variables of the job's environment.
        arguments: All arguments of the script; by default those of a job with this setup script.
    """
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    programs = {
        "srun": f'for word; do echo "$word"; done >{folder}/ranks\n'
        f'echo "ADDR=$MASTER_ADDR PORT=$MASTER_PORT RANK=${{RANK-}} PYTHONPATH=${{PYTHONPATH-}}" >>{folder}/ranks\n'
        f"{ranks}",
        "scontrol": f'echo "$*" >>{folder}/scontrol; if [ "$1" = show ]; then echo n1; fi',
        "python": 'if [ "$3" = --version ]; then exit; fi\n'
        'echo "$0 $* INSIDE=${INSIDE-} SITE=${SITE-}${SITE+set} PYTHONPATH=${PYTHONPATH-}"'
        f" >{folder}/host\n{host}",
    }
    programs["host-python"] = programs["python"]
    for name, text in programs.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    (folder / "setup.sh").write_text(setup)
    run = folder / "a run"
    if arguments is None:
        variables = [f"PYTHON={tools}/python", f"BIGINCUBATE_SETUP_SCRIPT={folder}/setup.sh", *more]
        phase = [] if kind == "gate" else [kind, f"{folder}/recipe.toml"]
        arguments = [*variables, *phase, str(run), *options]
    names = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    if kind == "incubate":
        names |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    return subprocess.run(
        ["bash", str(find_script(kind)), *arguments],
        env={"PATH": f"{tools}:{os.environ['PATH']}", **names, **(given or {})},
        capture_output=True,
        text=True,
        check=False,
    )
