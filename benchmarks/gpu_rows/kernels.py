"""Compare each Triton kernel with `torch.compile` of its eager reference, and with a copy of the same size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu_rows import Line, Request

Run = Callable[[], Any]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds_in_turns(runs: dict[str, Run], repeats: int, calls: int) -> dict[str, list[float]]:
    """Return the seconds per call for each repeat, measured with CUDA events on a GPU."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(3):
            run()
    for _ in range(repeats):
        for name, run in runs.items():
            if device().type == "cuda":
                events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                events[0].record()
                for _ in range(calls):
                    run()
                events[1].record()
                events[1].synchronize()
                found[name].append(events[0].elapsed_time(events[1]) / 1e3 / calls)
            else:
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                found[name].append((time.perf_counter() - start) / calls)
    return found


def compare(request: Request, what: str, body: Run, eager: Run, moved: int) -> Line:
    """Measure a kernel and return its line of the table.

    Args:
        request: The request.
        what: The name of the line.
        body: Function that calls the operator, which runs its Triton kernel on a GPU.
        eager: Function that calls the eager reference, which is compiled here.
        moved: The number of bytes that must be read and written.
    """
    source = torch.empty(max(1, moved // 2), dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    runs: dict[str, Run] = {"copy": lambda: target.copy_(source), "triton": body}
    runs["inductor"] = torch.compile(eager) if device().type == "cuda" else eager
    torch._dynamo.reset()
    sizes = request.sizes
    found = seconds_in_turns(runs, 2 if sizes.toy else 10, 2 if sizes.toy else 20)
    middle = {name: statistics.median(seconds) for name, seconds in found.items()}
    speed = [other / own for other, own in zip(found["inductor"], found["triton"], strict=True)]
    share = [copy / own for copy, own in zip(found["copy"], found["triton"], strict=True)]
    line: Line = {"what": what, "triton us": round(1e6 * middle["triton"], 1)}
    line |= {"inductor us": round(1e6 * middle["inductor"], 1), "copy us": round(1e6 * middle["copy"], 1)}
    line |= {"MiB moved": round(moved / 2**20, 2), "GB/s": round(moved / middle["triton"] / 1e9, 1)}
    line |= {"times as fast": statistics.median(speed), "lowest": min(speed), "highest": max(speed)}
    return line | {"share of copy": statistics.median(share)}


def size_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure_add_branch(request: Request) -> list[Line]:
    from bigincubate.kernels.branch import _eager, add_branch

    rows, tokens, channels = (8, 5, 24) if request.sizes.toy else (256, 197, 768)
    lines = []
    for stream, dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)):
        for rate in (0.1, 0.5):
            kept = torch.randperm(rows)[: round(rows * (1 - rate))].sort().values.to(device())
            x = torch.randn(rows, tokens, channels, device=device(), dtype=stream)
            branch = torch.randn(len(kept), tokens, channels, device=device(), dtype=dtype)
            given = (x, branch, kept, torch.full((len(kept),), 1 / (1 - rate), device=device()), None)
            what = f"add_branch, {str(stream)[6:]} stream, drop-path {rate}"
            moved = 2 * size_of(x) + size_of(branch)
            lines.append(
                compare(request, what, lambda g=given: add_branch(*g), lambda g=given: _eager(*g), moved)  # type: ignore[misc]
            )
    return lines


def measure_fused_loss(request: Request) -> list[Line]:
    from bigincubate.experimental.fused_loss import operator

    lines = []
    rows = 8 if request.sizes.toy else 1024
    for classes in (10,) if request.sizes.toy else (1000, 21841):
        logits = torch.randn(rows, classes, device=device(), dtype=torch.bfloat16)
        first, second = (torch.randint(classes, (rows,), device=device()) for _ in range(2))
        share, grad = torch.full((rows,), 0.3, device=device()), torch.full((rows,), 1 / rows, device=device())
        given = (logits, first, second, share, 0.1)
        normalizer = operator._eager(*given)[1]
        after = (grad, logits, normalizer, *given[1:])
        for name, body, eager, arguments, moved in (
            ("forward", operator._soft_cross_entropy, operator._eager, given, size_of(logits)),
            (
                "backward",
                operator._soft_cross_entropy_backward,
                operator._eager_backward,
                after,
                2 * size_of(logits),
            ),
        ):
            what = f"soft_cross_entropy {name}, {classes:,} classes"
            lines.append(
                compare(request, what, lambda f=body, a=arguments: f(*a), lambda f=eager, a=arguments: f(*a), moved)  # type: ignore[misc]
            )
    return lines


def measure_augment(request: Request) -> list[Line]:
    from device_augment import CASES, jpegs, views

    from bigincubate.config import AugmentConfig
    from bigincubate.experimental.device_augment import DeviceAugment, operator

    count, lines = 4 if request.sizes.toy else 256, []
    for case, (policy, size, shape) in list(CASES.items())[: 2 if not request.sizes.toy else None]:
        if request.sizes.toy and size > 32:
            continue
        augment = AugmentConfig(**policy)
        made = views(DeviceAugment(augment, size), jpegs(min(count, 16), shape))
        images, parameters = (torch.stack(column) for column in zip(*made, strict=True))
        images, parameters = (
            column.repeat(count // len(column), *[1] * (column.dim() - 1)).to(device())
            for column in (images, parameters)
        )
        noise = torch.randn(3 * size * size + 1, device=device())
        mixing = torch.tensor([0.3, 0.0, 0.0, 0.0, 0.0], device=device())
        flags = (augment.crop == "simple", augment.three_augment, augment.color_jitter > 0)
        given = (images, parameters, noise if augment.erase else None, mixing, augment.mean, augment.std, *flags)
        moved = size_of(images) + 4 * images.numel()
        lines.append(
            compare(
                request,
                f"augment, {case}",
                lambda g=given: operator.augment(*g),  # type: ignore[misc]
                lambda g=given: operator._eager(*g),  # type: ignore[misc]
                moved,
            )
        )
    return lines
