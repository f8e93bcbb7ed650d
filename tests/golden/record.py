"""Record the golden files anew: ``python tests/golden/record.py [--out DIR]``.

Do so only for a change that is meant to change numbers, and say so in its commit. Values depend on the CPU type in
their last digits; ``machine`` in each file says where they come from.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "scripts")]

import compare_losses  # noqa: E402
from cases import CASES  # noqa: E402

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "mosaicml-streaming", "deepspeed", "fairscale")
STREAMS = ("digits", "swin", "convnext")  # cases whose training streams are recorded
THREADS = 1


def machine() -> dict[str, Any]:
    """Return what the last digits of a result depend on."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = (line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        known = {key.strip(): value.strip() for key, value in lines}
        cpu = ", ".join(f"{known[key]}" for key in ("model name", "cpu family", "model", "stepping") if key in known)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"device": "cpu", "cpu": cpu, "threads": THREADS, "versions": versions}


def run_cases(folder: Path) -> None:
    """Train every case in ``folder``/NAME. Those of one rank share a process, those of two a launch, in parallel."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment |= {"OMP_NUM_THREADS": str(THREADS), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths}
    started = []
    for ranks in sorted({case.ranks for case in CASES}):
        jobs = [words for case in CASES if case.ranks == ranks for words in case.commands(folder / case.name)]
        file, log = folder / f"jobs-{ranks}.json", folder / f"jobs-{ranks}.log"
        file.write_text(json.dumps({"commands": jobs, "streams": STREAMS if ranks == 1 else []}))
        with log.open("w") as output:
            command = [sys.executable, *(torchrun(ranks) if ranks > 1 else []), str(HERE / "runner.py"), str(file)]
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        started.append((process, log))
    try:
        for process, log in started:
            if process.wait(timeout=900):
                raise RuntimeError(f"exit code {process.returncode}:\n{log.read_text()[-4000:]}")
    finally:
        for process, _ in started:
            process.terminate()
            process.wait()


def torchrun(ranks: int) -> list[str]:
    """Return the arguments of Python that start a script in ``ranks`` ranks of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = ["--master-addr", "127.0.0.1", "--local-addr", "127.0.0.1", "--master-port", str(port)]
    return ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(ranks), *address]


def read_cases(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what is recorded, by the name of its file: the phases of each case, and the training streams."""
    phases = {case.name: {"phases": compare_losses.read_run(folder / case.name)} for case in CASES}
    return {**phases, "streams": {"streams": json.loads((folder / "streams.json").read_text())}}


def write_golden(file: Path, found: dict[str, Any]) -> None:
    """Write what was recorded of a case and where, a line per phase."""
    text = json.dumps({"machine": machine(), **found}, separators=(",", ":"))
    file.write_text(text.replace('{"steps"', '\n{"steps"').replace('{"ids"', '\n{"ids"') + "\n")


def main() -> None:
    """Train all cases and write a file each."""
    parser = argparse.ArgumentParser(description="Record the golden files anew.")
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder for the JSON files (default: the checked-in ones)"
    )
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run_cases(Path(folder))
        for name, found in read_cases(Path(folder)).items():
            write_golden(out / f"{name}.json", found)


if __name__ == "__main__":
    main()
