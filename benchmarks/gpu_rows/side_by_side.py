"""Compare training all modules of a model on one device in parallel with training them one after another."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from paired_timing import Worker

from gpu_rows import Line, Request

STEPS_FILE = str(Path(__file__).with_name("steps.py"))


def measure_modules(request: Request, *, what: str) -> list[Line]:
    """Measure the time of one step of every module, in parallel and one after another."""
    from phase_step import DEFAULTS

    sizes = request.sizes
    settings: dict[str, Any] = {**DEFAULTS, **sizes.model("B"), "phase": "incubate"}
    if what == "DeiT-T32" and not sizes.toy:  # as in the recipe cifar100-deit-t32
        small = {"model": "deit_tiny_patch16_224", "img_size": 32, "classes": 100, "args": "patch_size = 4"}
        settings |= {**small, "depth": 8, "batch": 512}
    modules = range(settings["modules"])
    workers = [
        Worker(STEPS_FILE, "plain" if sizes.toy else "compiled", {**settings, "module": module}) for module in modules
    ]
    try:
        for worker in workers:
            worker.send(3)
        for worker in workers:
            worker.receive()
        peaks = [worker.ask("about")["peak"] for worker in workers]
        apart, together = [], []
        for _ in range(sizes.repeats):
            start = time.perf_counter()
            for worker in workers:
                worker.ask(sizes.steps)
            apart.append((time.perf_counter() - start) / sizes.steps)
            start = time.perf_counter()
            for worker in workers:
                worker.send(sizes.steps)
            for worker in workers:
                worker.receive()
            together.append((time.perf_counter() - start) / sizes.steps)
    finally:
        for worker in workers:
            worker.close()
    speed = [one / other for one, other in zip(apart, together, strict=True)]
    line: Line = {"what": f"{what}, {len(workers)} modules", "batch": settings["batch"]}
    line |= {"ms one after another": round(1e3 * statistics.median(apart), 2)}
    line |= {"ms side by side": round(1e3 * statistics.median(together), 2), "peak GiB": round(sum(peaks) / 2**30, 2)}
    return [line | {"times as fast": statistics.median(speed), "lowest": min(speed), "highest": max(speed)}]
