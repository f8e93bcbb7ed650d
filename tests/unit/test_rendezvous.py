"""The address at which ranks meet: what is wrong with it is said before torch tries for half an hour."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bigincubate.distributed import rendezvous
from bigincubate.distributed.process_group import DistributedContext
from bigincubate.errors import BigincubateError, ConfigError, SystemResourceError

RESOLVE_SECONDS = rendezvous.RESOLVE_SECONDS  # the fixture changes it


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Rank 0 of two, whose address resolves; torch must not be asked."""
    numbers = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}
    for name, value in {**numbers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(rendezvous, "RESOLVE_SECONDS", 0.3)
    monkeypatch.setattr(rendezvous, "RETRY_SECONDS", 0.01)
    return monkeypatch


def refusal(rank: pytest.MonkeyPatch, kind: type[BigincubateError]) -> str:
    """The one line with which a rank is refused before it connects."""
    rank.setattr(torch.distributed, "init_process_group", lambda *_, **__: pytest.fail("torch was asked"))
    with pytest.raises(kind) as caught:
        DistributedContext.detect()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("port", ["", "x", "0", "65536", "-1", "80000"])
def test_port_that_is_none_is_refused(rank: pytest.MonkeyPatch, port: str) -> None:
    rank.setenv("MASTER_PORT", port)
    assert f"MASTER_PORT is {port!r}, not a port number" in refusal(rank, ConfigError)


@pytest.mark.parametrize("name", ["", "node..1", "no-such-node.invalid"])
def test_name_that_does_not_resolve_is_refused(rank: pytest.MonkeyPatch, name: str) -> None:
    rank.setenv("MASTER_ADDR", name)
    text = refusal(rank, SystemResourceError)
    assert f"MASTER_ADDR, {name!r}, does not resolve on {socket.gethostname()} (" in text
    assert "setup_script in the recipe" in text
    assert "GLOO_SOCKET_IFNAME" in text
    assert RESOLVE_SECONDS < 30


@pytest.fixture
def hung() -> Iterator[threading.Event]:
    """What the resolver waits for, which comes after the test."""
    event = threading.Event()
    yield event
    event.set()


def test_name_service_that_hangs_is_not_waited_for(rank: pytest.MonkeyPatch, hung: threading.Event) -> None:
    rank.setattr(socket, "getaddrinfo", lambda *_: hung.wait(60))
    assert "(the name service does not answer)" in refusal(rank, SystemResourceError)


def test_name_that_resolves_after_a_while_is_used(rank: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [socket.gaierror(socket.EAI_AGAIN, "again"), socket.gaierror(socket.EAI_NONAME, "unknown"), []]
    asked = []

    def answer(host: str, *_: Any) -> Any:
        asked.append(host)
        if isinstance(now := answers.pop(0), Exception):
            raise now
        return now

    rank.setattr(rendezvous, "RESOLVE_SECONDS", 60)
    rank.setattr(socket, "getaddrinfo", answer)
    rank.setenv("MASTER_ADDR", "node-0")
    rendezvous.check_rendezvous()
    assert asked == ["node-0"] * 3


def test_port_in_use_is_named(rank: pytest.MonkeyPatch) -> None:
    with socket.create_server(("0.0.0.0", 0)) as other:  # rank 0 would listen on all addresses
        port = other.getsockname()[1]
        rank.setenv("MASTER_PORT", str(port))
        with pytest.raises(SystemResourceError, match=rf"^rank 0 cannot listen on port {port} of .* MASTER_PORT"):
            DistributedContext.detect()
