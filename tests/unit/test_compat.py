"""The private parts of libraries that ``bigincubate/compat`` uses exist and do what it expects."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from denied import limit_file_size
from launching import environment
from streaming import MDSWriter, StreamingDataset
from streaming.base import shared
from streaming.base.dataset import _ShardState
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from bigincubate.compat.fairscale import import_fairscale, owner_rank
from bigincubate.compat.streaming import LOCAL, IsolatedStreamingDataset
from bigincubate.compat.torch import read_flight_recorder, skip_fused_step_if
from bigincubate.data.shared_memory import claim_memory_prefix

# ------------------------------------------------------------------------------------------------ torch


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_torch_fused_step_is_skipped_if_flag_is_set(optimizer: type[torch.optim.Optimizer]) -> None:
    weight = nn.Parameter(torch.ones(3))
    fused = optimizer([weight], lr=0.1, fused=True)  # type: ignore[call-arg]
    weight.grad = torch.full((3,), float("nan"))
    skip_fused_step_if(fused, torch.tensor(True))
    fused.step()
    assert torch.equal(weight, torch.ones(3))
    assert fused.state[weight]["step"] == 0
    weight.grad = torch.ones(3)
    skip_fused_step_if(fused, torch.tensor(False))
    fused.step()
    assert (weight < 1).all()
    assert fused.state[weight]["step"] == 1


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_torch_flight_recorder_has_the_last_collectives(alone: None) -> None:
    dist.all_reduce(torch.ones(7))
    last = pickle.loads(read_flight_recorder("gloo", stacks=False))["entries"][-1]
    assert (last["profiling_name"], last["input_sizes"], "frames" in last) == ("gloo:all_reduce", [[7]], False)
    last = pickle.loads(read_flight_recorder("gloo", stacks=True))["entries"][-1]
    assert "test_torch_flight_recorder_has_the_last_collectives" in [frame["name"] for frame in last["frames"]]
    dump = read_flight_recorder("nccl", stacks=False)
    assert not dump or pickle.loads(dump).get("entries", []) == []


def test_torch_memory_history_has_the_expected_arguments() -> None:
    recorded = inspect.signature(torch.cuda.memory._record_memory_history).parameters
    assert {"enabled", "stacks", "max_entries"} <= recorded.keys()
    assert next(iter(inspect.signature(torch.cuda.memory._dump_snapshot).parameters)) == "filename"


# ------------------------------------------------------------------------------------------------ streaming


class AlwaysVerified(IsolatedStreamingDataset):
    """Shows the second half of the shuffle, each sample twice."""

    def verify_shard(self, shard_id: int) -> None:
        self.verified[shard_id] = 1

    def select(self, first_row: int, worker: int, workers: int) -> list[tuple[int, int]]:
        return [divmod(row, 2) for row in range(100 + first_row, 200)]

    def __getitem__(self, at: tuple[int, int]) -> tuple[int, int]:
        return super().__getitem__(at[0])["index"], at[1]


@pytest.fixture
def mds(tmp_path: Path) -> str:
    """A data set whose samples are their own index, in several shards."""
    with MDSWriter(columns={"index": "int"}, out=str(tmp_path / "train"), size_limit=512) as writer:
        for index in range(100):
            writer.write({"index": index})
    return str(tmp_path)


def test_streaming_private_names_exist(mds: str) -> None:
    assert callable(shared.prefix._each_prefix_int)
    for name in ("_resume", "_get_work", "_each_sample_id", "prepare_shard", "load_state_dict"):
        assert callable(getattr(StreamingDataset, name))
    data = AlwaysVerified(mds, "train", **claim_memory_prefix()._asdict())
    assert data._unique_rank_world.num_ranks == data._parallel_rank_world.num_ranks == 1
    data.prepare_shard(1)
    assert data._shard_states[1] == LOCAL == _ShardState.LOCAL
    assert data.verified.tolist() == [0, 1] + [0] * (data.num_shards - 2)


def test_streaming_shared_memory_is_named_by_the_prefix(mds: str) -> None:
    claim = claim_memory_prefix()
    before = set(Path("/dev/shm").iterdir())
    data = AlwaysVerified(mds, "train", **claim._asdict())
    made = {file.name for file in set(Path("/dev/shm").iterdir()) - before}
    assert any(name.startswith(f"{claim.prefix:06}_") for name in made)
    assert data.num_shards > 2


@pytest.mark.parametrize("verified", [False, True])
def test_streaming_shows_what_is_selected_of_the_shuffle(mds: str, verified: bool) -> None:
    def order(**state: int) -> list[tuple[int, int]]:
        options: dict[str, Any] = {
            "partition_algo": "orig",
            "num_canonical_nodes": 1,
            "shuffle_algo": "py1s",
            "shuffle_block_size": 256,
        }
        data = AlwaysVerified(mds, "train", **claim_memory_prefix()._asdict(), batch_size=3, shuffle=True, **options)
        if verified:
            data.verified[:] = 1
        data.load_state_dict({"epoch": 1, "sample_in_epoch": 0} | state)
        return list(data)

    half = order()
    samples = [sample for sample, _ in half[::2]]
    assert half == [(sample, repeat) for sample in samples for repeat in (0, 1)]
    assert len(set(samples)) == 50
    assert samples != sorted(samples)
    assert order(sample_in_epoch=5) == half[5:]
    assert order(epoch=2) != half


# ------------------------------------------------------------------------------------------------ fairscale


@pytest.fixture
def rank_0_of_3() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=3)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("rank_0_of_3")
def test_fairscale_owner_is_the_rank_with_fewest_elements() -> None:
    pytest.importorskip("fairscale")
    sizes = [7, 3, 1, 4, 2, 9, 1]
    weights = [nn.Parameter(torch.zeros(size)) for size in sizes]
    oss_class, _ = import_fairscale()
    oss = oss_class(weights, optim=torch.optim.SGD, lr=0.1)
    load = [0, 0, 0]
    for weight, size in zip(weights, sizes, strict=True):
        rank = owner_rank(oss, weight)
        assert rank == load.index(min(load))
        load[rank] += size


# ------------------------------------------------------------------------------------------------ DeepSpeed

DEEPSPEED = """
import torch
import torch.distributed as dist
from torch import nn
from bigincubate.compat.deepspeed import flat_slices, import_deepspeed, sync_weights_from_master

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
deepspeed = import_deepspeed("cpu")
assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
for stage in (1, 2, 3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    config = {
        "train_batch_size": 4,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 10},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, zero, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    assert {hasattr(parameter, "ds_tensor") for parameter in names} == {stage == 3}
    slices = list(flat_slices(zero, stage, rank=0))
    assert {names[part.parameter] for part in slices} == set(before)
    for part in slices:
        master = part.flat.narrow(0, part.start, part.length)
        assert part.offset == 0
        assert torch.equal(master.detach(), before[names[part.parameter]].flatten())
        master.data.add_(1)
    sync_weights_from_master(zero, stage)
    for parameter, name in names.items():
        with deepspeed.zero.GatheredParameters([parameter] if stage == 3 else []):
            assert torch.equal(parameter.detach(), before[name] + 1), name
    print("checked", len(slices))
"""


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed_flat_slices_are_the_weights_and_can_be_synchronized() -> None:
    command = [sys.executable, "-c", DEEPSPEED]
    ended = subprocess.run(
        command, env={**environment(), "LOCAL_RANK": "0"}, capture_output=True, text=True, check=False, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("checked 4") == 3


def test_full_disk_ends_the_thread_of_tensorboard_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bigincubate.compat.tensorboard import SummaryWriter

    printed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    writer = SummaryWriter(str(tmp_path))

    def write_on() -> None:
        for step in range(10_000):
            writer.add_scalar("loss", 1.0, step)
            writer.flush()

    with limit_file_size(1000), pytest.raises(OSError, match="File too large"):
        write_on()
    assert printed == []
