"""Who this process is among the ranks, and how the ranks agree.

Taken from ``torchrun``'s variables, else from Slurm's, else a world of one.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from .. import __version__
from ..errors import BigincubateError, ConfigError
from ..heap import keep_freed_memory


@dataclass
class RunEnv:
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: Any = None  # a gloo group for words between the ranks, so that they never wait for the accelerator

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def detect(cls) -> RunEnv:
        """Join the process group the environment describes. On a CPU, `keep_freed_memory`.

        Raises:
            ConfigError: the variables contradict each other, or there are more ranks than GPUs on this machine.
        """
        env = os.environ
        if "RANK" in env and "WORLD_SIZE" in env:
            names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]
        elif "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", "1")) > 1 and "MASTER_ADDR" in env:
            names = ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"]
        else:
            names = []
        defaults = [0, 1, 0, 1]
        values = [_number(name, default) for name, default in zip(names, defaults, strict=False)]
        rank, world, local_rank, local_world = values or defaults
        if not 0 <= rank < world:
            raise ConfigError(f"{names[0]}={rank} is outside {names[1]}={world}")
        self = cls(rank, world, local_rank, local_world)
        if torch.cuda.is_available():
            if (needed := max(local_world, local_rank + 1)) > (gpus := torch.cuda.device_count()):
                raise ConfigError(
                    f"{needed} ranks on this machine, which shows {gpus} GPU{'s' if gpus > 1 else ''}; start at most"
                    f" {gpus}, or train on the CPU with CUDA_VISIBLE_DEVICES= in the environment"
                )
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        else:
            keep_freed_memory()
        # streaming and torch both read these
        env.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local_rank), LOCAL_WORLD_SIZE=str(local_world))
        if world > 1:
            env.setdefault("MASTER_ADDR", "127.0.0.1")
            env.setdefault("MASTER_PORT", "29500")
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
            self.control = dist.group.WORLD if self.device.type == "cpu" else dist.new_group(backend="gloo")
        return self

    def machine(self) -> dict[str, Any]:
        """What this rank computes with, for the record: ``device``, ``world`` (ranks), ``threads`` (of this rank, on
        the CPU), ``versions`` of the packages that results depend on."""
        cuda = self.device.type == "cuda"
        device = torch.cuda.get_device_name(self.device) if cuda else f"CPU ({platform.machine()})"
        versions = {name: importlib.metadata.version(name) for name in ("torch", "timm", "mosaicml-streaming")}
        versions = {"bigincubate": __version__, "python": platform.python_version(), **versions}
        return {"device": device, "world": self.world, "threads": torch.get_num_threads(), "versions": versions}

    def apart(self) -> RunEnv:
        """The same ranks, with a channel of their own for another thread to talk on. On all ranks together."""
        return self if self.world == 1 else replace(self, control=dist.new_group(backend="gloo"))

    def close_apart(self) -> None:
        """Give back the channel of :meth:`apart`, whose threads would stay."""
        if self.world > 1:
            dist.destroy_process_group(self.control)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Of each flag, whether any rank says yes."""
        if self.world == 1:
            return flags
        votes = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.control)
        return tuple(bool(vote) for vote in votes)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value (numbers, strings, lists, dictionaries)."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        if self.world == 1:
            return [value]
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value, group=self.control)
        return out

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    @contextmanager
    def first(self) -> Iterator[None]:
        """Rank 0 runs the block before the others do: what it makes, they find. Where it fails, all fail."""
        problem: BigincubateError | None = None
        if self.is_main:
            try:
                yield
            except BigincubateError as error:
                problem = error
            problem = self.broadcast(problem)
        else:
            problem = self.broadcast(None)
            if problem is None:
                yield
        if problem is not None:
            raise problem

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.control)

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def array_index() -> int:
    """The module of this Slurm array task."""
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        raise ConfigError("--module auto needs SLURM_ARRAY_TASK_ID (a Slurm array task); else give a number")
    return _number("SLURM_ARRAY_TASK_ID", 0)


def _number(name: str, default: int) -> int:
    """An environment variable that counts something."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(f"the environment variable {name} is {text!r}, not a number")
    return int(text)


def stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
