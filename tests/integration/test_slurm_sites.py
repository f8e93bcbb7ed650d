"""Slurm as sites configure it: plugins, limits, slow Epilogs, forbidden requeues, containers. On a real Slurm."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, jobs, kinds, running, say, start, words
from conftest import Command

from bigincubate.errors import Exit
from bigincubate.launchers.slurm.client import JobRefusedError, submit_job
from bigincubate.launchers.slurm.submission_log import list_queued_jobs
from bigincubate.storage.run_directory import PhaseDir, RunDir

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
SHORT = ("train.max_steps=2", "data.workers=1")
LATER = "slurm.extra=['--begin=now+1hour']"
# files that sites have beside slurm.conf; a test replaces policy.lua and slow
SITE = {
    "job_submit.lua": """
function slurm_job_submit(job, partitions, user) return dofile("{etc}/policy.lua")(job) end
function slurm_job_modify(job, record, partitions, user) return slurm.SUCCESS end
return slurm.SUCCESS
""",
    "policy.lua": "return function(job) return slurm.SUCCESS end",
    "epilog": '#!/bin/sh\nread -r seconds <"{etc}/slow"\nsleep "$seconds"\n',
    "slow": "0\n",
}
OTHER_COMMENT = """
return function(job)
  job.comment = "project 7"
  return slurm.SUCCESS
end
"""
REFUSE = """
return function(job)
  if string.match(job.name, "{name}") then
    slurm.log_user("Jobs of this kind need a GPU.")
    slurm.log_user("Read https://hpc.example.org/gpus\\nor write to help@example.org")
    return slurm.ERROR
  end
  return slurm.SUCCESS
end
"""
# at most five tasks in the queue, as with MaxSubmitJobs of an accounting database
LIMIT = """
return function(job)
  local tasks, many = 0, job.array_inx or ""
  for _, other in pairs(slurm.jobs) do
    if other.job_state <= 2 then tasks = tasks + math.max(1, other.array_task_cnt or 1) end
  end
  for _ in string.gmatch(many, "%d+") do tasks = tasks + 1 end
  if many == "" then tasks = tasks + 1 end
  if tasks > 5 then
    slurm.log_user("QOSMaxSubmitJobPerUserLimit")
    return 2050
  end
  return slurm.SUCCESS
end
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    yield from start("JobSubmitPlugins=lua", "Epilog={etc}/epilog", name="s", files=SITE)


@pytest.fixture
def site(slurm: Cluster) -> Iterator[Callable[[str, str], None]]:
    """``site("policy.lua", TEXT)`` changes what Slurm does until the end of the test."""

    def change(name: str, text: str) -> None:
        (slurm.folder / "etc" / name).write_text(text)

    yield change
    for name in ("policy.lua", "slow"):
        change(name, SITE[name])


@pytest.fixture
def run(tmp_path: Path, bigincubate: Command, slurm: Cluster) -> Iterator[RunDir]:
    """A run directory, of which nothing is in the queue in the end."""
    made = RunDir(tmp_path / "run")
    yield made
    if made.recipe_file.exists():
        bigincubate("cancel", made.path)


def finish(slurm: Cluster, run: RunDir) -> None:
    """Wait until the run ends by itself, with an exported model."""
    slurm.wait(lambda: not list_queued_jobs(run))
    assert (run.path / "export" / "model.safetensors").exists(), job_logs(run)[-5000:]


def job_logs(run: RunDir) -> str:
    return "".join(file.read_text() for file in sorted((run.path / "slurm").glob("*.out")))


def status(bigincubate: Command, run: RunDir) -> dict[str, dict[str, Any]]:
    return {row["phase"]: row for row in json.loads(bigincubate("status", run.path, "--json").stdout)}


def newest(folder: PhaseDir) -> int:
    """The step of the newest checkpoint."""
    return max((int(each.parent.name[5:]) for each in folder.checkpoints.glob("step-*/COMMITTED")), default=-1)


def write_program(file: Path, text: str) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
    return file


WHOLE = ["pretrain", "incubate", "gate", "finetune", "gate"]


def test_variables_of_the_shell_change_nothing(slurm: Cluster, run: RunDir, fast: Path, bigincubate: Command) -> None:
    """In an interactive job, whose variables are those of another job, and with defaults for Slurm's programs."""
    variables = {
        **{"SQUEUE_PARTITION": "nowhere", "SQUEUE_STATES": "CD", "SQUEUE_USERS": "daemon", "SQUEUE_SORT": "x"},
        **{"SBATCH_ARRAY_INX": "0-3", "SBATCH_WAIT": "1", "SBATCH_HOLD": "1", "SBATCH_NO_REQUEUE": "1"},
        **{"SBATCH_RESERVATION": "nothing", "SBATCH_WRAP": "true", "SBATCH_GRES": "gpu:8", "SLURM_HINT": "nothing"},
        **{"SRUN_NTASKS": "7", "SLURM_NTASKS": "7", "SLURM_NNODES": "3", "SLURM_DEPENDENCY": "afterok:1"},
        **{"SLURM_JOB_ID": "999999", "SLURM_ARRAY_JOB_ID": "999999", "SLURM_ARRAY_TASK_ID": "5", "SLURM_STEP_ID": "0"},
        **{"SLURM_CLUSTERS": "nowhere", "SCANCEL_PARTITION": "nowhere", "SCANCEL_INTERACTIVE": "1"},
        **{"SCONTROL_FEDERATION": "1", "SLURM_TIME_FORMAT": "relative", "SLURM_BITSTR_LEN": "1"},
    }
    for _ in range(2):
        submitted = bigincubate("submit", fast, "--run-dir", run.path, *words(*SHORT), env=variables)
        assert submitted.returncode == 0, submitted.stderr
    assert "in the queue already" in submitted.stdout
    assert kinds(run) == ["pretrain", "incubate", "gate"]
    finish(slurm, run)
    assert kinds(run) == WHOLE


@pytest.mark.parametrize("name", ["-gate", "-incubate"])
def test_plugin_that_refuses_a_job(
    name: str,
    slurm: Cluster,
    site: Callable[[str, str], None],
    run: RunDir,
    fast: Path,
    bigincubate: Command,
) -> None:
    """And that afterwards overwrites the comments, by which lost jobs are found."""
    site("policy.lua", REFUSE.format(name=name.replace("-", "%-")))
    submitted = bigincubate("submit", fast, "--run-dir", run.path, *words(*SHORT))
    assert submitted.returncode == Exit.ENVIRONMENT
    kind = name.removeprefix("-")
    queued = ", ".join(job["job"] for job in jobs(run))
    assert submitted.stderr.count("\n") == 1
    said = (
        f"Slurm refused {kind}: Jobs of this kind need a GPU.; Read https://hpc.example.org/gpus;"
        " or write to help@example.org; Batch job submission failed: "
    )
    assert said in submitted.stderr
    assert f"; in the queue: {queued}; " in submitted.stderr
    row = status(bigincubate, run)["gate"]
    resume = f"bigincubate resume {run.path}"
    if kind == "gate":
        assert kinds(run) == ["pretrain", "incubate"]
        assert f"when they have ended: {resume}" in submitted.stderr
        assert (row["state"], row["error"]) == ("missing", f"continue with: {resume}")
    else:
        assert kinds(run) == ["pretrain", "gate"]
        assert f"the gate (job {jobs(run)[1]['job']}) tries again when they have ended" in submitted.stderr
        slurm.wait(lambda: "need a GPU" in (status(bigincubate, run)["gate"]["error"] or ""))
    before = [job["job"] for job in jobs(run)]
    site("policy.lua", OTHER_COMMENT)
    resumed = bigincubate("resume", run.path)
    assert resumed.returncode == 0, resumed.stderr
    assert [job["job"] for job in jobs(run)][: len(before)] == before
    finish(slurm, run)
    counts = {each: kinds(run).count(each) for each in ("pretrain", "incubate", "finetune")}
    assert counts == {"pretrain": 1, "incubate": 1, "finetune": 1}
    assert "Comment=project 7" in say("scontrol", "show", "job", jobs(run)[-1]["job"])


def test_canceled_module_in_a_slow_epilog_is_not_doubled(
    slurm: Cluster, site: Callable[[str, str], None], run: RunDir, fast: Path, bigincubate: Command
) -> None:
    site("slow", "10\n")
    assert bigincubate("submit", fast, "--run-dir", run.path, *words(*SHORT)).returncode == 0
    entry = slurm.wait(lambda: running(run, "incubate/1"))
    subprocess.run(["scancel", f"{entry.job}_1"], check=True)
    slurm.wait(lambda: {each.key: each.state for each in list_queued_jobs(run)}.get("incubate/1") == "COMPLETING")
    resumed = bigincubate("resume", run.path)
    assert resumed.returncode == 0, resumed.stderr
    again = [job["modules"] for job in jobs(run) if job["kind"] == "incubate"]
    assert again == [[0, 1]] or "incubate of modules 1: job" in resumed.stdout  # or the Epilog was over by then
    site("slow", "0\n")
    finish(slurm, run)
    assert [job["modules"] for job in jobs(run) if job["kind"] == "incubate"] == [[0, 1], [1]]
    assert len(run.phase("incubate", 0).read_attempts()) == 1


def test_site_without_requeues_counts_submissions_that_make_no_progress(
    slurm: Cluster, run: RunDir, fast: Path, bigincubate: Command, tmp_path: Path
) -> None:
    """The setup script is as sites write them: it stops at the first error, and takes arguments."""
    real = say("sh", "-c", "command -v scontrol").strip()
    refuse = "echo 'Requested operation is presently disabled' >&2; exit 1"
    write_program(
        tmp_path / "bin" / "scontrol", f'#!/bin/sh\nif [ "$1" = requeue ]; then {refuse}; fi\nexec {real} "$@"\n'
    )
    setup = tmp_path / "setup.sh"
    setup.write_text(f': "$BASHRCSOURCED"\n[ $# = 0 ] || exit 9\nset -e\nPATH={tmp_path}/bin:$PATH\n')
    sets = words(
        *("train.max_steps=300", "checkpoint.every_steps=1", "data.workers=1", "log.images=0"),
        *(f"slurm.setup_script={setup}", "slurm.max_submissions=2"),
    )
    submitted = bigincubate("submit", fast, "--run-dir", run.path, *sets)
    assert submitted.returncode == 0, submitted.stderr
    folder, stopped = run.phase("pretrain"), [-1]
    for attempt in (0, 1, 2):
        # in this attempt the phase has written a newer checkpoint
        slurm.wait(partial(lambda number: folder.read_attempts()[number:] and newest(folder) > stopped[-1], attempt))
        entry = slurm.wait(lambda: running(run, "pretrain"))
        subprocess.run(["scancel", "--signal=USR2", entry.job], check=True)  # as near the time limit
        slurm.wait(lambda: folder.read_attempts()[-1]["state"] != "running")
        stopped.append(newest(folder))
    finish(slurm, run)
    assert [attempt["state"] for attempt in folder.read_attempts()] == [*["preempted"] * 3, "done"]
    assert kinds(run).count("pretrain") == 4
    assert "not requeued: scontrol failed: Requested operation is presently disabled" in job_logs(run)


BLOCK = """
import atexit, os, sys

ABSENT = {"torch", "numpy", "timm", "streaming", "deepspeed", "transformers", "torchvision"}


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ImportError(f"{name} is not installed on this host")


sys.meta_path.insert(0, Finder())


@atexit.register
def record():
    found = sys.modules.values()
    found = [each for each in found if "site-packages" in (getattr(each, "__file__", "") or "")]
    names = {each.__name__.partition(".")[0] for each in found}
    with open(os.environ["IMPORTED"], "a") as file:
        file.write(" ".join([*sys.argv[1:2], *sorted(names)]) + "\\n")
"""


def test_container_without_slurm_and_host_without_torch(
    slurm: Cluster, run: RunDir, fast: Path, bigincubate: Command, tmp_path: Path
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    slurm_programs = {"sbatch", "squeue", "scontrol", "scancel", "srun", "sacct", "sinfo", "salloc", "sacctmgr"}
    for file in Path("/usr/bin").iterdir():
        if file.name not in slurm_programs:
            (tools / file.name).symlink_to(file)
    container = write_program(
        tmp_path / "bin" / "container", f'#!/bin/bash\nPATH={tools} PYTHONPATH={ROOT} exec "$@"\n'
    )
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "sitecustomize.py").write_text(BLOCK)
    (tmp_path / "imported").touch()
    host = write_program(
        tmp_path / "bin" / "python",
        f'#!/bin/sh\nPYTHONPATH={tmp_path}/absent:{ROOT} IMPORTED={tmp_path}/imported exec {sys.executable} "$@"\n',
    )
    sets = words(*SHORT, f"slurm.container={container}", f"slurm.host_python={host}")
    inside = [str(container), sys.executable, "-m", "bigincubate", "submit", str(fast), "--run-dir", str(run.path)]
    prepared = subprocess.run([*inside, *sets, "--prepare-only"], capture_output=True, text=True, check=False)
    assert prepared.returncode == 0, prepared.stderr
    assert f"submit it with: bigincubate resume {run.path}" in prepared.stdout
    outside = [str(host), "-m", "bigincubate", "resume", str(run.path)]
    resumed = subprocess.run(outside, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    finish(slurm, run)
    assert kinds(run) == WHOLE
    imported = [line.split() for line in (tmp_path / "imported").read_text().splitlines()]
    needed = {name for words in imported for name in words[1:]}
    assert {words[0] for words in imported} >= {"resume", "handle-job-exit"}
    print("host packages:", *sorted(needed))
    assert not needed & {"torch", "numpy", "timm", "streaming"}


@pytest.fixture
def restarted(slurm: Cluster) -> Iterator[Callable[[str], None]]:
    """``restarted(LINE)`` adds a line to slurm.conf and restarts slurmctld."""
    conf = slurm.folder / "etc" / "slurm.conf"
    before = conf.read_text()

    def restart(line: str) -> None:
        conf.write_text(f"{before}{line}\n")
        slurm.control("restart-ctld")

    yield restart
    restart("")


@pytest.mark.parametrize("size", [0, 1])
def test_cluster_without_arrays(
    size: int,
    restarted: Callable[[str], None],
    slurm: Cluster,
    run: RunDir,
    fast: Path,
    bigincubate: Command,
) -> None:
    restarted(f"MaxArraySize={size}")
    submitted = bigincubate("submit", fast, "--run-dir", run.path, *words(*SHORT))
    assert submitted.returncode == 0, submitted.stderr
    assert [job["modules"] for job in jobs(run)] == [[], [0], [1], []]
    finish(slurm, run)
    assert kinds(run) == ["pretrain", "incubate", *WHOLE[1:]]
    shown = bigincubate("logs", run.path, "--module", 1)
    files = [Path(name) for name in re.findall(r"^==> (.*) <==$", shown.stdout, re.MULTILINE)]
    job = jobs(run)[2]["job"]
    task = f"{job}_0" if size else job
    expected = {f"bigincubate-incubate+1_{task}.out", f"bigincubate-incubate+1_{task}.0.out"}
    assert {file.name for file in files if file.parent.name == "slurm"} == expected


def test_limit_of_submitted_tasks_cuts_arrays(
    slurm: Cluster, site: Callable[[str, str], None], run: RunDir, fast: Path, bigincubate: Command
) -> None:
    site("policy.lua", LIMIT)
    depths = str([1] * 6)
    sets = words(*SHORT, f"plan.target_depths={depths}", f"plan.meta_depths={depths}")
    submitted = bigincubate("submit", fast, "--run-dir", run.path, *sets)
    assert submitted.returncode == 0, submitted.stderr
    assert "incubate: the gate will submit 3 of 6 modules, because of a limit (" in submitted.stdout
    finish(slurm, run)
    tasks = [module for job in jobs(run) for module in job["modules"]]
    assert sorted(tasks) == list(range(6))
    assert kinds(run).count("incubate") > 1
    assert all(len(run.phase("incubate", module).read_attempts()) == 1 for module in range(6))


def test_full_queue_is_a_limit(restarted: Callable[[str], None], slurm: Cluster, tmp_path: Path) -> None:
    """With MaxJobCount, sbatch itself tries again for two minutes."""
    restarted("MaxJobCount=1")
    with pytest.raises(JobRefusedError) as refused:
        submit_job(["sbatch", "--parsable", f"--output={tmp_path}/log", "--array=0-5", "--wrap=true"])
    assert refused.value.at_limit


def test_setup_script_that_ends_the_job_leaves_a_trace(
    slurm: Cluster, run: RunDir, fast: Path, bigincubate: Command, tmp_path: Path
) -> None:
    (tmp_path / "setup.sh").write_text("exit 7\n")
    sets = words(*SHORT, f"slurm.setup_script={tmp_path}/setup.sh")
    assert bigincubate("submit", fast, "--run-dir", run.path, *sets).returncode == 0
    slurm.wait(lambda: not list_queued_jobs(run))
    rows = status(bigincubate, run)
    assert (rows["pretrain"]["state"], rows["gate"]["state"]) == ("failed", "missing")
    for row in (rows["pretrain"], rows["gate"]):
        assert "setup.sh is missing, or ended the job; exit code 7" in row["error"]


def test_dry_run_tells_what_slurm_would_answer(slurm: Cluster, run: RunDir, fast: Path, bigincubate: Command) -> None:
    dry = bigincubate("submit", fast, "--run-dir", run.path, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    answers = re.findall(r"^sbatch --test-only, (\w+): Job \d+ to start at .* on nodes? n\d", dry.stdout, re.MULTILINE)
    assert answers == ["pretrain", "incubate", "gate", "finetune"]
    refused = bigincubate("submit", fast, "--run-dir", run.path, "--dry-run", "--partition", "nowhere")
    assert refused.returncode == Exit.ENVIRONMENT
    assert refused.stderr.count("\n") == 1
    assert "Slurm would refuse pretrain: " in refused.stderr
    assert "invalid partition specified: nowhere" in refused.stderr
    assert not run.path.exists()
    assert say("squeue", "--noheader") == ""


def test_run_directory_with_special_characters(
    slurm: Cluster, fast: Path, bigincubate: Command, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / 'Ann\'s "50%" run %j')
    try:
        submitted = bigincubate(
            "submit", fast, "--run-dir", run.path, *words(*SHORT), cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
        )
        assert submitted.returncode == 0, submitted.stderr
        slurm.wait(lambda: run.phase("pretrain").result)
        rows = status(bigincubate, run)
        assert rows["pretrain"]["state"] == "done"
        slurm.wait(lambda: running(run, "incubate/0"))
        assert "==> " in bigincubate("logs", run.path).stdout
        assert "canceled: " in bigincubate("cancel", run.path).stdout
        slurm.wait(lambda: not list_queued_jobs(run))
        pretrain = jobs(run)[0]["job"]
        assert (run.path / "slurm" / f"bigincubate-pretrain_{pretrain}.out").exists()
        assert (run.path / "slurm" / f"bigincubate-pretrain_{pretrain}.0.out").exists()
        assert [file for file in tmp_path.rglob("*.out") if file.parent != run.path / "slurm"] == []
        assert bigincubate("resume", run.path).returncode == 0
        finish(slurm, run)
    finally:
        bigincubate("cancel", run.path)


def test_held_jobs_are_named_with_the_command_that_releases_them(
    slurm: Cluster, run: RunDir, fast: Path, bigincubate: Command
) -> None:
    assert bigincubate("submit", fast, "--run-dir", run.path, *words(*SHORT, LATER)).returncode == 0
    held = [job["job"] for job in jobs(run)[:2]]
    subprocess.run(["scontrol", "hold", *held], check=True)
    rows = status(bigincubate, run)
    assert [row["state"] for row in rows.values()] == ["held", "held", "held", "waiting", "queued"]
    assert rows["pretrain"]["error"] == f"held: scontrol release {held[0]}"
    assert rows["incubate/1"]["error"] == f"held: scontrol release {held[1]}"
    resumed = bigincubate("resume", run.path)
    assert resumed.returncode == 0, resumed.stderr
    for kind, job in zip(("pretrain", "incubate"), held, strict=True):
        found = re.findall(
            rf"^{kind}: job {job} is held \(JobHeld.*scontrol release {job}$", resumed.stdout, re.MULTILINE
        )
        assert len(found) == 1
    subprocess.run(["scontrol", "release", *held], check=True)
    assert "held" not in {row["state"] for row in status(bigincubate, run).values()}
    assert kinds(run) == ["pretrain", "incubate", "gate"]
