"""Compare training steps with those of the official implementation, of timm and with our own variants.

Each contestant runs in a separate process, and they alternate.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the process of a contestant

from paired_timing import Contestant, serve, time_in_turns

from gpu_rows import Line, Request

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16, vendor data sheets


def utilization(device: str, flops_per_second: float) -> float | None:
    """Return the model FLOPs utilization, or None on a device whose peak is unknown."""
    return next((flops_per_second / peak for name, peak in PEAK_FLOPS.items() if name in device), None)


def contestant(name: str, settings: dict[str, Any]) -> Contestant:
    if name == "reference":
        from vs_reference import reference

        return reference(settings)
    if name.startswith("timm"):
        from vs_timm import plain_timm

        return plain_timm(settings, compiled=name == "timm-compiled")
    from phase_step import ours

    if name == "any-order":  # plain with nondeterministic kernels, which may add in any order
        settings = {**settings, "sets": ["train.deterministic=false"]}
    skip, compiled = name in ("skipping", "compiled"), name == "compiled"
    return ours(settings, settings["phase"], settings["module"], skip=skip, compiled=compiled)


def measure_steps(
    request: Request,
    *,
    what: str,
    names: list[str],
    phase: str,
    module: int | None,
    letter: str = "B",
    drop_path: float = 0.0,
    clip: float = 0.0,
) -> list[Line]:
    """Return one line per contestant; the others are compared with the last one.

    For every contestant, MFU counts the FLOPs of a step that skips nothing, so skipped work increases it.
    """
    from phase_step import DEFAULTS

    sizes = request.sizes
    if sizes.toy:
        names = [name for name in names if "compiled" not in name]  # a CPU takes minutes to compile
    settings = {**DEFAULTS, **sizes.model(letter), "phase": phase, "module": module, "drop_path": drop_path}
    settings |= {"clip": clip, "reference": str(request.reference)}
    if module is not None:
        settings["module"] = min(module, settings["modules"] - 1)
    found = time_in_turns(__file__, names, settings, repeats=sizes.repeats, steps=sizes.steps)
    flops = max(each["flops"] for each in found.values())
    lines = []
    for name, each in found.items():
        rate = settings["batch"] / each["seconds"]
        line: Line = {"what": what, "batch": settings["batch"], "contestant": name, "images/s": round(rate, 1)}
        line |= {"ms per step": round(1e3 * each["seconds"], 2), "MFU": utilization(each["device"], rate * flops)}
        line["peak GiB"] = round(each["peak"] / 2**30, 2)
        line["saved GiB"] = None if each["saved"] is None else round(each["saved"] / 2**30, 2)
        if name != names[-1]:
            line |= {"times as fast": each["speed"], "lowest": each["least"], "highest": each["most"]}
            line["as"] = names[-1]
        lines.append(line)
    return lines


if __name__ == "__main__":
    serve(contestant(sys.argv[2], json.loads(sys.argv[3])))
