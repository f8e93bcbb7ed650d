"""Losses, gradient norms, scores, weights and training streams are those that were recorded.

``GOLDEN=exact pytest tests/golden`` asks for the same bits, on the machine that recorded them (to assert that a change
moved no number: record with the code before it, compare with the code after). Otherwise values may differ as much as
CPU types do.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from record import CASES, HERE, compare_losses, machine, read_cases, run_cases

EXACT = os.environ.get("GOLDEN") == "exact"


@dataclass(frozen=True)
class Tolerance:
    """Hold the largest allowed differences. Losses and norms: relative. Top-1 and top-5: percentage points."""

    loss: float
    grad_norm: float
    points: float


# By device and precision. An AVX-512 machine limited to SSE4 kernels gave differences of at most 2e-7 (losses) and 3e-6
# (norms) in fp32, 6e-5 and 4e-3 in bf16, and one image of top-5.
TOLERANCES = {
    ("cpu", "fp32"): Tolerance(loss=5e-5, grad_norm=5e-4, points=5.0),
    ("cpu", "bf16"): Tolerance(loss=2e-3, grad_norm=5e-2, points=5.0),
}
EQUAL = Tolerance(0.0, 0.0, 0.0)
IMAGE_TOLERANCE = 1e-3  # of an image's mean and standard deviation, absolute


def golden(name: str) -> dict[str, Any]:
    """Return what was recorded under this name."""
    return json.loads((HERE / f"{name}.json").read_text())


def find_differences(expected: dict[str, Any], found: dict[str, Any], allowed: Tolerance) -> list[str]:
    """Return a line for each way in which a phase is not as recorded; weights count where nothing may differ."""
    compared = compare_losses.compare_phases(expected, found)
    lines = []
    if expected["steps"] != found["steps"]:
        lines.append(f"steps {found['steps']}, recorded {expected['steps']}")
    if compared.loss > allowed.loss:
        lines.append(f"train/loss differs by {compared.loss:.1e}, from step {compared.first_step}")
    if compared.grad_norm > allowed.grad_norm:
        lines.append(f"train/grad_norm differs by {compared.grad_norm:.1e}, from step {compared.first_step}")
    if expected["scores"].keys() != found["scores"].keys():
        return [*lines, f"scores {sorted(found['scores'])}, recorded {sorted(expected['scores'])}"]
    for name, score in expected["scores"].items():
        points = abs(score - found["scores"][name])
        if not (compared.scores[name] <= allowed.loss if name == "loss" else points <= allowed.points):
            lines.append(f"{name} {found['scores'][name]}, recorded {score}")
    if allowed == EQUAL and not compared.same_weights:
        lines.append("the final weights differ")
    return lines


@dataclass(frozen=True)
class Session:
    """Hold all cases as trained here: their folder, and what would be recorded of them."""

    folder: Path
    found: dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Train all cases once."""
    folder = tmp_path_factory.mktemp("golden")
    run_cases(folder)
    return Session(folder, read_cases(folder))


# ------------------------------------------------------------------------------------------------ as recorded


@pytest.mark.skipif(not EXACT, reason="GOLDEN=exact asks for the same bits")
@pytest.mark.parametrize("name", [*(case.name for case in CASES), "streams"])
def test_exact_comparison_runs_on_the_machine_that_recorded(name: str) -> None:
    assert golden(name)["machine"] == machine(), "record anew here with the code before the change"


@pytest.mark.parametrize(
    ("case", "phase"),
    [pytest.param(case, phase, id=f"{case.name}-{phase}") for case in CASES for phase in golden(case.name)["phases"]],
)
def test_phase_is_as_recorded(session: Session, case: Any, phase: str) -> None:
    recorded = golden(case.name)
    allowed = EQUAL if EXACT else TOLERANCES[recorded["machine"]["device"], case.precision]
    assert find_differences(recorded["phases"][phase], session.found[case.name]["phases"][phase], allowed) == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_run_has_the_recorded_phases(session: Session, case: Any) -> None:
    assert session.found[case.name]["phases"].keys() == golden(case.name)["phases"].keys()


@pytest.mark.parametrize("name", golden("streams")["streams"])
def test_training_stream_is_as_recorded(session: Session, name: str) -> None:
    """Sample ids are integers and the same everywhere; images where the libraries that make them are the same.

    Except for the noise of random erasing, which torch draws differently on other CPU types.
    """
    recorded, found = golden("streams"), session.found["streams"]["streams"][name]
    expected = recorded["streams"][name]
    assert found["ids"] == expected["ids"]
    assert found["labels"] == expected["labels"]
    here, there = machine(), recorded["machine"]
    if EXACT or here == there or (name != "convnext" and here["versions"] == there["versions"]):
        assert found["images"] == expected["images"]
    for image, known in zip(found["images"], expected["images"], strict=True):
        for value in ("mean", "std"):
            assert image[value] == pytest.approx(known[value], abs=IMAGE_TOLERANCE)


# ------------------------------------------------------------------------------------------------ and could differ


def change_loss(phase: dict[str, Any]) -> None:
    """Change one loss by a thousandth."""
    phase["train/loss"][4] *= 1.001


def change_norm(phase: dict[str, Any]) -> None:
    """Change one gradient norm by a hundredth."""
    phase["train/grad_norm"][9] *= 1.01


def change_score(phase: dict[str, Any]) -> None:
    """Change the validation loss by a thousandth."""
    phase["scores"]["loss"] *= 1.001


def change_top1(phase: dict[str, Any]) -> None:
    """Change the accuracy by ten percentage points."""
    phase["scores"]["top1"] += 10


def drop_step(phase: dict[str, Any]) -> None:
    """Leave out the last step."""
    for key in ("steps", *compare_losses.TAGS):
        phase[key].pop()


def make_nan(phase: dict[str, Any]) -> None:
    """Make one loss not finite."""
    phase["train/loss"][2] = float("nan")


@pytest.mark.parametrize(
    ("change", "report"),
    [
        (change_loss, "train/loss differs by 1.0e-03, from step 5"),
        (change_norm, "train/grad_norm differs by 9.9e-03, from step 10"),
        (change_score, "loss "),
        (change_top1, "top1 "),
        (drop_step, "steps "),
        (make_nan, "train/loss differs by inf, from step 3"),
    ],
)
def test_changed_golden_is_reported(change: Any, report: str) -> None:
    phase = golden("swin")["phases"]["meta"]
    changed = copy.deepcopy(phase)
    change(changed)
    tolerance = TOLERANCES["cpu", "fp32"]
    assert find_differences(phase, phase, EQUAL) == []
    [line] = find_differences(changed, phase, tolerance)
    assert line.startswith(report)


def test_changed_last_bits_and_weights_are_reported_only_where_bits_must_be_equal() -> None:
    phase = golden("swin")["phases"]["meta"]
    changed = copy.deepcopy(phase)
    changed["train/loss"][0] *= 1 + 1e-15
    changed["weights"] = "0" * 64
    assert find_differences(changed, phase, TOLERANCES["cpu", "fp32"]) == []
    assert len(find_differences(changed, phase, EQUAL)) == 2


# ------------------------------------------------------------------------------------------------ compare_losses.py


def compare(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Return the exit code and the output of ``compare_losses.py``."""
    code = compare_losses.main([str(argument) for argument in arguments])
    return code, capsys.readouterr().out


@pytest.fixture
def run(session: Session) -> Path:
    """Return the run directory of a case."""
    return session.folder / "init-boundary"


def test_compare_losses_of_a_run_with_itself_and_its_record(
    session: Session, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "record.json"
    record.write_text(json.dumps(session.found[run.name]))
    for a, b in [(run, run), (run, record), (record, run)]:
        code, text = compare(capsys, a, b)
        assert code == 0, text
        assert "modules/01        10      -   0.00e+00   0.00e+00   0.00e+00  equal" in text


def test_compare_losses_of_two_and_one_ranks(session: Session, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same but for the order of sums."""
    ranks = session.folder / "ranks-ddp"
    assert compare(capsys, run, ranks)[0] == 1
    code, text = compare(capsys, run, ranks, "--rtol", "1e-4")
    assert code == 0, text
    assert "differ" in text


def test_compare_losses_reports_a_changed_loss(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(run, copied)
    metrics = copied / "finetune" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows[6]["train/loss"] *= 1.01
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, text = compare(capsys, run, copied)
    assert code == 1
    assert "finetune          10      7   9.90e-03" in text
    assert compare(capsys, run, copied, "--rtol", "0.001")[0] == 1
    assert compare(capsys, run, copied, "--rtol", "0.02")[0] == 0


def test_compare_losses_reports_changed_weights(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(run, copied)
    weights = copied / "meta" / "artifact" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    code, text = compare(capsys, run, copied)
    assert code == 1
    assert "meta              10      -   0.00e+00   0.00e+00   0.00e+00  differ" in text


def test_compare_losses_refuses_what_cannot_be_compared(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    shutil.copytree(run / "meta", other / "elsewhere")
    wrong = tmp_path / "wrong.json"
    wrong.write_text("[1]")
    for b in (empty, tmp_path / "missing", wrong, other):
        assert compare_losses.main([str(run), str(b)]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert str(b) in line
    assert compare_losses.main([str(run), str(run), "--rtol", "nan"]) == 2
