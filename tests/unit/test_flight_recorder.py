"""torch's flight recorder: its environment variables, and which recorders a rank dumps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from bigincubate.distributed import flight_recorder
from bigincubate.distributed.flight_recorder import FlightRecorder, enable_flight_recorder
from bigincubate.distributed.process_group import DistributedContext
from bigincubate.errors import RankTimeoutError

VARIABLES = (*flight_recorder.SIZE_VARIABLES, *flight_recorder.DUMP_VARIABLES, *flight_recorder.FILE_VARIABLES)


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # restored at the end, whatever the code does
        monkeypatch.delenv(name)
    return monkeypatch


def found() -> dict[str, str]:
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def test_recorder_is_on_before_the_process_group_is_created(unset: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []

    def init(*_: Any, **__: Any) -> None:
        seen.append(found())
        raise RuntimeError("no other rank")

    unset.setattr(dist, "init_process_group", init)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        unset.setenv(name, value)
    with pytest.raises(RankTimeoutError):
        DistributedContext.detect()
    assert seen == [{"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}]


def test_choice_of_the_user_is_kept(unset: pytest.MonkeyPatch) -> None:
    chosen = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "0", "TORCH_FR_DUMP_ON_TIMEOUT": "0"}
    for name, value in chosen.items():
        unset.setenv(name, value)
    enable_flight_recorder()
    assert found() == chosen


def test_dump_of_nccl_after_a_timeout_goes_to_the_folder(unset: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "flight_recorder" / "1"
    with FlightRecorder(folder, 0, ("gloo", "nccl")).dumped_by_nccl():
        assert found() == {"TORCH_FR_DUMP_TEMP_FILE": f"{folder}/nccl_"}
        assert folder.is_dir()
    assert (found(), [*tmp_path.iterdir()]) == ({}, [])
    with FlightRecorder(folder, 0, ("gloo",)).dumped_by_nccl():
        assert (found(), [*tmp_path.iterdir()]) == ({}, [])
    unset.setenv("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "/mine")
    with FlightRecorder(folder, 0, ("gloo", "nccl")).dumped_by_nccl():
        assert found() == {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/mine"}


def test_each_backend_is_dumped_once_first_without_stacks_then_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, bool]] = []

    def recorded(backend: str, *, stacks: bool) -> bytes:
        read.append((backend, stacks))
        if stacks and backend == "nccl":
            raise RuntimeError("the device does not respond")
        return f"{backend} {stacks}".encode()

    monkeypatch.setattr(flight_recorder, "read_flight_recorder", recorded)
    recorder = FlightRecorder(tmp_path / "dumps", 3, ("gloo", "nccl"))
    recorder.dump()
    recorder.dump()
    assert read == [("gloo", False), ("nccl", False), ("gloo", True), ("nccl", True)]
    files = {file.name: file.read_bytes() for file in (tmp_path / "dumps").iterdir()}
    assert files == {"gloo_3": b"gloo True", "nccl_3": b"nccl False"}
