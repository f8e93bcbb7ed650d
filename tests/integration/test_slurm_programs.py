"""How Slurm's programs are called: small scripts in PATH write down their arguments and variables. Needs no Slurm."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from records import make_plan
from test_scheduler import make_graph

from bigincubate.cli.slurm import export_model, preview_submission
from bigincubate.config import load_recipe
from bigincubate.errors import Exit, SystemResourceError
from bigincubate.files import write_json
from bigincubate.launchers.slurm.requeue import handle_job_exit
from bigincubate.launchers.slurm.scheduler import submit_missing_jobs
from bigincubate.launchers.slurm.submission_log import Submission, SubmissionLog, cancel_jobs
from bigincubate.report import status
from bigincubate.storage.run_directory import RunDir

CONFIG = "echo 'MaxArraySize = 1001'"
# three jobs with the ids 12, 13 and 14, and an answer as on a site with several clusters
SBATCH = 'echo "*** 120 nodes ***"; echo "$((11 + $(grep -c ^sbatch {calls})));west"'


class Programs:
    """Programs in PATH.

    Attributes:
        folder: Where they are. The file ``queue`` is what ``squeue`` prints.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._calls, self._variables = folder, folder / "calls", folder / "variables"
        folder.mkdir()
        for file in (self._calls, self._variables, folder / "queue"):
            file.touch()
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def add(self, **answers: str) -> None:
        """Add a program for each keyword: what bash runs after the call was written down."""
        for name, text in answers.items():
            file = self.folder / name
            file.write_text(
                f'#!/bin/bash\necho "{name} $*" >>{self._calls}\n'
                f"compgen -e | grep -E '^(SLURM|SBATCH|SQUEUE|SRUN|SCANCEL|SCONTROL)_' >>{self._variables}\n"
                f"{text.format(calls=self._calls, queue=self.folder / 'queue')}\n"
            )
            file.chmod(0o755)

    def fill_queue(self, *lines: str) -> None:
        (self.folder / "queue").write_text("".join(f"{line}\n" for line in lines))

    @property
    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines()

    @property
    def variables(self) -> set[str]:
        return set(self._variables.read_text().split())


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "SQUEUE_", "SRUN_"))]:
        monkeypatch.delenv(name)
    return Programs(tmp_path / "bin", monkeypatch)


@pytest.fixture
def submitted(programs: Programs, smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run that was submitted twice and then canceled, in a shell with variables for Slurm's programs."""
    variables = ("SQUEUE_PARTITION", "SBATCH_ARRAY_INX", "SRUN_NTASKS", "SLURM_JOB_ID", "SCANCEL_PARTITION")
    for name in (*variables, "SLURM_CONF"):
        monkeypatch.setenv(name, "nowhere")
    run, recipe, graph = RunDir(tmp_path / "run"), load_recipe(str(smoke)), make_graph(range(2))
    programs.add(sbatch=SBATCH, squeue="cat {queue}", scancel=": >{queue}", scontrol=CONFIG)
    said: list[str] = []
    submit_missing_jobs(recipe, graph, run, say=said.append)
    programs.fill_queue(
        "CLUSTER: west",
        "12|N/A|RUNNING|w1|None|run-pretrain|",
        "13|0|PENDING||Dependency|run-incubate|",
        "13|1|PENDING||Dependency|run-incubate|",
        "14|N/A|PENDING||Dependency|run-gate|",
    )
    submit_missing_jobs(recipe, graph, run, say=said.append)
    assert said[-1] == "in the queue already: 12, 13, 14"
    assert sorted(cancel_jobs(run)) == ["12", "13", "14"]
    return run


def test_programs_do_not_get_the_variables_of_the_shell(submitted: RunDir, programs: Programs) -> None:
    assert {call.split()[0] for call in programs.calls} == {"sbatch", "squeue", "scancel", "scontrol"}
    assert programs.variables == {"SLURM_CONF"}


def test_all_calls_go_to_the_cluster_that_has_accepted_the_first_job(submitted: RunDir, programs: Programs) -> None:
    """Other clusters do not know the jobs on which later ones depend."""
    first, *others = programs.calls
    assert first.startswith("sbatch ")
    assert "--clusters" not in first
    assert [call for call in others if "--clusters=west" not in call.split()] == []
    assert {call.split()[0] for call in others} == {"sbatch", "squeue", "scancel", "scontrol"}


def test_one_of_several_clusters_is_used_for_jobs_that_depend_on_each_other(
    programs: Programs, smoke: Path, tmp_path: Path
) -> None:
    programs.add(sbatch=SBATCH, scontrol=CONFIG)
    recipe = load_recipe(str(smoke), ['slurm.extra=["--clusters=east,west"]'])
    submit_missing_jobs(recipe, make_graph(range(2)), RunDir(tmp_path / "run"), say=lambda text: None)
    asked = [[word for word in call.split() if word.startswith("--clusters=")] for call in programs.calls]
    assert asked == [["--clusters=east,west"], *[["--clusters=west"]] * 3]


def test_job_that_may_not_be_requeued_says_so(programs: Programs, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    programs.add(squeue="echo RUNNING", scontrol="echo 'Requested operation is presently disabled' >&2; exit 1")
    assert handle_job_exit(run.phase("pretrain"), "12", Exit.PREEMPTED) == (
        Exit.PREEMPTED,
        "stopped with a checkpoint; not requeued: scontrol failed: Requested operation is presently disabled",
    )
    assert programs.calls[-1] == "scontrol requeue 12"


def test_dry_run_asks_whether_slurm_would_accept_each_job(
    programs: Programs, smoke: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    programs.add(sbatch="echo 'sbatch: Job 9 to start at 12:00 on nodes n1' >&2", scontrol=CONFIG)
    recipe, run = load_recipe(str(smoke)), RunDir(tmp_path / "run")
    preview_submission(recipe, run, baseline=False)
    jobs = [call for call in programs.calls if call.startswith("sbatch ")]
    assert len(jobs) == 4
    assert all("--test-only" in job and "--dependency" not in job for job in jobs)
    answers = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sbatch --test-only, ")]
    kinds = ("pretrain", "incubate", "gate", "finetune")
    assert answers == [f"sbatch --test-only, {kind}: Job 9 to start at 12:00 on nodes n1" for kind in kinds]
    refuse = "echo 'sbatch: error: a GPU is needed' >&2; exit 1"
    programs.add(sbatch=f'case "$*" in *-gate*) {refuse} ;; *) echo accepted ;; esac')
    with pytest.raises(SystemResourceError, match=r"^Slurm would refuse gate: sbatch failed: a GPU is needed$"):
        preview_submission(recipe, run, baseline=False)
    assert not run.path.exists()


def test_watch_asks_squeue_once_and_never_sacct(
    programs: Programs,
    smoke: Path,
    tmp_path: Path,
    call: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As long as 30 seconds have not passed."""
    run, naps = RunDir(tmp_path / "run"), list[float]()
    write_json(run.path / "plan.json", make_plan("pretrain"))
    SubmissionLog(run, [Submission("pretrain", "run-pretrain", "12")]).write()
    programs.add(squeue="cat {queue}", sacct="", scontrol="")
    programs.fill_queue("12|N/A|RUNNING|n1|None|run-pretrain|")

    def sleep(seconds: float) -> None:
        if seconds == 2:  # the others are those of subprocess
            naps.append(seconds)
        if len(naps) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr("bigincubate.cli.inspect.time.sleep", sleep)
    monkeypatch.setattr(status, "QueueReader", partial(status.QueueReader, clock=lambda: 10.0))
    code, out, _ = call("status", run.path, "--watch")
    assert (code, len(naps)) == (0, 5)
    assert "RUNNING" in out
    assert [line.split()[0] for line in programs.calls] == ["squeue"]


@pytest.mark.parametrize("in_job", [False, True])
def test_export_runs_in_the_container_of_the_ranks(
    in_job: bool, programs: Programs, smoke: Path, tmp_path: Path
) -> None:
    programs.add(container=f'[ "$1" = python3 ] && mkdir -p {tmp_path}/exported', srun='"${{@:3}}"')
    sets = [f"slurm.container={programs.folder}/container", "slurm.python=python3", 'slurm.srun=["--cpu-bind=cores"]']
    run = RunDir(tmp_path / "run")
    export_model(load_recipe(str(smoke), sets), run, in_job=in_job)
    words = f"python3 -m bigincubate export {run.path} --out {run.exported}"
    srun = [f"srun --ntasks=1 --cpu-bind=cores {programs.folder}/container {words}"] if in_job else []
    assert programs.calls == [*srun, f"container {words}"]
    assert (tmp_path / "exported").exists()
