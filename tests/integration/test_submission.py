"""What is submitted when Slurm refuses, loses, holds or ends certain jobs, on a simulated Slurm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from test_scheduler import make_graph

from bigincubate.config import load_recipe
from bigincubate.errors import ArtifactError, SystemResourceError
from bigincubate.launchers.slurm.job_logs import read_job_trace
from bigincubate.launchers.slurm.scheduler import submit_missing_jobs
from bigincubate.storage.run_directory import RunDir

REFUSED = "invalid partition specified: gpu; Batch job submission failed"
Submit = Callable[..., list[str]]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """A Slurm without drawn faults, for a run of four modules."""
    made = FakeSlurm(RunDir(tmp_path / "run"), 0, range(4), fault=0)
    made.install(monkeypatch)
    return made


@pytest.fixture
def submit(slurm: FakeSlurm, smoke: Path) -> Submit:
    """Submit what is missing, as a user, or as the job ``gate``. Returns what is said."""

    def call(gate: str | None = None) -> list[str]:
        said: list[str] = []
        graph = make_graph(slurm.modules)
        submit_missing_jobs(load_recipe(str(smoke)), graph, slurm.run, gate=gate, say=said.append)
        return said

    return call


@pytest.fixture
def complete(slurm: FakeSlurm, smoke: Path) -> Callable[[], int]:
    """Let time pass until the run is done. Returns how often a user had to call ``submit`` or ``resume``."""
    return lambda: slurm.complete(load_recipe(str(smoke)), make_graph(slurm.modules))


def kinds(slurm: FakeSlurm) -> list[str]:
    return [job.kind for job in slurm.jobs.values()]


# ------------------------------------------------------------------------------------------------ what counts


def test_refused_job_is_no_submission_and_modules_do_not_start_without_it(slurm: FakeSlurm, submit: Submit) -> None:
    slurm.answers["pretrain"] = ["refused"] * 5
    for _ in range(5):  # more often than slurm.max_submissions
        with pytest.raises(SystemResourceError, match=f"^Slurm refused pretrain: {REFUSED}; nothing is in the queue; "):
            submit(gate="7")
        assert slurm.jobs == {}
    submit(gate="7")
    assert kinds(slurm) == ["pretrain", "incubate", "gate"]
    assert slurm.jobs["101"].after_success == ["100"]


def test_modules_of_a_failed_meta_model_neither_start_nor_count(
    slurm: FakeSlurm, submit: Submit, complete: Callable[[], int]
) -> None:
    slurm.outcomes = {"pretrain": ["crash"] * 5, "incubate/1": ["crash"] * 2}
    submit()
    while slurm.waiting():
        for gate in slurm.step():
            if kinds(slurm).count("pretrain") < 3:
                submit(gate)
            else:
                with pytest.raises(ArtifactError, match=r"^given up: pretrain None: submitted 3 times\. "):
                    submit(gate)
            slurm.finish(slurm.jobs[gate].tasks[None])
    assert {task.state for job in slurm.jobs.values() if job.kind == "incubate" for task in job.tasks.values()} == {
        "CANCELLED"
    }
    assert complete() == 1  # the meta model fails twice, and then module 1 does
    assert slurm.outcomes == {"pretrain": [], "incubate/1": []}


def test_submission_with_a_newer_checkpoint_does_not_count(slurm: FakeSlurm, complete: Callable[[], int]) -> None:
    """At a site that does not let jobs requeue themselves, each time limit ends a submission."""
    slurm.outcomes = {"pretrain": ["stop"] * 7, "incubate/2": ["crash", "crash", "stop", "crash", "crash"]}
    assert complete() == 1
    assert kinds(slurm).count("pretrain") == 8
    assert sum(2 in job.tasks for job in slurm.jobs.values()) == 8 + 5  # eight times after the meta model
    assert slurm.outcomes == {"pretrain": [], "incubate/2": []}


def test_submissions_without_a_newer_checkpoint_are_limited(slurm: FakeSlurm, complete: Callable[[], int]) -> None:
    slurm.outcomes = {"finetune": ["stop", "crash", "crash", "crash"]}
    assert complete() == 2
    assert kinds(slurm).count("finetune") == 5


# ------------------------------------------------------------------------------------------------ what is said


def test_refusal_of_an_array_names_the_queue_and_the_gate_tries_again(slurm: FakeSlurm, submit: Submit) -> None:
    slurm.answers["incubate"] = ["refused"] * 2
    text = (
        f"Slurm refused incubate: {REFUSED}; in the queue: 100, %s; the gate (job %s) tries again when they have ended"
    )
    with pytest.raises(SystemResourceError) as raised:
        submit()
    assert str(raised.value) == text % ("101", "101")
    assert kinds(slurm) == ["pretrain", "gate"]
    assert submit(gate="101")[-1] == text % ("102", "102")  # this one ends, and `status` shows what it said
    trace = read_job_trace(slurm.run, "gate")
    assert trace.startswith("job 101 on ")
    assert trace.endswith(text % ("102", "102"))
    submit()
    assert kinds(slurm) == ["pretrain", "gate", "gate", "incubate"]


def test_refusal_of_a_gate_says_how_to_continue(slurm: FakeSlurm, submit: Submit) -> None:
    slurm.answers["gate"] = ["refused"]
    with pytest.raises(SystemResourceError) as raised:
        submit()
    after = f"in the queue: 100, 101; when they have ended: bigincubate resume {slurm.run.path}"
    assert str(raised.value) == f"Slurm refused gate: {REFUSED}; {after}"
    submit()
    assert kinds(slurm) == ["pretrain", "incubate", "gate"]
    assert slurm.jobs["102"].after == ["100", "101"]


def test_held_job_is_named_with_its_reason(slurm: FakeSlurm, submit: Submit) -> None:
    slurm.outcomes = {"pretrain": ["hold"]}
    submit()
    while slurm.jobs["100"].tasks[None].reason != "JobHoldMaxRequeue":
        slurm.step()
    assert submit() == [
        "pretrain: job 100 is held (JobHoldMaxRequeue); find out why, then release it with: scontrol release 100",
        "in the queue already: 100, 101, 102",
    ]


# ------------------------------------------------------------------------------------------------ lost answers


@pytest.mark.parametrize("comment", ["", ", comment overwritten"])
@pytest.mark.parametrize("kind", ["pretrain", "incubate", "gate"])
def test_job_whose_answer_was_lost_is_found_in_the_queue(
    kind: str, comment: str, slurm: FakeSlurm, submit: Submit
) -> None:
    slurm.answers[kind] = [f"answer lost{comment}"]
    with pytest.raises(SystemResourceError, match="Slurm may have accepted the job all the same"):
        submit()
    submit()
    assert sorted(kinds(slurm)) == ["gate", "incubate", "pretrain"]
    assert submit() == ["in the queue already: 100, 101, 102"]
    assert all(job.comment != str(slurm.run.path) for job in slurm.jobs.values() if job.kind == kind and comment)


@pytest.mark.parametrize("comment", ["", ", comment overwritten"])
def test_job_without_an_id_is_found_in_the_queue(comment: str, slurm: FakeSlurm, submit: Submit) -> None:
    slurm.answers = {kind: [f"no id{comment}"] for kind in ("pretrain", "incubate", "gate")}
    submit()
    assert kinds(slurm) == ["pretrain", "incubate", "gate"]
    assert slurm.jobs["101"].after_success == ["100"]
    assert submit() == ["in the queue already: 100, 101, 102"]


def test_jobs_whose_comments_were_overwritten_are_not_doubled(slurm: FakeSlurm, submit: Submit) -> None:
    slurm.answers = {kind: ["comment overwritten"] for kind in ("pretrain", "incubate", "gate")}
    submit()
    assert submit() == ["in the queue already: 100, 101, 102"]


# ------------------------------------------------------------------------------------------------ limits


def test_limit_cuts_arrays_and_leaves_room_for_the_gate(
    slurm: FakeSlurm, submit: Submit, complete: Callable[[], int]
) -> None:
    slurm.modules, slurm.submit_limit = range(40), 6
    said = submit()
    assert len([line for line in said if "of 40 modules, because of a limit (QOSMax" in line]) == 1
    assert kinds(slurm)[-1] == "gate"
    assert complete() == 0  # no user has to come back
