"""Measure how long training waits for a checkpoint, and how long it takes until the checkpoint is committed."""

from __future__ import annotations

import statistics
import time

from gpu_rows import Line, Request


def measure_saves(request: Request) -> list[Line]:
    import torch
    from phase_step import DEFAULTS, make_trainer

    sizes, lines = request.sizes, []
    for what, phase, module in (("module 0", "incubate", 0), ("end to end", "end_to_end", None)):
        settings = {**DEFAULTS, **sizes.model("B")}
        trainer, _ = make_trainer(settings, phase, module, skip=False)
        trainer.metrics = trainer.open_metrics()
        trainer.sharding.optimizer.zero_grad()
        for parameter in trainer.model.parameters():  # a step with zero gradients creates the optimizer state
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        trainer.sharding.step(0.0)
        blocked, committed = [], []
        for number in range(sizes.repeats + 1):
            trainer.state.step = number + 1
            start = time.perf_counter()
            trainer.save(start)
            blocked.append(time.perf_counter() - start)
            trainer.checkpoints.wait()
            committed.append(time.perf_counter() - start)
        folders = sorted(trainer.folder.checkpoints.glob("step-*"))
        size = sum(file.stat().st_size for file in folders[-1].iterdir())
        trainer.metrics.close()
        trainer.checkpoints.close()
        line: Line = {"what": f"ViT-B, {what}", "MiB": round(size / 2**20)}
        line |= {"ms training waits": round(1e3 * statistics.median(blocked[1:]), 1)}
        line |= {"lowest": round(1e3 * min(blocked[1:]), 1), "highest": round(1e3 * max(blocked[1:]), 1)}
        lines.append(line | {"ms until committed": round(1e3 * statistics.median(committed[1:]), 1)})
    return lines
