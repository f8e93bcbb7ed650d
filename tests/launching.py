"""Real ranks of this machine under torchrun: how they are started, what they are told, and what they ended with."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

RANKS = Path(__file__).with_name("ranks.py")
AT_ONCE = 25
# all that is random, and a log of every step
LOUD = ["mixup.mixup=0.4", "mixup.cutmix=1.0", "drop_path.rate=0.3", "loss.label_smoothing=0.1", "augment.erase=0.3"]
LOUD += ["log.every_steps=1", "ema.decay=0.9", "augment.repeated_aug=2"]
PHASES = [("pretrain", None), ("incubate", 0), ("incubate", 1), ("finetune", None)]


def torchrun(*words: object, world: int = 2) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = ["--master-addr", "127.0.0.1", "--local-addr", "127.0.0.1", "--master-port", str(port)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(world), *address]
    return [*command, *map(str, words)]


def environment() -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    clean.pop("LOCAL_WORLD_SIZE", None)
    return {**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(RANKS.parent.parent)}


def words(harness: Any, phase: str, module: int | None = None, *more: str) -> dict[str, Any]:
    """The job that trains a phase of ``harness``."""
    return {"words": [str(word) for word in harness.command(phase, module, *more)]}


def launch(folder: Path, jobs: list[dict[str, Any]], world: int = 2) -> list[list[dict[str, Any]]]:
    """What each job ended with on each rank. Jobs run one after the other in one launch of the ranks; many of them in
    several, because the groups of gloo that each one makes keep their threads."""
    found: list[list[dict[str, Any]]] = []
    for start in range(0, len(jobs), AT_ONCE):
        file, now = folder / f"jobs-{start}.json", jobs[start : start + AT_ONCE]
        file.write_text(json.dumps(now))
        ended = subprocess.run(
            torchrun(RANKS, file, world=world),
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60 * max(10, len(now)),
            check=False,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        outcomes = [json.loads(file.with_suffix(f".{rank}.json").read_text()) for rank in range(world)]
        found += [list(each) for each in zip(*outcomes, strict=True)]
    return found


def digest(tensor: torch.Tensor) -> str:
    """As the ranks' outcomes have it under ``weights``."""
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
