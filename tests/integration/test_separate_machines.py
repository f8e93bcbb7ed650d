"""The script `examples/separate_machines.py`, on real runs at smoke size."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bigincubate.errors import Exit

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _examples_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def assert_refused(capsys: pytest.CaptureFixture[str], code: Exit, says: str, *words: object) -> None:
    """Check that a command ends with an exit code and one line."""
    import separate_machines

    capsys.readouterr()
    assert separate_machines.main(*map(str, words)) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file become longer than 100 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.fixture
def packable(harness: Callable[..., Any]) -> Any:
    """A run with a finished meta model, whose modules keep its optimizer state."""
    made = harness("train.max_steps=2", "incubate.init=grow", "incubate.optimizer=kept")
    made.train("pretrain")
    return made


@pytest.mark.parametrize(("decentralized", "optimizer"), [(False, "fresh"), (True, "kept")])
def test_module_is_trained_on_a_separate_machine(
    harness: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    decentralized: bool,
    optimizer: str,
) -> None:
    """The run and its data cannot be reached while the module is trained, and it has the bits of one trained here."""
    import separate_machines

    from bigincubate.data.partitions import partition_by_class
    from bigincubate.data.prepare import prepare_dataset
    from bigincubate.report.verify import Verdict, verify_run

    here, there = tmp_path / "here", tmp_path / "there"
    divide = (lambda samples: partition_by_class(samples, parts=2)) if decentralized else None
    prepare_dataset("digits-dev", here / "data", partition=divide)
    setting = f"data.decentralized={str(decentralized).lower()}"
    starts = ("incubate.init=grow", f"incubate.optimizer={optimizer}")
    sets = ("train.max_steps=3", "log.every_steps=1", f"data.path={here / 'data'}", setting, *starts)
    made = harness(*sets, folder=here / "run")
    made.train("pretrain")
    assert separate_machines.main("pack", str(here / "run"), "1", str(here / "bundle")) == Exit.DONE

    there.mkdir()
    (here / "bundle").rename(there / "bundle")
    here.rename(tmp_path / "away")
    with monkeypatch.context() as patch:
        patch.chdir(there)
        assert separate_machines.main("train", "bundle") == Exit.DONE
    (tmp_path / "away").rename(here)
    if decentralized:
        assert sorted(path.name for path in (there / "bundle" / "data" / "parts").iterdir()) == ["01"]
        assert not list((there / "bundle" / "data").glob("train*"))

    assert separate_machines.main("collect", str(there / "bundle"), str(here / "run")) == Exit.DONE
    assert "module 1: collected from" in capsys.readouterr().out
    assert_refused(
        capsys,
        Exit.USAGE,
        "already exists; if no process is training it, remove it first",
        "collect",
        there / "bundle",
        here / "run",
    )
    made.train("incubate", 0)
    assert made.run.phase("incubate", 0).partial["joined"] == [0, 1]
    made.train("finetune")
    assert {finding.verdict for finding in verify_run(made.run)} == {Verdict.GOOD}
    other = made.copy(tmp_path / "other", ["meta"])
    other.train("incubate", 1)
    weights = made.weights("incubate", 1)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in other.weights("incubate", 1).items())


def test_module_of_another_meta_model_is_not_collected(
    harness: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import separate_machines

    made = harness("train.max_steps=2")
    made.train("pretrain")
    separate_machines.pack(made.run.path, 0, tmp_path / "bundle")
    assert_refused(capsys, Exit.USAGE, "bundle exists already", "pack", made.run.path, 0, tmp_path / "bundle")
    for folder in (made.run.path / "meta", made.data.path):
        assert_refused(capsys, Exit.USAGE, "which is copied into it", "pack", made.run.path, 0, folder / "bundle")
    separate_machines.train(tmp_path / "bundle")
    other = harness("train.max_steps=2", "train.seed=1")
    other.train("pretrain")
    assert_refused(capsys, Exit.ARTIFACT, "train.seed", "collect", tmp_path / "bundle", other.run.path)
    assert not other.run.phase("incubate", 0).path.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "required: COMMAND"),
        (["unpack"], "invalid choice: 'unpack'"),
        (["pack", "run"], "required: MODULE, BUNDLE"),
        (["pack", "run", "two", "bundle"], "argument MODULE: invalid int value: 'two'"),
        (["train", "bundle", "more"], "unrecognized arguments: more"),
    ],
)
def test_wrong_arguments_print_the_usage(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    import separate_machines

    with pytest.raises(SystemExit) as end:
        separate_machines.main(*words)
    assert end.value.code == Exit.USAGE
    err = capsys.readouterr().err
    assert err.startswith("usage: ")
    assert says in err


def test_script_exits_with_the_code_of_its_error(tmp_path: Path) -> None:
    script, run = EXAMPLES / "separate_machines.py", tmp_path / "absent"
    ended = subprocess.run([sys.executable, script, "pack", run, "0", "bundle"], capture_output=True, text=True)
    says = f"error: {run} is not a run directory (no recipe.toml in it)\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (Exit.ARTIFACT, "", says)


def test_what_cannot_be_packed_is_refused(
    harness: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, bundle = harness("train.max_steps=2"), tmp_path / "new" / "bundle"
    train = f"train it with: bigincubate train {made.run.recipe_file} --run-dir {made.run.path} --phase pretrain"
    assert_refused(capsys, Exit.ARTIFACT, train, "pack", made.run.path, 0, bundle)
    made.run.recipe_file.write_text("[train\n")
    assert_refused(capsys, Exit.USAGE, "recipe.toml", "pack", made.run.path, 0, bundle)
    assert not bundle.parent.exists()


@pytest.mark.parametrize(
    ("incubate", "module", "known"),
    [("all", 99, "0, 1"), ("all", -1, "0, 1"), ("all", 2, "0, 1"), ("[1]", 0, "1"), ("none", 0, "none")],
)
def test_module_that_is_not_incubated_is_not_packed(
    harness: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    incubate: str,
    module: int,
    known: str,
) -> None:
    made = harness("train.max_steps=0", f"plan.incubate={incubate}")
    made.train("pretrain")
    says = f"module {module} is not among the modules that {made.run.path} incubates: {known}\n"
    assert_refused(capsys, Exit.USAGE, says, "pack", made.run.path, module, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_folder_that_is_no_bundle_is_not_trained(
    packable: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import separate_machines

    assert_refused(capsys, Exit.ARTIFACT, "is not a bundle", "train", tmp_path / "absent")
    separate_machines.pack(packable.run.path, 0, tmp_path / "bundle")
    (tmp_path / "bundle" / "recipe.toml").write_text("[train\n")
    assert_refused(capsys, Exit.USAGE, "recipe.toml", "train", tmp_path / "bundle")


def test_meta_model_without_the_state_that_modules_keep_is_not_packed(
    packable: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(packable.run.phase("pretrain").checkpoints)
    says = f'"kept" needs the checkpoint of step 2 in {packable.run.path / "meta" / "checkpoints"}, which is missing'
    assert_refused(capsys, Exit.ARTIFACT, says, "pack", packable.run.path, 0, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def test_bundle_is_written_completely_or_not_at_all(
    packable: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("pack", packable.run.path, 0, tmp_path / "bundle")
    with full_disk():
        assert_refused(capsys, Exit.ENVIRONMENT, "File too large", *words)
    assert not list(tmp_path.iterdir())

    def interrupt(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copy", interrupt)  # after the first folder has been copied
        assert_refused(capsys, Exit.INTERRUPTED, "interrupted", *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("removed", [".", "step-00000002"])
def test_module_without_the_state_that_fine_tuning_keeps_is_not_collected(
    packable: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], removed: str
) -> None:
    import separate_machines

    separate_machines.pack(packable.run.path, 0, tmp_path / "bundle")
    separate_machines.train(tmp_path / "bundle")
    checkpoints = tmp_path / "bundle" / "modules" / "00" / "checkpoints"
    shutil.rmtree(checkpoints / removed)
    says = f'"kept" needs the checkpoint of step 2 in {checkpoints}, which is missing; copy that folder again'
    assert_refused(capsys, Exit.ARTIFACT, says, "collect", tmp_path / "bundle", packable.run.path)
    assert not (packable.run.path / "modules").exists()


def test_folder_without_exactly_one_finished_module_is_not_collected(
    packable: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import separate_machines

    bundle, words = tmp_path / "bundle", ("collect", tmp_path / "bundle", packable.run.path)
    separate_machines.pack(packable.run.path, 0, bundle)
    assert_refused(capsys, Exit.ARTIFACT, f"{bundle / 'modules'}: expected one module, found 0; ", *words)
    (bundle / "modules" / "00").mkdir(parents=True)
    assert_refused(capsys, Exit.ARTIFACT, f"{bundle / 'modules' / '00'} is not finished; train it first\n", *words)
    (bundle / "modules" / "01").mkdir()
    assert_refused(capsys, Exit.ARTIFACT, f"{bundle / 'modules'}: expected one module, found 2; ", *words)
    assert not (packable.run.path / "modules").exists()


def test_module_is_collected_completely_or_not_at_all(
    packable: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import separate_machines

    bundle, modules = tmp_path / "bundle", packable.run.path / "modules"
    separate_machines.pack(packable.run.path, 0, bundle)
    separate_machines.train(bundle)
    with full_disk():
        assert_refused(capsys, Exit.ENVIRONMENT, "File too large", "collect", bundle, packable.run.path)
    assert not list(modules.glob("*"))
    separate_machines.collect(bundle, packable.run.path)
    found = {path.name for path in (modules / "00").iterdir()}
    assert found >= {"artifact", "attempts", "checkpoints", "metrics.jsonl", "DONE"}
    assert not found & {"owners", "logs"}
