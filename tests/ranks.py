"""What the ranks of a test do: commands one after another, each as under torchrun, and what they ended with.

    torchrun … ranks.py JOBS.json

A job is ``{"words": [...]}`` for the command line, with what to spoil on which rank; results go to ``JOBS.rank.json``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from memory_profile import CollectiveCounter, bytes_by_role, live_storages
from step_counts import StepCounter
from torch.nn.parallel import DistributedDataParallel

from bigincubate.cli import main
from bigincubate.storage import checkpoint_manager
from bigincubate.storage.checkpoint_manager import CheckpointManager
from bigincubate.training import control, trainer

RANK = int(os.environ["RANK"])
FILE = Path(sys.argv[1])


def count_bytes(patch: pytest.MonkeyPatch) -> list[int]:
    """The size of every bucket of gradients that travels."""
    sizes: list[int] = []
    original = DistributedDataParallel.__init__

    def hook(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer()
        sizes.append(buffer.numel() * buffer.element_size())
        work = dist.all_reduce(buffer.div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    def init(self: DistributedDataParallel, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        hook.__annotations__.clear()  # torch compares them with classes, not with their names
        self.register_comm_hook(None, hook)

    patch.setattr(DistributedDataParallel, "__init__", init)
    return sizes


def spoil(patch: pytest.MonkeyPatch, job: dict[str, Any]) -> None:
    step = trainer.Trainer.step

    def spoiled(self: trainer.Trainer, batch: Any) -> Any:
        if self.state.step == job.get("signal_at"):
            os.kill(os.getpid(), signal.SIGUSR1)
        if self.state.step == job.get("take_over_at"):
            (self.folder.path / "owners" / "99.json").write_text("{}")
            self.lease.is_held()  # notice it now, not at the next heartbeat
        if self.state.step in job.get("poison", []):
            batch["images"][0, 0, 0, 0] = float("nan")
        return step(self, batch)

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(trainer.Trainer, "step", spoiled)
    if "disk_full" in job:
        patch.setattr(checkpoint_manager, "write_sharded_tensors", full)


def watch(patch: pytest.MonkeyPatch, at: int, found: dict[str, Any]) -> None:
    """What this rank holds and sends in optimizer step ``at``: when the last micro-batch begins and when the backward
    is over. ``rest`` lists what nobody is known to hold."""
    build, step = trainer.build_phase, trainer.Trainer.step

    def measured(self: trainer.Trainer) -> dict[str, Any]:
        shards = [shard.tensor for shard in self.ema.shards.values()]
        parts = bytes_by_role(self.model, self.sharding.optimizer, shards, self.ema.average.values())
        known = {address for part in parts.values() for address in part}
        rest = {address: size for address, size in live_storages(self.env.device).items() if address not in known}
        sizes = {name: sum(part.values()) for name, part in parts.items()}
        return sizes | {"rest": [size for size in rest.values() if size > 1024]}

    def started(*arguments: Any) -> Any:
        gc.collect()
        gc.freeze()  # what was there before is not looked at
        return build(*arguments)

    def watched(self: trainer.Trainer, batch: Any) -> Any:
        if self.state.step != at:
            return step(self, batch)
        gradient_sync, update = self.sharding.gradient_sync, self.sharding.step

        def last(is_last: bool) -> Any:
            if is_last:
                found["summed"] = measured(self)
            return gradient_sync(is_last)

        def over(max_norm: float) -> Any:
            found["held"] = measured(self)
            return update(max_norm)

        with pytest.MonkeyPatch.context() as inner, CollectiveCounter() as collectives:
            inner.setattr(self.sharding, "gradient_sync", last)
            inner.setattr(self.sharding, "step", over)
            ended = step(self, batch)
        found["sent"] = dict(collectives.bytes)
        return ended

    patch.setattr(trainer, "build_phase", started)
    patch.setattr(trainer.Trainer, "step", watched)


def list_agreements(patch: pytest.MonkeyPatch, steps: list[int]) -> None:
    """List after how many steps the ranks agree on whether to stop: every ten, however long these take."""
    step, reduce, done = trainer.Trainer.step, dist.all_reduce, 0

    def counted(self: trainer.Trainer, batch: Any) -> Any:
        nonlocal done
        ended = step(self, batch)
        done = self.state.step + 1
        return ended

    def listed(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if options.get("group") is not None and tensor.dtype == torch.int32:  # flags; gradients have no group
            steps.append(done)
        return reduce(tensor, *arguments, **options)

    patch.setattr(trainer.Trainer, "step", counted)
    patch.setattr(dist, "all_reduce", listed)
    patch.setattr(control, "MAX_SECONDS", 1e6)
    patch.setattr(control, "MAX_STEPS", 10)


def count_steps(patch: pytest.MonkeyPatch, first: int, last: int, found: dict[str, Any]) -> None:
    """Count the values that the host reads in the steps ``first`` to ``last``."""
    step, reads = trainer.Trainer.step, found.setdefault("reads", [])

    def counted(self: trainer.Trainer, batch: Any) -> Any:
        if not first <= self.state.step <= last:
            return step(self, batch)
        with StepCounter() as counter:
            ended = step(self, batch)
        reads.append(dict(counter.reads))
        return ended

    patch.setattr(trainer.Trainer, "step", counted)


def write_again(patch: pytest.MonkeyPatch, folder: str) -> None:
    """What a phase took up from a checkpoint, as a checkpoint in ``folder``."""
    restore = trainer.Trainer.restore

    def restored(self: trainer.Trainer, checkpoint: Any) -> None:
        restore(self, checkpoint)
        saves = CheckpointManager.open(Path(folder), self.env, digest="d" * 64)
        saves.save(checkpoint.step, self.checkpoint_tensors(), dataclasses.asdict(self.state))
        saves.close()

    patch.setattr(trainer.Trainer, "restore", restored)


def command(job: dict[str, Any]) -> dict[str, Any]:
    sys.argv = ["bigincubate", *job["words"]]
    outcome: dict[str, Any] = {}
    digests: list[dict[str, str]] = []
    with pytest.MonkeyPatch.context() as patch:
        sizes = count_bytes(patch)
        functional = torch.nn.functional
        patch.setattr(functional, "linear", functional.linear)  # ZeRO-3 puts its own there, for good
        if "agreements" in job:
            list_agreements(patch, outcome.setdefault("agreements", []))
        elif "signal_at" in job:
            patch.setattr(control, "MAX_STEPS", 1)  # all ranks agree on the signal in the next step
        if job.get("spoiled_rank") == RANK:
            spoil(patch, job)
        if "watch" in job:
            watch(patch, job["watch"], outcome)
        if "count_steps" in job:
            first, last = job["count_steps"]
            count_steps(patch, first, last, outcome)
        if "write_again" in job:
            write_again(patch, job["write_again"])
        finish = trainer.Trainer.finish

        def watched(self: trainer.Trainer) -> Any:
            held = self.sharding.full_state_dict()
            digests.append({name: hashlib.sha256(p.numpy().tobytes()).hexdigest() for name, p in held.items()})
            return finish(self)

        patch.setattr(trainer.Trainer, "finish", watched)
        stderr = FILE.with_suffix(f".{RANK}.err")
        with stderr.open("w") as file, contextlib.redirect_stderr(file):
            try:
                main()
            except SystemExit as end:
                outcome["code"] = end.code
        outcome["err"] = stderr.read_text()
        stderr.unlink()
    return {**outcome, "bytes": sum(sizes), "weights": digests[0] if digests else None}


def evaluate(job: dict[str, Any]) -> dict[str, Any]:
    """Scores of an artifact on the first ``samples`` of the validation split."""
    from bigincubate.config import DataConfig
    from bigincubate.data.dataset import open_dataset
    from bigincubate.distributed.process_group import DistributedContext
    from bigincubate.interchange.export import load_model
    from bigincubate.tasks.image_classification.task import ImageClassification

    env = DistributedContext.detect()
    model, spec = load_model(Path(job["evaluate"]))
    info = open_dataset(job["data"])
    info = dataclasses.replace(info, samples={**info.samples, "val": job["samples"]})
    task = ImageClassification(ImageClassification.artifact_settings(spec.model, spec.metadata), DataConfig())
    stream = task.eval_stream(info, "val", batch_size=32, rank=env.rank, world=env.world)
    scores = task.evaluate(model, stream, env)
    env.close()
    return scores


def run_all() -> None:
    file = FILE
    jobs = json.loads(file.read_text())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend)  # once: a second group would find the addresses of the first in the store
    dist.init_process_group = lambda *_, **__: None
    destroy = dist.destroy_process_group
    dist.destroy_process_group = lambda group=None: destroy(group) if group is not None else None
    outcomes = [evaluate(job) if "evaluate" in job else command(job) for job in jobs]
    file.with_suffix(f".{RANK}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    run_all()
