"""Run the examples of the fuzz test in this process, and judge how they end.

Network and subprocesses are off, and training stops before its first step.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tomli_w
from fuzz_examples import Example, from_json

from bigincubate.errors import BigincubateError, Exit

LIMIT_S, MEMORY = 60, 6 * 2**30  # of an example; address space that an example may add


class Reached(BaseException):
    """Training, or processes that train, would begin here."""


class TooSlow(BaseException):
    """An example took longer than `LIMIT_S`."""


class Ending(NamedTuple):
    """How a command ended.

    Attributes:
        code: Exit code; None if training was reached, or the time limit.
        fault: What is wrong with the ending; empty if nothing is.
        place: What faults of the same cause have in common.
        message: Standard error.
    """

    code: int | None
    fault: str
    place: str
    message: str


# ------------------------------------------------------------------------------------------------ the world


class World:
    """The paths that examples may name, made anew by :meth:`reset`.

    Args:
        folder: An empty folder.
        done: A finished run.
        data: Its data.
        recipe: Text of its recipe.
    """

    def __init__(self, folder: Path, done: Path, data: Path, recipe: str) -> None:
        import numpy as np
        import torch
        from PIL import Image

        self.folder, self.base = folder / "now", recipe
        self.template = folder / "template"
        self.template.mkdir()
        for name in ("empty", "cwd", "home", "unreadable", "images/a", "images/b"):
            (self.template / name).mkdir(parents=True)
        shutil.copytree(done, self.template / "run")
        shutil.copytree(done, self.template / "part", ignore=shutil.ignore_patterns("finetune", "assembled", "01"))
        shutil.copytree(done, self.template / "odd [/x] ünï dir")
        self.data = data
        self.write("recipe.toml", recipe.encode())
        self.write("file", b"a file\n")
        self.write("parts", b"a/0.png,0\n")
        self.write("binary", bytes(range(256)) * 8)
        torch.save({"model": {"head.weight": torch.zeros(2)}}, self.template / "official.pth")
        with open(self.template / "huge", "wb") as file:
            file.truncate(2**41)
        for label in "ab":
            for n in range(10):
                pixels = np.full((8, 8, 3), 20 * n + (label == "b"), np.uint8)
                Image.fromarray(pixels).save(self.template / "images" / label / f"{n}.png")
        shutil.copy(self.template / "images/a/0.png", self.template / "images/a" / os.fsdecode(b"\xff.png"))
        (self.template / "loop").symlink_to("loop")
        (self.template / "unreadable").chmod(0)

    def write(self, name: str, content: bytes) -> None:
        """Write a file that every example finds."""
        (self.template / name).write_bytes(content)

    def reset(self, example: Example) -> None:
        """Remove what an example left, and make the files again; runs only if an example names them."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        text = json.dumps(example)
        unused = [name for name in ("run", "part", "odd") if f"{{{name}}}" not in text]
        ignored = shutil.ignore_patterns("huge", *[f"{name}*" if name == "odd" else name for name in unused])
        shutil.copytree(
            self.template,
            self.folder,
            symlinks=True,
            ignore=lambda path, names: ignored(path, names) if Path(path) == self.template else set(),
        )
        (self.folder / "huge").symlink_to(self.template / "huge")
        os.mkfifo(self.folder / "fifo")

    def fill(self, word: str) -> str:
        """Replace the placeholders of a word."""
        special = {"data": self.data, "odd": self.folder / "odd [/x] ünï dir", "mine": self.folder / "mine.toml"}
        special |= {"recipe": self.folder / "recipe.toml", "official": self.folder / "official.pth"}
        names = "missing|file|binary|huge|empty|run|part|images|loop|fifo|unreadable|parts|new|" + "|".join(special)
        return re.sub(rf"\{{({names})\}}", lambda match: str(special.get(match[1], self.folder / match[1])), word)


def write_recipe(world: World, tables: Any) -> None:
    """Write the recipe of an example: the base recipe with other tables."""
    import tomllib

    from bigincubate.config.recipe import merge

    merged = merge(tomllib.loads(world.base), from_json(tables))

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fill(inner) for key, inner in value.items()}
        return world.fill(value) if isinstance(value, str) else value

    (world.folder / "mine.toml").write_bytes(tomli_w.dumps(fill(merged)).encode("utf-8", "surrogateescape"))


# ------------------------------------------------------------------------------------------------ running


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Turn network, processes and training off while the block runs."""
    from concurrent import futures

    import torch

    from bigincubate.data import process_pool
    from bigincubate.launchers import local
    from bigincubate.planning import cost
    from bigincubate.training.trainer import Trainer

    counted, known = cost.count_cost, {}

    def count(row: Any, settings: Any, cut: Any) -> Any:
        key = (row, settings.model.model_dump_json(), settings.optim.name, cut)
        if key not in known:
            known[key] = counted(row, settings, cut)
        return known[key]

    def reached(*_: Any, **__: Any) -> None:
        raise Reached

    def first_batch(self: Any, batches: Any) -> None:
        if self.recipe.data.workers == 0 and self.settings.train.batch_size <= 64:
            next(batches)
        raise Reached

    def no_program(words: Any, *_: Any, **__: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory", words[0] if isinstance(words, list | tuple) else words)

    def no_network(*_: Any, **__: Any) -> None:
        raise OSError(101, "Network is unreachable")

    class InProcess(futures.ThreadPoolExecutor):
        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__(1)

    def no_sleep(seconds: float) -> None:
        if seconds >= 2:  # the loop of --watch
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "count_cost", count)
        patch.setattr(local.LocalRunner, "execute", reached)
        patch.setattr(local, "can_fork", lambda nproc, gpus: False)
        patch.setattr(Trainer, "loop", first_batch)
        patch.setattr(shutil, "which", lambda *_, **__: None)
        patch.setattr(subprocess, "Popen", no_program)
        patch.setattr(os, "fork", no_program)
        patch.setattr(socket.socket, "connect", no_network)
        patch.setattr(socket, "create_connection", no_network)
        patch.setattr(socket, "getaddrinfo", no_network)
        patch.setattr(process_pool, "ProcessPoolExecutor", InProcess)
        patch.setattr(time, "sleep", no_sleep)
        torch.set_num_threads(1)
        yield


def run_example(example: Example, world: World) -> Ending:
    """Run the command of an example, and judge how it ends."""
    from bigincubate.cli import main

    world.reset(example)
    write_recipe(world, example["tables"])
    words = [world.fill(word) for word in example["words"]]
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace", write_through=True)
    code: int | None = None
    fault = place = ""

    def late(*_: Any) -> None:
        raise TooSlow

    with _restored_process(world), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv = ["bigincubate", *words]
        signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        except (Reached, TooSlow) as end:
            place = type(end).__name__
        except BaseException as error:
            fault, place = "".join(traceback.format_exception(error, chain=False))[-3000:], _place(error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    message = _text(err)
    if example["words"][0] == "handle-job-exit":
        pass  # its exit code is that of the job
    elif code is not None and code not in set(Exit):
        fault, place = f"undocumented exit code {code}", f"code {code}"
    elif code not in (None, 0) and "Usage:" not in message + _text(out):
        lines = message[message.rfind("bigincubate: ") :] if "bigincubate: " in message else ""
        if lines.count("\n") != 1 or len(lines) > 6000 or "Traceback" in message:
            fault, place = f"not one line: {message[-3000:]}", f"lines {re.sub('[^a-z ]', '', message)[:40]}"
    return Ending(code, fault, place, message)


def _place(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/bigincubate/" in frame.filename]
    known = isinstance(error, BigincubateError)
    at = f"{frames[-1].filename.rpartition('/bigincubate/')[2]}:{frames[-1].name}" if frames else "?"
    return f"{type(error).__name__} at {at}{' (known error, not handled)' if known else ''}"


def _text(stream: io.TextIOWrapper) -> str:
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode("utf-8", "replace") if not stream.closed else ""


@contextlib.contextmanager
def _restored_process(world: World) -> Iterator[None]:
    """Restore what a command changes in the process, and limit the memory that it takes."""
    cwd, argv, environment, umask = os.getcwd(), sys.argv, dict(os.environ), os.umask(0o022)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    os.environ.update(HOME=str(world.folder / "home"), COLUMNS="100")
    os.environ.pop("NOT_SET", None)
    os.chdir(world.folder / "cwd")
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        os.chdir(cwd)
        os.umask(umask)
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        logger = logging.getLogger("bigincubate")
        logger.handlers, logger.propagate = [], True
