"""The server of the shared loader and its clients."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import secrets
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from bigincubate.config import AugmentConfig, DataConfig
from bigincubate.data.batch import Batch
from bigincubate.data.dataset import DatasetInfo, open_dataset
from bigincubate.data.streams import TrainStream
from bigincubate.distributed.rank_logging import setup_logging
from bigincubate.errors import ExternalError
from bigincubate.experimental.shared_loader.client import SharedLoaderClient
from bigincubate.experimental.shared_loader.fd_socket import connect, listen
from bigincubate.experimental.shared_loader.packing import pack_batch, unpack_batch
from bigincubate.experimental.shared_loader.server import SharedLoaderServer
from bigincubate.tasks.image_classification.views import TrainTransform

FORK = multiprocessing.get_context("fork")
OWN_LOADER = "using this module's own loader"


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


def test_client_whose_step_is_over_uses_its_own_stream(info: DatasetInfo, caplog: pytest.LogCaptureFixture) -> None:
    with serving(info) as server, closing(server.client().batches(10)) as batches:
        fingerprints(batches, 2)
        late = fingerprints(server.client().batches(3), 3)
    assert late == fingerprints(stream(info).batches(3), 3)
    assert caplog.messages == ["shared loader: it is already past step 3; using this module's own loader from step 3"]


def test_client_with_another_digest_is_refused(info: DatasetInfo, caplog: pytest.LogCaptureFixture) -> None:
    with serving(info) as server:
        found = fingerprints(server.client("another").batches(0), 2)
        assert server.end() == (0, 0)
    assert found == fingerprints(stream(info).batches(0), 2)
    assert "it has other data or settings" in caplog.text


def test_client_without_a_server_uses_its_own_stream(info: DatasetInfo, caplog: pytest.LogCaptureFixture) -> None:
    client = SharedLoaderClient(stream(info), None, "digest")
    assert fingerprints(client.batches(5), 2) == fingerprints(stream(info).batches(5), 2)
    assert caplog.messages == ["shared loader: not found; using this module's own loader"]


def test_client_gives_up_a_stopped_server(info: DatasetInfo, caplog: pytest.LogCaptureFixture) -> None:
    with serving(info) as server, closing(server.client(timeout=0.5).batches(0)) as batches:
        found = fingerprints(batches, 2)
        os.kill(server.process.pid or 0, signal.SIGSTOP)
        found += fingerprints(batches, 8)
    assert found == fingerprints(stream(info).batches(0), 10)
    assert "no batch for 0.5 s; using this module's own loader from step" in caplog.text


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


@pytest.fixture
def logged(capfd: pytest.CaptureFixture[str]) -> pytest.CaptureFixture[str]:
    """What this process and the processes that it forks log."""
    setup_logging("warning")
    return capfd


def test_server_refuses_a_stopped_client_after_its_patience(
    info: DatasetInfo, logged: pytest.CaptureFixture[str]
) -> None:
    expected = fingerprints(stream(info).batches(0), 20)
    with serving(info, clients=2, steps=20, patience=2) as server:
        result, report = FORK.Pipe(duplex=False)
        stopped = FORK.Process(target=_read, args=(server.client(), report, 3, 20))
        stopped.start()
        with closing(server.client().batches(0)) as batches:
            assert fingerprints(batches, 20) == expected
        assert result.recv() == expected[:3]
        assert logged.readouterr().err == ""
        os.kill(stopped.pid or 0, signal.SIGCONT)
        assert result.recv() == expected
        stopped.join()
        assert "other modules waited 2 s for this module; using" in logged.readouterr().err
        made, sent = server.end()
        assert made == 20
        assert 20 + 3 <= sent < 40


def test_server_is_at_most_four_batches_ahead_of_the_slowest_client(
    info: DatasetInfo, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(info) as server:
        result, report = FORK.Pipe(duplex=False)
        stopped = FORK.Process(target=_read, args=(server.client(), report, 3, 3))
        stopped.start()
        result.recv()  # it stands at step 2
        with closing(server.client(timeout=0.5).batches(6)) as batches:
            assert fingerprints(batches, 2) == fingerprints(stream(info).batches(6), 2)
        assert "no batch for 0.5 s; using this module's own loader from step 6" in caplog.text
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


def test_client_waiting_for_slower_ones_keeps_the_server(info: DatasetInfo, logged: pytest.CaptureFixture[str]) -> None:
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
    assert OWN_LOADER not in logged.readouterr().err


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
