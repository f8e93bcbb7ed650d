"""Co-training: modules share one loader, end with the bits that they have without it, and outlive it and each other."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Command, fork_ranks, run

from bigincubate.config import Augment, Data
from bigincubate.data.dataset import DatasetInfo, open_dataset
from bigincubate.data.streams import Batch, TrainStream
from bigincubate.errors import EnvironmentFault
from bigincubate.experimental.shared_loader.fd_socket import connect, listen
from bigincubate.experimental.shared_loader.server import FedStream, Feeder, pack, unpack

Labs = Callable[..., Any]
FORK = multiprocessing.get_context("fork")
MODULES = (0, 1)
STEPS = 60

# ------------------------------------------------------------------------------------------------ whole runs


def shell() -> None:
    """A process group, phases that are spared the imports, and a folder of its own for what is temporary."""
    os.setpgrp()
    fork_ranks()
    tempfile.tempdir = None


class CoTrained:
    """`run --co-train` as a shell starts it, on a run whose meta model is there."""

    def __init__(self, lab: Any, folder: Path, *more: object) -> None:
        self.lab, self.temporary = lab, folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        words = ["run", lab.run.recipe_file, "--run-dir", lab.run.path, "--co-train", *more]
        self.command = Command(*words, before=shell, env={"TMPDIR": str(self.temporary)})

    def until_step(self, step: int, *modules: int) -> None:
        def reached() -> bool:
            return all(any(row["step"] >= step for row in self.lab.log("incubate", module)) for module in modules)

        assert self.command.until(reached, pause=0.01), self.command.out + self.command.err

    def pid(self, module: int) -> int:
        return int(self.lab.run.phase("incubate", module).attempts()[-1]["pid"])

    @property
    def feeder(self) -> int:
        """The child of the launcher that is no module."""
        children = Path(f"/proc/{self.command.pid}/task/{self.command.pid}/children").read_text().split()
        (pid,) = set(map(int, children)) - {self.pid(module) for module in MODULES}
        return pid

    def log(self, module: int) -> str:
        return (self.lab.run.phase("incubate", module).path / "logs" / "train.log").read_text()

    @property
    def fed(self) -> list[tuple[int, int]]:
        """Batches made and given, a pair a feeder that came to its end."""
        lines = (self.lab.run.path / "events.jsonl").read_text().splitlines()
        events = [event for event in map(json.loads, lines) if event["event"] == "fed"]
        return [(event["made"], event["given"]) for event in events]

    def nothing_is_left(self) -> bool:
        """A claim stands for what its data set has in shared memory, and goes together with that."""
        (folder,) = self.temporary.iterdir()
        return not list(folder.glob("*.claim"))


@pytest.fixture(scope="module")
def plain(lab: Labs) -> Any:
    """What was trained without co-training."""
    sets = ("log.every_steps=2", "checkpoint.every_steps=20", "finetune.train.max_steps=2")
    done = lab(f"train.max_steps={STEPS}", *sets)
    for phase, module in (("pretrain", None), ("incubate", 0), ("incubate", 1), ("finetune", None)):
        done.train(phase, module)
    return done


@pytest.fixture
def other(plain: Any, tmp_path: Path) -> Any:
    """The same run after its meta model."""
    copy = plain.copy(tmp_path / "run", ["meta"])
    (copy.run.path / "summary.json").unlink(missing_ok=True)
    return copy


def same_weights(one: Any, two: Any, *modules: int) -> bool:
    pairs = [(one.weights("incubate", module), two.weights("incubate", module)) for module in modules]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


ALONE = "a loader of its own"


def test_the_same_bits_from_batches_that_are_made_once(plain: Any, other: Any, tmp_path: Path) -> None:
    done = CoTrained(other, tmp_path)
    assert done.command.wait() == 0, done.command.out + done.command.err
    assert same_weights(plain, other, *MODULES)
    assert done.fed == [(STEPS, 2 * STEPS)]
    assert ALONE not in done.log(0) + done.log(1)
    assert done.nothing_is_left()
    again = CoTrained(other, tmp_path)
    assert again.command.wait() == 0
    assert again.fed == [(STEPS, 2 * STEPS)]  # no feeder came


def test_two_ranks_have_a_feeder_each(lab: Labs, tmp_path: Path) -> None:
    plain = lab("train.max_steps=6", "data.workers=1", "finetune.train.max_steps=0")
    plain.train("pretrain")
    other = plain.copy(tmp_path / "run")
    apart = Command("run", plain.run.recipe_file, "--run-dir", plain.run.path, "--nproc", 2, before=shell)
    done = CoTrained(other, tmp_path, "--nproc", 2)
    assert apart.wait() == 0, apart.out + apart.err
    assert done.command.wait() == 0, done.command.out + done.command.err
    assert same_weights(plain, other, *MODULES)
    logs = [(other.run.path / "modules" / "logs" / name).read_text() for name in ("feed.log", "feed.1.log")]
    assert logs == ["6 batches made, 12 given\n"] * 2
    assert done.nothing_is_left()


def test_modules_that_stand_at_different_steps_go_on_together(plain: Any, other: Any, tmp_path: Path) -> None:
    ahead = Command(*other.command("incubate", 1))
    assert ahead.until(lambda: any(row["step"] >= 30 for row in other.log("incubate", 1)))
    ahead.send(signal.SIGTERM)
    assert ahead.wait() == 75

    first = CoTrained(other, tmp_path)
    first.until_step(10, 0)
    os.killpg(first.command.pid, signal.SIGINT)
    assert first.command.wait() == 75
    assert "--co-train" in first.command.out.splitlines()[-1]
    assert other.log("incubate", 1)[-1]["step"] - other.log("incubate", 0)[-1]["step"] > 4

    second = CoTrained(other, tmp_path)
    second.until_step(20, 0)
    pids = [second.feeder, *map(second.pid, MODULES)]
    second.command.kill()

    last = CoTrained(other, tmp_path)
    assert last.command.wait() == 0, last.command.out + last.command.err
    for pid in pids:  # no orphan
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert same_weights(plain, other, *MODULES)
    assert ALONE not in last.log(0) + last.log(1)
    made, given = map(sum, zip(*last.fed, strict=True))
    assert made < given
    assert last.nothing_is_left()


def test_modules_outlive_their_feeder(plain: Any, other: Any, tmp_path: Path) -> None:
    left = CoTrained(other, tmp_path)
    left.until_step(10, *MODULES)
    os.kill(left.feeder, signal.SIGKILL)
    assert left.command.wait() == 0, left.command.out + left.command.err
    assert same_weights(plain, other, *MODULES)
    assert all(left.log(module).count(ALONE) == 1 for module in MODULES)
    assert left.command.out.count("the shared loader ended: ended by signal 9") == 1
    assert left.nothing_is_left()


def test_a_module_that_is_killed_takes_nobody_along(plain: Any, other: Any, tmp_path: Path) -> None:
    left = CoTrained(other, tmp_path)
    left.until_step(10, *MODULES)
    os.kill(left.pid(0), signal.SIGKILL)
    assert left.command.wait() == 3
    assert same_weights(plain, other, 1)
    assert ALONE not in left.log(1)
    assert left.fed[0][0] == STEPS
    assert left.command.out.count("failed") == 1


def test_a_damaged_shard_ends_every_module_with_its_line(
    lab: Labs, digits: Path, tmp_path: Path, bigincubate: Callable[..., Any]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    other = lab(f"data.path={data}", "train.max_steps=6")
    other.train("pretrain")
    (shard,) = data.glob("train/**/*.mds")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    failed = CoTrained(other, tmp_path)
    assert failed.command.wait() == 3
    for module in MODULES:
        assert failed.log(module).startswith(f"bigincubate: {shard} is damaged: SHA-256 ")
        assert failed.log(module).count("\n") == 1
        assert f"module {module}: failed (exit 3): bigincubate: {shard} is damaged" in failed.command.out
    assert failed.fed == [(0, 0)]


def test_where_no_feeder_can_start_each_module_has_its_own_loader(plain: Any, other: Any, tmp_path: Path) -> None:
    (other.run.path / "modules").mkdir()
    (other.run.path / "modules" / "logs").write_text("in the way")
    done = CoTrained(other, tmp_path)
    assert done.command.wait() == 0, done.command.out + done.command.err
    assert same_weights(plain, other, *MODULES)
    assert f"no shared loader ({other.run.path}/modules/logs: File exists)" in done.command.out
    assert ALONE not in done.log(0) + done.log(1)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--jobs", 1], "--co-train: 2 modules run at the same time; give --jobs 2, or leave it out"),
        (["--jobs", 2, "--baseline"], "--co-train: 2 modules and the baseline run at the same time; give --jobs 3,"),
        (["--set", "data.decentralised=true"], "--co-train: with data.decentralised each module sees data of its own"),
    ],
)
def test_what_cannot_be_shared_is_refused(fast: Path, tmp_path: Path, words: list[object], line: str) -> None:
    refused = run("run", fast, "--run-dir", tmp_path / "run", "--co-train", *words)
    assert refused.wait() == 2
    assert refused.err.startswith(f"bigincubate: {line}")
    assert refused.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_feeder_is_not_for_hands(fast: Path, tmp_path: Path) -> None:
    refused = run("feed", fast, "--run-dir", tmp_path / "run", "--readers", 1)
    assert refused.wait() == 2
    assert refused.err == "bigincubate: feed: started by `bigincubate run --co-train`, not by hand\n"


# ------------------------------------------------------------------------------------------------ feeder and readers


@pytest.fixture(scope="module")
def info(digits: Path) -> DatasetInfo:
    return open_dataset(digits)


def stream(info: DatasetInfo, **options: Any) -> TrainStream:
    augment = Augment(crop="pad", pad=1, erase=0.25, eval_crop=1.0, **options.pop("augment", {}))
    data = Data(workers=options.pop("workers", 0))
    return TrainStream(info, data, augment, img_size=8, seed=0, batch_size=32, **options)


def fingerprints(batches: Iterator[Batch], count: int) -> list[str]:
    """Of each of the next batches: all its columns."""

    def of(batch: Batch) -> str:
        columns = (batch.images, batch.labels, batch.ids, batch.positions, batch.local, batch.parameters)
        return hashlib.sha256(b"".join(c.numpy().tobytes() for c in columns if c is not None)).hexdigest()

    return [of(batch) for batch in islice(batches, count)]


def _serve(listener: Any, report: Any, options: dict[str, Any], info: DatasetInfo, kind: dict[str, Any]) -> None:
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    feeder = Feeder(listener, stream(info, **kind), "digest", **options)
    feeder.serve(lambda: asked)
    report.send((feeder.made, feeder.given))


class Fed:
    """A feeder in a process of its own."""

    def __init__(self, info: DatasetInfo, kind: dict[str, Any], options: dict[str, Any]) -> None:
        self.info, self.kind, self.place = info, kind, secrets.token_hex(8)
        self.result, report = FORK.Pipe(duplex=False)
        with listen(self.place, 0) as listener:
            self.process = FORK.Process(target=_serve, args=(listener, report, options, info, kind))
            self.process.start()

    def reader(self, digest: str = "digest", **options: Any) -> FedStream:
        return FedStream(stream(self.info, **self.kind), connect(self.place, 0), digest, **options)

    def end(self) -> Any:
        """What it made and gave."""
        self.process.terminate()
        return self.result.recv()


@contextmanager
def fed(info: DatasetInfo, readers: int = 1, steps: int = 100, patience: float = 60, **kind: Any) -> Iterator[Fed]:
    made = Fed(info, kind, {"readers": readers, "steps": steps, "patience": patience})
    try:
        yield made
    finally:
        made.process.kill()
        made.process.join()


@pytest.mark.parametrize("kind", [{}, {"workers": 1}, {"rank": 1, "world": 2}, {"augment": {"device": True}}])
def test_a_fed_stream_is_the_stream(info: DatasetInfo, kind: dict[str, Any]) -> None:
    with fed(info, steps=48, **kind) as feeder, closing(feeder.reader().batches(40)) as batches:
        expected = fingerprints(stream(info, **kind).batches(40), 8)  # into another epoch
        assert fingerprints(batches, 8) == expected
        assert Path("/proc/self/maps").read_text().count("bigincubate-batch") <= 2  # the rest was given back
        batches.close()
        assert feeder.end() == (8, 8)


def test_writing_to_a_batch_changes_nobody_elses(info: DatasetInfo) -> None:
    (batch,) = islice(stream(info).batches(0), 1)
    columns, memory = pack(batch)
    mine, theirs = unpack(columns, os.dup(memory)), unpack(columns, memory)
    mine.images.zero_()
    assert torch.equal(theirs.images, batch.images)
    assert all(begin % 64 == 0 for _, _, begin in columns.values())


def test_a_reader_whose_step_is_over_goes_on_alone(info: DatasetInfo, capfd: pytest.CaptureFixture[str]) -> None:
    with fed(info) as feeder, closing(feeder.reader().batches(10)) as batches:
        fingerprints(batches, 2)
        late = fingerprints(feeder.reader().batches(3), 3)
    assert late == fingerprints(stream(info).batches(3), 3)
    assert capfd.readouterr().err == "shared loader: step 3 is over; a loader of its own from step 3 on\n"


def test_a_reader_of_other_batches_is_refused(info: DatasetInfo, capfd: pytest.CaptureFixture[str]) -> None:
    with fed(info) as feeder:
        found = fingerprints(feeder.reader("another").batches(0), 2)
        assert feeder.end() == (0, 0)
    assert found == fingerprints(stream(info).batches(0), 2)
    assert "it makes other batches" in capfd.readouterr().err


def test_nobody_there(info: DatasetInfo, capfd: pytest.CaptureFixture[str]) -> None:
    alone = FedStream(stream(info), None, "digest")
    assert fingerprints(alone.batches(5), 2) == fingerprints(stream(info).batches(5), 2)
    assert capfd.readouterr().err == "shared loader: nobody is there; a loader of its own\n"


def test_a_feeder_that_stands_still_is_given_up(info: DatasetInfo, capfd: pytest.CaptureFixture[str]) -> None:
    with fed(info) as feeder, closing(feeder.reader(patience=0.5).batches(0)) as batches:
        found = fingerprints(batches, 2)
        os.kill(feeder.process.pid or 0, signal.SIGSTOP)
        found += fingerprints(batches, 8)
    assert found == fingerprints(stream(info).batches(0), 10)
    assert "no batch for 0.5 s; a loader of its own from step" in capfd.readouterr().err


def test_one_that_never_comes_is_not_waited_for(info: DatasetInfo) -> None:
    with fed(info, readers=2, patience=0.5) as feeder:
        with closing(feeder.reader().batches(0)) as batches:
            assert fingerprints(batches, 2) == fingerprints(stream(info).batches(0), 2)
        assert feeder.end()[0] >= 2


def _read(reader: FedStream, report: Any, stop_at: int, count: int) -> None:
    batches = reader.batches(0)
    found = fingerprints(batches, stop_at)
    report.send(found)
    os.kill(os.getpid(), signal.SIGSTOP)
    report.send(found + fingerprints(batches, count - stop_at))


def test_a_reader_that_stands_still_is_not_waited_for(info: DatasetInfo, capfd: pytest.CaptureFixture[str]) -> None:
    expected = fingerprints(stream(info).batches(0), 20)
    with fed(info, readers=2, steps=20, patience=2) as feeder:
        result, report = FORK.Pipe(duplex=False)
        stopped = FORK.Process(target=_read, args=(feeder.reader(), report, 3, 20))
        stopped.start()
        with closing(feeder.reader().batches(0)) as batches:
            assert fingerprints(batches, 20) == expected
        assert result.recv() == expected[:3]
        assert capfd.readouterr().err == ""
        os.kill(stopped.pid or 0, signal.SIGCONT)
        assert result.recv() == expected
        stopped.join()
        assert "others waited for 2 s; a loader of its own from step" in capfd.readouterr().err
        made, given = feeder.end()
        assert made == 20
        assert 20 + 3 <= given < 40


def test_nothing_is_made_that_is_four_batches_ahead(info: DatasetInfo, capfd: pytest.CaptureFixture[str]) -> None:
    with fed(info) as feeder:
        result, report = FORK.Pipe(duplex=False)
        stopped = FORK.Process(target=_read, args=(feeder.reader(), report, 3, 3))
        stopped.start()
        result.recv()  # it stands at step 2
        with closing(feeder.reader(patience=0.5).batches(6)) as batches:
            assert fingerprints(batches, 2) == fingerprints(stream(info).batches(6), 2)
        assert "no batch for 0.5 s; a loader of its own from step 6 on" in capfd.readouterr().err
        stopped.kill()
        stopped.join()
        made, given = feeder.end()
        assert 3 <= given == made <= 6


def test_who_is_ahead_waits_for_the_others_and_is_not_fed_what_it_has(info: DatasetInfo) -> None:
    """One begins at step 8 of 12, the other at step 2 and leaves at step 5: steps 5 to 7 are for nobody."""
    with fed(info, readers=2, steps=12) as feeder:
        result, report = FORK.Pipe(duplex=False)
        ahead = FORK.Process(target=_from, args=(feeder.reader(), report, 8, 4))
        ahead.start()
        with closing(feeder.reader().batches(2)) as batches:
            assert fingerprints(batches, 3) == fingerprints(stream(info).batches(2), 3)
        assert result.recv() == fingerprints(stream(info).batches(8), 4)
        ahead.join()
        made, given = feeder.end()
        assert 7 <= given <= made <= 10


def test_who_waits_for_others_that_move_stays(info: DatasetInfo, capfd: pytest.CaptureFixture[str]) -> None:
    """A long wait is no reason to give the feeder up: it says that it is there."""
    with fed(info, readers=2, steps=12, patience=4) as feeder:
        result, report = FORK.Pipe(duplex=False)
        ahead = FORK.Process(target=_from, args=(feeder.reader(patience=2.5), report, 10, 2))
        ahead.start()
        with closing(feeder.reader().batches(0)) as batches:
            fingerprints(batches, 1)
            time.sleep(3.2)
            fingerprints(batches, 9)
        assert result.recv() == fingerprints(stream(info).batches(10), 2)
        ahead.join()
        feeder.end()
    assert "a loader of its own" not in capfd.readouterr().err


def _from(reader: FedStream, report: Any, step: int, count: int) -> None:
    with closing(reader.batches(step)) as batches:
        report.send(fingerprints(batches, count))


def test_a_fault_reaches_every_reader(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "data")
    info = open_dataset(tmp_path / "data")
    (shard,) = info.path.glob("train/**/*.mds")
    shard.unlink()
    with fed(info, readers=1) as feeder:
        with pytest.raises(EnvironmentFault, match=r"shard.*No such file"):
            next(feeder.reader().batches(0))
        assert feeder.end() == (0, 0)
