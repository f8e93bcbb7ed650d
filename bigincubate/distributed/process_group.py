"""The process group of a phase, and control messages between its ranks."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .. import __version__
from ..compat.malloc import disable_malloc_trim
from ..errors import BigincubateError, ConfigError, RankTimeoutError, SystemResourceError
from .flight_recorder import enable_flight_recorder
from .rendezvous import check_rendezvous

# limit for connecting, and for each collective operation
COLLECTIVE_LIMIT = timedelta(minutes=30)
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
USE_CPU = "set CUDA_VISIBLE_DEVICES= (empty) to train on the CPU"


@dataclass
class DistributedContext:
    """The rank of this process and its connection to the other ranks. The default is a single process on the CPU.

    Attributes:
        rank: Rank of this process.
        world: Number of ranks.
        local_rank: Rank among the ranks on this machine.
        local_world: Number of ranks on this machine.
        device: Device that this rank computes on.
        control: A gloo process group for control messages, which therefore never wait for the accelerator.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: Any = None

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0."""
        return self.rank == 0

    @classmethod
    def detect(cls) -> DistributedContext:
        """Join the process group that ``torchrun``'s environment variables describe; without them, use one process.

        On a CPU, freed memory is not returned to the kernel (see :mod:`bigincubate.compat.malloc`).

        Raises:
            ConfigError: The variables contradict each other, or this machine has fewer GPUs than ranks, or two ranks
                use the same GPU.
            SystemResourceError: ``MASTER_ADDR`` does not resolve, or rank 0 cannot listen on ``MASTER_PORT``.
            RankTimeoutError: The ranks did not all connect within `COLLECTIVE_LIMIT`.
        """
        env = os.environ
        rank, world, local_rank, local_world = 0, 1, 0, 1
        if "RANK" in env and "WORLD_SIZE" in env:
            rank, world = read_count("RANK", 0), read_count("WORLD_SIZE", 1)
            local_rank, local_world = read_count("LOCAL_RANK", 0), read_count("LOCAL_WORLD_SIZE", 1)
        if not 0 <= rank < world:
            raise ConfigError(f"RANK={rank} is outside WORLD_SIZE={world}")
        self = cls._on_device(rank, world, local_rank, local_world)
        if world > 1:
            env.setdefault("MASTER_ADDR", "127.0.0.1")
            env.setdefault("MASTER_PORT", "29500")
            check_rendezvous()
            enable_flight_recorder()
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            try:
                dist.init_process_group(backend, timeout=COLLECTIVE_LIMIT)
            except (RuntimeError, ValueError) as error:  # a DistError is a RuntimeError
                if "EADDRINUSE" in str(error):
                    raise SystemResourceError(
                        f"rank {rank} cannot listen on port {env['MASTER_PORT']} of {socket.gethostname()}, which"
                        " another program uses; set MASTER_PORT to a free port, the same on all ranks"
                    ) from None
                raise RankTimeoutError(
                    f"rank {rank}: the {world} ranks did not all connect to {env['MASTER_ADDR']}:{env['MASTER_PORT']}"
                    f" ({str(error).splitlines()[0]}); check that all ranks run, with the same WORLD_SIZE"
                ) from None
            self.control = dist.group.WORLD if self.device.type == "cpu" else dist.new_group(backend="gloo")
            if self.device.type == "cuda":
                self._check_separate_gpus()
        return self

    @classmethod
    def single_process(cls) -> DistributedContext:
        """Return a context of one process. In an allocation of Slurm, variables may describe ranks that do not run."""
        return cls._on_device(0, 1, 0, 1)

    @classmethod
    def _on_device(cls, rank: int, world: int, local_rank: int, local_world: int) -> DistributedContext:
        """Choose the device of a rank, and set the variables that libraries read."""
        self = cls(rank, world, local_rank, local_world)
        index = local_rank
        if torch.cuda.is_available():
            # Slurm's --gpus-per-task and wrapper scripts show each rank only its own GPU, which is then number 0.
            # Whether these are different GPUs is checked once the ranks are connected.
            if (gpus := torch.cuda.device_count()) == 1:
                index = 0
            elif (needed := max(local_world, local_rank + 1)) > gpus:
                raise ConfigError(
                    f"{needed} ranks on this machine, but only {gpus} visible GPUs; start at most {gpus}, or {USE_CPU}"
                )
            self.device = torch.device("cuda", index)
            torch.cuda.set_device(self.device)
        else:
            disable_malloc_trim()
        # libraries use LOCAL_RANK as the number of the device
        numbers = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": index, "LOCAL_WORLD_SIZE": local_world}
        os.environ.update({name: str(number) for name, number in numbers.items()})
        return self

    def _check_separate_gpus(self) -> None:
        """Refuse ranks that use the same GPU. Collective.

        Environment variables cannot tell: if Slurm confines each rank to its own GPU, CUDA_VISIBLE_DEVICES is 0 in all
        of them. Therefore the ranks compare UUIDs. The host is compared too, because a driver may number the GPUs of
        each machine in the same way.

        Raises:
            ConfigError: Two ranks use the same GPU. Raised on every rank.
        """
        uuid = str(torch.cuda.get_device_properties(self.device).uuid)
        users: dict[tuple[str, str], list[int]] = {}
        for rank, gpu in enumerate(self.gather((socket.gethostname(), uuid))):
            users.setdefault(gpu, []).append(rank)
        for (host, uuid), ranks in users.items():
            if len(ranks) > 1:
                self.close()
                raise ConfigError(
                    f"ranks {', '.join(map(str, ranks))} use the same GPU of {host} ({uuid}); start at most one rank"
                    f" per GPU, give each rank a GPU of its own (srun --gpus-per-task=1), or {USE_CPU}"
                )

    def describe_machine(self) -> dict[str, Any]:
        """Describe the device and the software of this rank.

        Returns:
            ``device`` (name), ``world`` (number of ranks), ``threads`` (CPU threads of this rank), and ``versions`` of
            the packages that affect results.
        """
        cuda = self.device.type == "cuda"
        device = torch.cuda.get_device_name(self.device) if cuda else f"CPU ({platform.machine()})"
        versions = {name: importlib.metadata.version(name) for name in ("torch", "timm", "mosaicml-streaming")}
        versions = {"bigincubate": __version__, "python": platform.python_version(), **versions}
        return {"device": device, "world": self.world, "threads": torch.get_num_threads(), "versions": versions}

    def clone_control_group(self) -> DistributedContext:
        """Return a context of the same ranks with a new control group, for another thread. Collective."""
        return self if self.world == 1 else replace(self, control=dist.new_group(backend="gloo"))

    def close_control_group(self) -> None:
        """Destroy the control group that :meth:`clone_control_group` created, and its threads."""
        if self.world > 1:
            dist.destroy_process_group(self.control)

    def any_rank(self, *flags: bool) -> tuple[bool, ...]:
        """Return for each flag whether it is set on any rank."""
        return tuple(map(bool, self.max_over_ranks(flags)))

    def max_over_ranks(self, numbers: Sequence[int]) -> list[int]:
        """Return for each number its maximum over the ranks."""
        if self.world == 1:
            return list(numbers)
        maxima = torch.tensor(numbers, dtype=torch.int32)
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=self.control)
        return [int(number) for number in maxima]

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's ``value``, which must be picklable."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """Return the ``value`` of every rank, in rank order."""
        if self.world == 1:
            return [value]
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value, group=self.control)
        return out

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum ``tensor`` over the ranks, in place, and return it."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the block on rank 0 before the other ranks run it.

        Raises:
            BigincubateError: The block raised it on rank 0. Raised on every rank.
        """
        problem: BigincubateError | None = None
        if self.is_main:
            try:
                yield
            except BigincubateError as error:
                problem = error
        problem = self.broadcast(problem)
        if problem is not None:
            raise problem
        if not self.is_main:
            yield

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        if self.world > 1:
            dist.barrier(group=self.control)

    def close(self) -> None:
        """Destroy the process group."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


def read_count(name: str, default: int) -> int:
    """Return the value of an environment variable that is a non-negative integer.

    Raises:
        ConfigError: It has another value.
    """
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(f"the environment variable {name} is {text!r}, not a non-negative integer; correct it")
    return int(text)


def print_stderr(text: str) -> None:
    """Print a line to stderr and flush it."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def restored_rank_variables() -> Iterator[None]:
    """Restore the environment variables that describe a rank, because a later call may start other ranks."""
    before = {name: os.environ.get(name) for name in RANK_VARIABLES}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
