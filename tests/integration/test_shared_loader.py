"""Co-training: modules share one loader, get the same bits as without it, and survive its end and each other's."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import subprocess
import sys
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

from bigincubate.config import AugmentConfig, DataConfig
from bigincubate.data.batch import Batch
from bigincubate.data.dataset import DatasetInfo, open_dataset
from bigincubate.data.streams import TrainStream
from bigincubate.errors import ExternalError
from bigincubate.experimental.shared_loader.client import SharedLoaderClient
from bigincubate.experimental.shared_loader.fd_socket import connect, listen
from bigincubate.experimental.shared_loader.packing import pack_batch, unpack_batch
from bigincubate.experimental.shared_loader.server import SharedLoaderServer
from bigincubate.tasks.image_classification.views import TrainTransform

Labs = Callable[..., Any]
FORK = multiprocessing.get_context("fork")
MODULES = (0, 1)
STEPS = 60

# ------------------------------------------------------------------------------------------------ whole runs


def shell() -> None:
    """Set up a process group, phases that are forked instead of started, and a temporary folder of its own."""
    os.setpgrp()
    fork_ranks()
    tempfile.tempdir = None


class CoTrained:
    """``run --co-train`` as a shell starts it, on a run with a trained meta model."""

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
        return int(self.lab.run.phase("incubate", module).read_attempts()[-1]["pid"])

    @property
    def server_pid(self) -> int:
        """The child of the launcher that is not a module."""
        children = Path(f"/proc/{self.command.pid}/task/{self.command.pid}/children").read_text().split()
        (pid,) = set(map(int, children)) - {self.pid(module) for module in MODULES}
        return pid

    def log(self, module: int) -> str:
        return (self.lab.run.phase("incubate", module).path / "logs" / "train.log").read_text()

    @property
    def served(self) -> list[tuple[int, int]]:
        """Batches made and sent, one pair per server that ended by itself."""
        lines = (self.lab.run.path / "events.jsonl").read_text().splitlines()
        events = [event for event in map(json.loads, lines) if event["event"] == "shared_loader"]
        return [(event["made"], event["sent"]) for event in events]

    def leaves_no_shared_memory(self) -> bool:
        """Whether no claim is left: a claim file stands for a data set's shared memory and is removed with it."""
        (folder,) = self.temporary.iterdir()
        return not list(folder.glob("*.claim"))


@pytest.fixture(scope="module")
def plain(lab: Labs) -> Any:
    """A run trained without co-training."""
    sets = ("log.every_steps=2", "checkpoint.every_steps=20", "finetune.train.max_steps=2")
    done = lab(f"train.max_steps={STEPS}", *sets)
    for phase, module in (("pretrain", None), ("incubate", 0), ("incubate", 1), ("finetune", None)):
        done.train(phase, module)
    return done


@pytest.fixture
def other(plain: Any, tmp_path: Path) -> Any:
    """The same run after training its meta model only."""
    copy = plain.copy(tmp_path / "run", ["meta"])
    (copy.run.path / "summary.json").unlink(missing_ok=True)
    return copy


def same_weights(one: Any, two: Any, *modules: int) -> bool:
    pairs = [(one.weights("incubate", module), two.weights("incubate", module)) for module in modules]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


OWN_LOADER = "using this module's own loader"


def test_co_training_gives_the_same_weights_from_batches_made_once(plain: Any, other: Any, tmp_path: Path) -> None:
    done = CoTrained(other, tmp_path)
    assert done.command.wait() == 0, done.command.out + done.command.err
    assert same_weights(plain, other, *MODULES)
    assert done.served == [(STEPS, 2 * STEPS)]
    assert OWN_LOADER not in done.log(0) + done.log(1)
    assert done.leaves_no_shared_memory()
    again = CoTrained(other, tmp_path)
    assert again.command.wait() == 0
    assert again.served == [(STEPS, 2 * STEPS)]  # no server was started again


def test_co_training_two_ranks_have_one_server_each(lab: Labs, tmp_path: Path) -> None:
    plain = lab("train.max_steps=6", "data.workers=1", "finetune.train.max_steps=0")
    plain.train("pretrain")
    other = plain.copy(tmp_path / "run")
    apart = Command("run", plain.run.recipe_file, "--run-dir", plain.run.path, "--nproc", 2, before=shell)
    done = CoTrained(other, tmp_path, "--nproc", 2)
    assert apart.wait() == 0, apart.out + apart.err
    assert done.command.wait() == 0, done.command.out + done.command.err
    assert same_weights(plain, other, *MODULES)
    logs = [
        (other.run.path / "modules" / "logs" / name).read_text()
        for name in ("shared_loader.log", "shared_loader.1.log")
    ]
    assert logs == ["6 batches made, 12 sent\n"] * 2
    assert done.leaves_no_shared_memory()


def test_co_training_resumes_modules_at_different_steps(plain: Any, other: Any, tmp_path: Path) -> None:
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
    pids = [second.server_pid, *map(second.pid, MODULES)]
    second.command.kill()

    last = CoTrained(other, tmp_path)
    assert last.command.wait() == 0, last.command.out + last.command.err
    for pid in pids:  # no orphan
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert same_weights(plain, other, *MODULES)
    assert OWN_LOADER not in last.log(0) + last.log(1)
    made, sent = map(sum, zip(*last.served, strict=True))
    assert made < sent
    assert last.leaves_no_shared_memory()


def test_co_training_killed_server_modules_continue_with_their_own_loader(
    plain: Any, other: Any, tmp_path: Path
) -> None:
    left = CoTrained(other, tmp_path)
    left.until_step(10, *MODULES)
    os.kill(left.server_pid, signal.SIGKILL)
    assert left.command.wait() == 0, left.command.out + left.command.err
    assert same_weights(plain, other, *MODULES)
    assert all(left.log(module).count(OWN_LOADER) == 1 for module in MODULES)
    assert left.command.out.count("shared loader: ended by signal 9") == 1
    assert left.leaves_no_shared_memory()


def test_co_training_killed_module_stops_no_other(plain: Any, other: Any, tmp_path: Path) -> None:
    left = CoTrained(other, tmp_path)
    left.until_step(10, *MODULES)
    os.kill(left.pid(0), signal.SIGKILL)
    assert left.command.wait() == 3
    assert same_weights(plain, other, 1)
    assert OWN_LOADER not in left.log(1)
    assert left.served[0][0] == STEPS
    assert left.command.out.count("failed") == 1


def test_co_training_damaged_shard_ends_every_module_with_one_line(
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
    assert failed.served == [(0, 0)]


def test_co_training_server_that_cannot_start_modules_use_their_own_loader(
    plain: Any, other: Any, tmp_path: Path
) -> None:
    (other.run.path / "modules").mkdir()
    (other.run.path / "modules" / "logs").write_text("in the way")
    done = CoTrained(other, tmp_path)
    assert done.command.wait() == 0, done.command.out + done.command.err
    assert same_weights(plain, other, *MODULES)
    assert f"shared loader: could not be started ({other.run.path}/modules/logs: File exists)" in done.command.out
    assert OWN_LOADER not in done.log(0) + done.log(1)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--jobs", 1], "--co-train: 2 modules train in parallel; use --jobs 2, or omit --co-train"),
        (["--jobs", 2, "--baseline"], "--co-train: 2 modules and the baseline train in parallel; use --jobs 3,"),
        (["--set", "data.decentralized=true"], "--co-train: with data.decentralized each module has its own data"),
    ],
)
def test_co_training_impossible_options_are_refused(fast: Path, tmp_path: Path, words: list[object], line: str) -> None:
    refused = run("run", fast, "--run-dir", tmp_path / "run", "--co-train", *words)
    assert refused.wait() == 2
    assert refused.err.startswith(f"bigincubate: {line}")
    assert refused.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_server_started_by_hand_is_refused(fast: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bigincubate.experimental.shared_loader", str(fast)]
    command += ["--run-dir", str(tmp_path / "run"), "--clients", "1"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr == "bigincubate: shared loader: started by `bigincubate run --co-train`, not by hand\n"


# ------------------------------------------------------------------------------------------------ server and clients


@pytest.fixture(scope="module")
def info(digits: Path) -> DatasetInfo:
    return open_dataset(digits)


def stream(info: DatasetInfo, **options: Any) -> TrainStream:
    augment = AugmentConfig(crop="pad", pad=1, erase=0.25, eval_crop=1.0, **options.pop("augment", {}))
    data = DataConfig(workers=options.pop("workers", 0))
    transform = TrainTransform(augment, 8, seed=0, classes=10)
    return TrainStream(info, data, transform, seed=0, batch_size=32, **options)


def fingerprints(batches: Iterator[Batch], count: int) -> list[str]:
    """Return a hash over all columns of each of the next batches."""

    def of(batch: Batch) -> str:
        names, columns = list(batch.columns), list(batch.columns.values())
        columns += [batch.sample_ids, batch.global_position, batch.rank_sample_index]
        return hashlib.sha256(repr(names).encode() + b"".join(c.numpy().tobytes() for c in columns)).hexdigest()

    return [of(batch) for batch in islice(batches, count)]


def _serve(listener: Any, report: Any, options: dict[str, Any], info: DatasetInfo, kind: dict[str, Any]) -> None:
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    server = SharedLoaderServer(listener, stream(info, **kind), "digest", **options)
    server.serve(lambda: asked)
    report.send((server.batches_made, server.batches_sent))


class ServerProcess:
    """A server in its own process."""

    def __init__(self, info: DatasetInfo, kind: dict[str, Any], options: dict[str, Any]) -> None:
        self.info, self.kind, self.name = info, kind, secrets.token_hex(8)
        self.result, report = FORK.Pipe(duplex=False)
        with listen(self.name, 0) as listener:
            self.process = FORK.Process(target=_serve, args=(listener, report, options, info, kind))
            self.process.start()

    def client(self, digest: str = "digest", **options: Any) -> SharedLoaderClient:
        return SharedLoaderClient(stream(self.info, **self.kind), connect(self.name, 0), digest, **options)

    def end(self) -> Any:
        """Stop it and return the numbers of batches made and sent."""
        self.process.terminate()
        return self.result.recv()


@contextmanager
def serving(
    info: DatasetInfo, clients: int = 1, steps: int = 100, patience: float = 60, **kind: Any
) -> Iterator[ServerProcess]:
    server = ServerProcess(info, kind, {"clients": clients, "steps": steps, "patience": patience})
    try:
        yield server
    finally:
        server.process.kill()
        server.process.join()


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"workers": 1},
        {"rank": 1, "world": 2},
        {"augment": {"batch_transform": "bigincubate.experimental.device_augment:DeviceAugment"}},
    ],
)
def test_client_yields_the_batches_of_its_own_stream(info: DatasetInfo, kind: dict[str, Any]) -> None:
    with serving(info, steps=48, **kind) as server, closing(server.client().batches(40)) as batches:
        expected = fingerprints(stream(info, **kind).batches(40), 8)  # into another epoch
        assert fingerprints(batches, 8) == expected
        assert Path("/proc/self/maps").read_text().count("bigincubate-batch") <= 2  # the rest was given back
        batches.close()
        assert server.end() == (8, 8)


def test_batch_memory_is_private_to_each_client(info: DatasetInfo) -> None:
    (batch,) = islice(stream(info).batches(0), 1)
    layout, memory = pack_batch(batch)
    mine, theirs = unpack_batch(layout, os.dup(memory)), unpack_batch(layout, memory)
    mine["images"].zero_()
    assert torch.equal(theirs["images"], batch["images"])
    assert all(offset % 64 == 0 for _, _, offset in layout.values())


def test_client_whose_step_is_over_uses_its_own_stream(info: DatasetInfo, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(info) as server, closing(server.client().batches(10)) as batches:
        fingerprints(batches, 2)
        late = fingerprints(server.client().batches(3), 3)
    assert late == fingerprints(stream(info).batches(3), 3)
    assert capfd.readouterr().err == "shared loader: step 3 is over; using this module's own loader from step 3\n"


def test_client_with_another_digest_is_refused(info: DatasetInfo, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(info) as server:
        found = fingerprints(server.client("another").batches(0), 2)
        assert server.end() == (0, 0)
    assert found == fingerprints(stream(info).batches(0), 2)
    assert "it makes other batches" in capfd.readouterr().err


def test_client_without_a_server_uses_its_own_stream(info: DatasetInfo, capfd: pytest.CaptureFixture[str]) -> None:
    client = SharedLoaderClient(stream(info), None, "digest")
    assert fingerprints(client.batches(5), 2) == fingerprints(stream(info).batches(5), 2)
    assert capfd.readouterr().err == "shared loader: not found; using this module's own loader\n"


def test_client_gives_up_a_stopped_server(info: DatasetInfo, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(info) as server, closing(server.client(timeout=0.5).batches(0)) as batches:
        found = fingerprints(batches, 2)
        os.kill(server.process.pid or 0, signal.SIGSTOP)
        found += fingerprints(batches, 8)
    assert found == fingerprints(stream(info).batches(0), 10)
    assert "no batch for 0.5 s; using this module's own loader from step" in capfd.readouterr().err


def test_server_starts_without_a_client_that_never_connects(info: DatasetInfo) -> None:
    with serving(info, clients=2, patience=0.5) as server:
        with closing(server.client().batches(0)) as batches:
            assert fingerprints(batches, 2) == fingerprints(stream(info).batches(0), 2)
        assert server.end()[0] >= 2


def _read(client: SharedLoaderClient, report: Any, stop_at: int, count: int) -> None:
    batches = client.batches(0)
    found = fingerprints(batches, stop_at)
    report.send(found)
    os.kill(os.getpid(), signal.SIGSTOP)
    report.send(found + fingerprints(batches, count - stop_at))


def test_server_refuses_a_stopped_client_after_its_patience(
    info: DatasetInfo, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = fingerprints(stream(info).batches(0), 20)
    with serving(info, clients=2, steps=20, patience=2) as server:
        result, report = FORK.Pipe(duplex=False)
        stopped = FORK.Process(target=_read, args=(server.client(), report, 3, 20))
        stopped.start()
        with closing(server.client().batches(0)) as batches:
            assert fingerprints(batches, 20) == expected
        assert result.recv() == expected[:3]
        assert capfd.readouterr().err == ""
        os.kill(stopped.pid or 0, signal.SIGCONT)
        assert result.recv() == expected
        stopped.join()
        assert "others waited for 2 s; using this module's own loader from step" in capfd.readouterr().err
        made, sent = server.end()
        assert made == 20
        assert 20 + 3 <= sent < 40


def test_server_is_at_most_four_batches_ahead_of_the_slowest_client(
    info: DatasetInfo, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(info) as server:
        result, report = FORK.Pipe(duplex=False)
        stopped = FORK.Process(target=_read, args=(server.client(), report, 3, 3))
        stopped.start()
        result.recv()  # it stands at step 2
        with closing(server.client(timeout=0.5).batches(6)) as batches:
            assert fingerprints(batches, 2) == fingerprints(stream(info).batches(6), 2)
        assert "no batch for 0.5 s; using this module's own loader from step 6" in capfd.readouterr().err
        stopped.kill()
        stopped.join()
        made, sent = server.end()
        assert 3 <= sent == made <= 6


def test_client_ahead_waits_and_gets_only_the_steps_it_needs(info: DatasetInfo) -> None:
    """One starts at step 8 of 12, the other at step 2 and leaves at step 5: no client needs steps 5 to 7."""
    with serving(info, clients=2, steps=12) as server:
        result, report = FORK.Pipe(duplex=False)
        ahead = FORK.Process(target=_from, args=(server.client(), report, 8, 4))
        ahead.start()
        with closing(server.client().batches(2)) as batches:
            assert fingerprints(batches, 3) == fingerprints(stream(info).batches(2), 3)
        assert result.recv() == fingerprints(stream(info).batches(8), 4)
        ahead.join()
        made, sent = server.end()
        assert 7 <= sent <= made <= 10


def test_client_waiting_for_slower_ones_keeps_the_server(info: DatasetInfo, capfd: pytest.CaptureFixture[str]) -> None:
    """A wait longer than the timeout does not end the connection: the server sends wait messages."""
    with serving(info, clients=2, steps=12, patience=4) as server:
        result, report = FORK.Pipe(duplex=False)
        ahead = FORK.Process(target=_from, args=(server.client(timeout=2.5), report, 10, 2))
        ahead.start()
        with closing(server.client().batches(0)) as batches:
            fingerprints(batches, 1)
            time.sleep(3.2)
            fingerprints(batches, 9)
        assert result.recv() == fingerprints(stream(info).batches(10), 2)
        ahead.join()
        server.end()
    assert OWN_LOADER not in capfd.readouterr().err


def _from(client: SharedLoaderClient, report: Any, step: int, count: int) -> None:
    with closing(client.batches(step)) as batches:
        report.send(fingerprints(batches, count))


def test_server_sends_a_data_fault_to_the_client(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "data")
    info = open_dataset(tmp_path / "data")
    (shard,) = info.path.glob("train/**/*.mds")
    shard.unlink()
    with serving(info, clients=1) as server:
        with pytest.raises(ExternalError, match=r"shard.*No such file"):
            next(server.client().batches(0))
        assert server.end() == (0, 0)
