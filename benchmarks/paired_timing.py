"""Compare training steps fairly: in separate processes that alternate, on the same images.

A *contestant* is built in its own process by `contestant(name, settings)` of the benchmark's file and has two
functions: `step()` runs one optimizer step, and `forward()` returns the loss with its graph. Times are compared
within each repeat, so a machine that slows down affects both contestants. The bytes that autograd saves are exact.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Contestant:
    step: Callable[[], Any]
    forward: Callable[[], Any] | None  # None: saved bytes are not counted
    parameters: list[Any]
    flops: int = 0  # training FLOPs per sample if nothing is skipped; 0: unknown


def serve(contestant: Contestant) -> None:
    """Answer requests in the contestant's process, one JSON line each.

    The answer to a number of steps is a list of the seconds of each step (on a GPU: their mean). The answer to
    ``about`` is the return value of :func:`describe`.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    out = sys.stdout
    sys.stdout = sys.stderr  # so that the output of a contestant goes to stderr

    def timed(steps: int) -> float:
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            contestant.step()
        if on_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    for line in sys.stdin:
        request = json.loads(line)
        # on a GPU, synchronize only after the last step
        found: Any = (
            describe(contestant)
            if request == "about"
            else [timed(request)]
            if on_gpu
            else [timed(1) for _ in range(request)]
        )
        print(json.dumps(found), file=out, flush=True)


def describe(contestant: Contestant) -> dict[str, Any]:
    """Return the properties of a contestant other than its speed.

    Returns:
        ``saved``: bytes saved for the backward pass, without parameters, or None if they are not counted;
        ``flops``: training FLOPs per sample; ``peak``: peak memory of the device in a step in bytes, 0 on a CPU;
        ``device``: name of the device.
    """
    import torch

    saved = saved_bytes(contestant.parameters, contestant.forward) if contestant.forward else None
    found = {"saved": saved, "flops": contestant.flops, "peak": 0, "device": "CPU"}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        contestant.step()
        found |= {"peak": torch.cuda.max_memory_allocated(), "device": torch.cuda.get_device_name()}
    return found


def saved_bytes(parameters: list[Any], forward: Callable[[], Any]) -> int:
    import torch

    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage  # keep it alive, so that no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    total = sum(storage.nbytes() for address, storage in saved.items() if address not in own)
    del loss
    return total


class Worker:
    """A contestant's process, as used by the benchmark."""

    def __init__(self, file: str, name: str, settings: dict[str, Any]) -> None:
        command = [sys.executable, file, "--worker", name, json.dumps(settings)]
        self.name = name
        # threads of waiting processes must not spin while another process is timed
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def ask(self, what: int | str) -> Any:
        self.send(what)
        return self.receive()

    def send(self, what: int | str) -> None:
        assert self.process.stdin
        if self.process.poll() is None:
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()

    def receive(self) -> Any:
        assert self.process.stdout
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"{self.name} failed: see above")
        return json.loads(line)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()


def time_in_turns(file: str, names: list[str], settings: dict[str, Any], *, repeats: int, steps: int) -> dict[str, Any]:
    """Time contestants; the others are compared with the last one, the opponent.

    In each repeat, every contestant runs `steps` steps, and another contestant starts.

    Returns:
        Per name: ``seconds`` (median step), ``speed`` (opponent's time divided by its own, median over the repeats),
        ``least`` and ``most`` (lowest and highest of these ratios), and the values of :func:`describe`.
    """
    workers = [Worker(file, name, settings) for name in names]
    try:
        for worker in workers:
            worker.send(3)  # warm-up: optimizer state, compilation
        for worker in workers:
            worker.receive()
        about = {worker.name: worker.ask("about") for worker in workers}
        times: dict[str, list[float]] = {name: [] for name in names}
        for repeat in range(repeats):
            first = repeat % len(workers)
            for worker in workers[first:] + workers[:first]:
                worker.ask(1)  # a step after the pause, not timed
                times[worker.name].append(statistics.median(worker.ask(steps)))
    finally:
        for worker in workers:
            worker.close()
    opponent = times[names[-1]]
    found = {}
    for name in names:
        speed = sorted(theirs / own for theirs, own in zip(opponent, times[name], strict=True))
        found[name] = {
            "seconds": statistics.median(times[name]),
            "speed": statistics.median(speed),
            "least": speed[0],
            "most": speed[-1],
            **about[name],
        }
    return found


def table_row(label: str, found: dict[str, Any], opponent: str) -> list[str]:
    """Return a Markdown row for each contestant except the opponent."""
    theirs = found[opponent]

    def saved(own: dict[str, Any]) -> str:
        if own["saved"] is None:
            return "| | | |"
        return (
            f"| {own['saved'] / 2**20:,.0f} | {theirs['saved'] / 2**20:,.0f} | {theirs['saved'] / own['saved']:.2f} |"
        )

    return [
        f"| {label} | {name} | {own['seconds']:.2f} | {theirs['seconds']:.2f} | **{own['speed']:.2f}** "
        f"| {own['least']:.2f} to {own['most']:.2f} {saved(own)}"
        for name, own in found.items()
        if name != opponent
    ]


HEADER = (
    "| what | ours | s per step | theirs | times as fast | lowest to highest | saved MiB | theirs | times less |\n"
    "| --- | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |"
)
