"""Which GPU a rank uses, without a GPU: what torch says of GPUs, and what the ranks tell each other, is made up."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bigincubate.distributed import process_group
from bigincubate.distributed.process_group import DistributedContext
from bigincubate.errors import ConfigError

Detect = Callable[..., DistributedContext]


@pytest.fixture
def detect(monkeypatch: pytest.MonkeyPatch) -> Detect:
    """Rank 1 of the two on this machine. ``uuids``: of its visible GPUs; ``other``: host and UUID of rank 0's."""

    def start(uuids: list[str], other: tuple[str, str]) -> DistributedContext:
        current: list[torch.device] = []
        numbers = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 29500}
        for name, value in {**numbers, "MASTER_ADDR": "127.0.0.1"}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
        monkeypatch.setattr(torch.cuda, "set_device", current.append)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuids[device.index])
        )

        def tell(out: list[Any], value: Any, group: Any) -> None:
            out[:] = [other, value]

        monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
        monkeypatch.setattr(dist, "new_group", lambda **_: None)
        monkeypatch.setattr(dist, "all_gather_object", tell)
        env = DistributedContext.detect()
        assert current == [env.device]
        return env

    return start


HERE = socket.gethostname()


def test_rank_that_sees_only_its_own_gpu_uses_it(detect: Detect) -> None:
    env = detect(["GPU-b"], other=(HERE, "GPU-a"))
    assert (env.device, env.local_rank, env.local_world) == (torch.device("cuda", 0), 1, 2)
    # DeepSpeed and torch's device meshes take it as the number of the device
    assert [os.environ[name] for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK")] == ["0", "2", "1"]


def test_rank_that_sees_all_gpus_uses_that_of_its_number(detect: Detect) -> None:
    env = detect(["GPU-a", "GPU-b"], other=(HERE, "GPU-a"))
    assert env.device == torch.device("cuda", 1)
    assert os.environ["LOCAL_RANK"] == "1"


@pytest.mark.parametrize("uuids", [["GPU-a"], ["GPU-c", "GPU-a"]])
def test_ranks_that_use_the_same_gpu_are_refused(detect: Detect, uuids: list[str]) -> None:
    with pytest.raises(ConfigError, match=rf"ranks 0, 1 use the same GPU of {HERE} \(GPU-a\); .*--gpus-per-task=1"):
        detect(uuids, other=(HERE, "GPU-a"))


def test_gpus_of_other_machines_are_other_gpus(detect: Detect) -> None:
    assert detect(["GPU-0"], other=("another-node", "GPU-0")).world == 2


def test_single_process_asks_nobody(detect: Detect, monkeypatch: pytest.MonkeyPatch) -> None:
    detect(["GPU-b"], other=(HERE, "GPU-a"))
    monkeypatch.setattr(process_group.DistributedContext, "gather", lambda *_: pytest.fail("another rank was asked"))
    assert DistributedContext.single_process().device == torch.device("cuda", 0)
