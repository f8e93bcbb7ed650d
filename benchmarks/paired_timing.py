"""Two training steps against each other, fairly: each in a process of its own, in turns, on the same images.

A *contestant* is built in its own process by `contestant(name, settings)` of the benchmark's file and gives two
functions: `step()`, one optimizer step, and `forward()`, which gives the loss with its graph. What each repeat
took is printed as a ratio, so a machine that slows down slows both; the bytes that autograd keeps are exact.
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
    forward: Callable[[], Any] | None  # None: what it saves is not counted
    parameters: list[Any]
    flops: int = 0  # training FLOPs of a sample, where nothing is left out; 0: not known


def serve(contestant: Contestant) -> None:
    """In the contestant's process: a line with a number of steps on the input, a line with the seconds of each on the
    output, on a GPU their mean; ``about`` for what :func:`describe` returns."""
    import torch

    on_gpu = torch.cuda.is_available()
    out = sys.stdout
    sys.stdout = sys.stderr  # whatever a contestant prints

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
        asked = json.loads(line)
        # the host runs ahead of a GPU, so it waits only after the last step
        found: Any = (
            describe(contestant) if asked == "about" else [timed(asked)] if on_gpu else [timed(1) for _ in range(asked)]
        )
        print(json.dumps(found), file=out, flush=True)


def describe(contestant: Contestant) -> dict[str, Any]:
    """What does not depend on time.

    Returns:
        ``saved``: bytes that a forward keeps for its backward, parameters not counted; None if they are not counted;
        ``flops``: of a sample;
        ``peak``: the most bytes that the device held in a step, 0 on a CPU; ``device``: its name.
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
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage  # kept alive, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    total = sum(storage.nbytes() for address, storage in held.items() if address not in own)
    del loss
    return total


class Worker:
    """A contestant's process, seen from the benchmark."""

    def __init__(self, file: str, name: str, settings: dict[str, Any]) -> None:
        command = [sys.executable, file, "--worker", name, json.dumps(settings)]
        self.name = name
        # threads of who is waiting must not spin beside who is timed
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
    """The last name is the opponent that the others are compared with. Each repeat: `steps` steps of each, in turns,
    beginning with another one each time.

    Returns:
        Per name: ``seconds`` (median step), ``speed`` (median over repeats of the opponent's time over its own, with
        ``least`` and ``most``) and what :func:`describe` says.
    """
    workers = [Worker(file, name, settings) for name in names]
    try:
        for worker in workers:
            worker.send(3)  # warm-up: lazily made state, compilation
        for worker in workers:
            worker.receive()
        about = {worker.name: worker.ask("about") for worker in workers}
        times: dict[str, list[float]] = {name: [] for name in names}
        for repeat in range(repeats):
            first = repeat % len(workers)
            for worker in workers[first:] + workers[:first]:
                worker.ask(1)  # what a pause costs is nobody's step
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
    """A Markdown row for each contestant but the opponent."""
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
    "| what | ours | s a step | theirs | times as fast | least to most | saved MiB | theirs | times less |\n"
    "| --- | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |"
)
