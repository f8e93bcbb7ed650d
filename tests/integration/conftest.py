"""Fixtures that tests of the command line share."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigincubate.cli import main

Labs = Callable[..., Any]
Called = Callable[..., Any]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Called:
    """``call("plan", "digits")`` gives exit code, stdout and stderr; a traceback fails the test by itself."""

    def called(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bigincubate", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return called


@pytest.fixture(scope="module")
def done(lab: Labs) -> Any:
    """A finished run of two steps a phase."""
    made = lab("train.max_steps=2", "log.every_steps=1")
    for phase, module in (("pretrain", None), ("incubate", 0), ("incubate", 1), ("finetune", None)):
        made.train(phase, module)
    made.run.update_summary()
    return made


class Place:
    """What a wrong command may name; made anew for each."""

    def __init__(self, folder: Path, fast: Path, digits: Path, done: Any) -> None:
        self.folder, self.fast, self.digits = folder, fast, digits
        self.run = folder / "run"
        shutil.copytree(done.run.path, self.run)
        self.new = folder / "new"
        self.file = folder / "file"
        self.file.write_text("a file")
        self.empty = folder / "empty"
        self.empty.mkdir()

    def recipe(self, text: str | bytes) -> Path:
        path = self.folder / "mine.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def spoiled(self, name: str, text: str) -> Path:
        (self.run / name).write_text(text)
        return self.run

    def without(self, *names: str) -> Path:
        for name in names:
            path = self.run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return self.run

    def train(self, run_dir: Path, phase: str, *more: object) -> list[object]:
        return ["train", self.fast, "--run-dir", run_dir, "--phase", phase, *more, "--set", "train.max_steps=2"]


@pytest.fixture
def place(tmp_path: Path, fast: Path, digits: Path, done: Any) -> Place:
    return Place(tmp_path, fast, digits, done)
