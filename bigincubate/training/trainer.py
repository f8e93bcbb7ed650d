"""The one training loop. What differs between phases is a row of the plan, never the code here.

Three layers: :meth:`Trainer.run` takes a phase from its last checkpoint to its artifact, :meth:`Trainer.loop` goes over
the optimizer steps, :meth:`Trainer.forward_backward` is what a step computes. Whose a phase is, and how an attempt at
it ends, is in :mod:`bigincubate.training.run_phase`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from ..config import Recipe, Settings
from ..data.dataset import DatasetInfo
from ..data.micro_batches import count_micro_batches
from ..data.partitions import check_view
from ..data.streams import Batch, EvalStream, make_train_stream
from ..distributed.process_group import RunEnv, stderr
from ..distributed.signals import StopFlag
from ..errors import ArtifactError, NonFiniteError, Preempted
from ..models import (
    apply_masks,
    checkpoint_activations,
    choose_attention,
    compile_blocks,
    draw_masks,
    drop_paths,
    extract,
    rename,
    set_rates,
)
from ..optim import Ema, make_optimizer, make_schedule
from ..planning.phases import PhasePlan, Plan, PlannedRow, phase_steps
from ..sharding import make_sharding
from ..storage.artifacts import Manifest, ModelSpec, save_artifact
from ..storage.checkpoint_manager import Checkpoint, CheckpointManager
from ..storage.lease import Claim
from ..storage.run_directory import PhaseDir, RunDir
from ..storage.sharded_tensors import Piece
from ..tasks.image_classification.task import ClassificationTask, evaluate
from .hooks import apply_batch_source, make_learning_rate_hook
from .metrics_writer import Meter, Metrics, log_partial
from .partial_assembly import finished, partial_assembly


@dataclass
class TrainState:
    """All that a phase remembers besides tensors. Random streams and the data position are functions of ``step``."""

    step: int = 0
    images: int = 0
    seconds: float = 0.0  # of training over all attempts
    skipped: int = 0  # steps left out because their gradient was not finite
    lr_hook: dict[str, float] = field(default_factory=dict)  # state of the learning-rate hook
    last: dict[str, float] = field(default_factory=dict)  # measured in the last step, logged with the final evaluation


class Trainer:
    """One phase, on one rank."""

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        row: PhasePlan,
        planned: PlannedRow,
        run: RunDir,
        data: DatasetInfo,
        env: RunEnv,
        stop: StopFlag,
        claim: Claim | None = None,
        start: Mapping[str, Tensor] | None = None,
    ) -> None:
        check_view(recipe, data, row.module)
        self.recipe, self.row, self.planned, self.run_dir, self.env, self.stop = recipe, row, planned, run, env, stop
        self.claim = claim or Claim()
        self.settings: Settings = recipe.settings(row.phase)
        self.folder = run.phase(row.phase, row.module)
        self.total = planned.steps
        self.data = data
        train = self.settings.train
        self.micro_batches = count_micro_batches(self.settings, env.world)

        self.task = ClassificationTask(recipe, plan, row, data)
        self.state = TrainState()

        # one fixed order: weights, freezing, drop-path, placement, recomputation, compilation, sharding, optimizer
        built, self.meta_digest = self.task.build_model(run, start)
        drop = self.settings.drop_path
        set_rates(built, self.task.partition, drop.rates, drop.rate, plan.target, row.module)
        self.model = built.to(env.device)
        choose_attention(self.model, env.device, train.precision)
        units = [block.path for block in self.task.partition.blocks()]
        checkpoint_activations(self.model, units, self.settings.sharding.activation_checkpointing)
        if train.compile:
            compile_blocks(self.model, units)
        self.sharding = make_sharding(self.settings, env, self.micro_batches)
        self.lr_hook = make_learning_rate_hook(self.model, self.settings, self.sharding, env, self.micro_batches)
        self.wrapped = self.sharding.prepare(self.model, units, lambda m: make_optimizer(m, self.settings))
        self.ema = Ema(self.sharding.shards(), self.settings.ema.decay)

        self.eval_stream = EvalStream(
            data,
            "val",
            self.settings.augment,
            img_size=self.settings.model.img_size,
            batch_size=min(256, max(1, train.batch_size // env.world)),
            rank=env.rank,
            world=env.world,
            workers=recipe.data.workers,
            remote=recipe.data.remote,
        )
        stream = make_train_stream(recipe, self.settings, data, env.rank, env.world)
        self.stream = apply_batch_source(stream, recipe, self.settings, data, env)
        _, self.per_epoch = phase_steps(self.settings, data.epoch)
        self.schedule = make_schedule(self.sharding.optimizer, self.settings, self.total, self.per_epoch)
        self.masked = any(path.drops for path in drop_paths(self.model)) and len(drop_paths(self.model))
        self.checkpoints = CheckpointManager(
            self.folder.checkpoints, env, digest=recipe.digest, keep=recipe.checkpoint.keep, claim=self.claim
        )
        self.saved = -1  # step of the newest checkpoint
        self.rollback: dict[str, Any] | None = None
        self.skipped = torch.zeros((), device=env.device)

    # ------------------------------------------------------------------------------------------ the run

    def run(self) -> dict[str, Any]:
        """From the last checkpoint to the result."""
        if (checkpoint := self.checkpoints.latest()) is not None:
            self.restore(checkpoint)
        elif self.row.phase == "finetune":
            self.finish_assembly()
        self.metrics = self.open_metrics()
        if self.state.step == 0:
            self.metrics.text("recipe", f"```\n{self.recipe.toml()}\n```")
        try:
            try:
                self.train()
            except NonFiniteError as error:
                self.roll_back(error)
                self.train()
            return self.finish()
        finally:
            self.metrics.close()
            self.checkpoints.close()

    def open_metrics(self) -> Metrics:
        # the last step is logged after its checkpoint, together with the evaluation
        done = 0 < self.state.step < self.total
        fleet = self.run_dir.path / "fleet" / self.folder.path.relative_to(self.run_dir.path)
        return Metrics(self.folder, self.state.step + done, enabled=self.env.is_main, fleet=fleet, total=self.total)

    def roll_back(self, error: NonFiniteError) -> None:
        """Go back to the last sound checkpoint, once in a phase, and count skipped steps anew. What cannot be undone by
        that (data, settings) comes again; a passing fault does not.

        Raises:
            NonFiniteError: ``error``, where there is no checkpoint, or this was done before, by any attempt.
        """
        self.checkpoints.wait()
        checkpoint = None if self.rollback else self.checkpoints.latest()
        if checkpoint is None:
            raise error
        self.check_claim()
        if self.env.is_main:  # before anything else, so that nobody goes back twice, whenever this process is killed
            self.folder.note_rollback(checkpoint.step, at=self.state.step)
            self.run_dir.note("rolled_back", phase=self.row.key, step=self.state.step, to=checkpoint.step)
            stderr(f"{error}; once more from the checkpoint of step {checkpoint.step}")
        self.metrics.close()
        self.restore(checkpoint)
        self.metrics = self.open_metrics()

    def train(self) -> None:
        """To the last step."""
        with closing(self.stream.batches(self.state.step)) as batches:
            self.loop(batches)

    def loop(self, batches: Iterator[Batch]) -> None:
        """Over the optimizer steps."""
        log, every = self.recipe.log, self.recipe.checkpoint.every_steps
        state = self.state
        meter = Meter(self.planned.cost.training_flops, self.env.device)
        clock = time.perf_counter()
        while state.step < self.total:
            stop, failed, lost = self.env.any(bool(self.stop), self.checkpoints.failed, self.claim.lost)
            if failed or lost:
                self.checkpoints.wait()
                self.check_claim()
            if stop:
                self.save(clock)
                self.checkpoints.wait()
                raise Preempted(f"{self.row.title}: stopped at step {state.step} of {self.total} with a checkpoint")
            waiting = time.perf_counter()
            batch = next(batches)
            meter.waited += time.perf_counter() - waiting
            if state.step == 0 and log.images:
                augment = self.settings.augment
                self.metrics.images(0, self.task.shown(batch.first(log.images)), augment.mean, augment.std)

            loss, norm = self.step(batch)
            state.step += 1
            state.images += self.settings.train.batch_size
            meter.images += self.settings.train.batch_size

            values: dict[str, float] = {}
            if state.step % log.every_steps == 0 or state.step == self.total:
                values = self.measure(loss, norm, meter)
            if state.step == self.total:
                state.last = values
                break
            if log.eval_every_epochs and state.step % (log.eval_every_epochs * self.per_epoch) == 0:
                values |= scored(self.evaluate())
                meter.restart()
            if values:
                self.log(values)
                self.check_finite()
            if state.step % every == 0:
                clock = self.save(clock)
        self.save(clock)

    def step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One optimizer step. Gives the loss of this rank and the norm of the gradient, both on the device."""
        self.schedule.step_update(self.state.step)
        loss = self.forward_backward(batch)
        norm, skipped = self.sharding.step(self.settings.train.clip_grad)
        self.skipped += skipped
        self.ema.update()
        return loss, norm

    def forward_backward(self, batch: Batch) -> Tensor:
        """The gradient of the mean loss over the batch, micro-batch by micro-batch. Gives that mean."""
        count = self.micro_batches
        train = self.settings.train
        total = torch.zeros((), device=self.env.device)
        if self.masked:
            masks = draw_masks(train.seed, self.state.step, self.masked, train.batch_size)
        for index in range(count):
            last = index == count - 1
            micro = batch.micro(index, count)
            if self.masked:  # cut out on the host: it knows the positions, the device need not be asked
                apply_masks(self.model, masks[:, micro.positions])
            images, targets = self.task.prepare(micro.to(self.env.device), self.state.step)
            with self.sharding.accumulating(last):
                with torch.autocast(self.env.device.type, torch.bfloat16, enabled=train.precision == "bf16"):
                    loss = self.task.loss(self.wrapped, images, targets) / count
                self.sharding.backward(loss)
            total += loss.detach()
        return total

    # ------------------------------------------------------------------------------------------ around it

    def measure(self, loss: Tensor, norm: Tensor, meter: Meter) -> dict[str, float]:
        """What is logged of a step; the only place, besides checkpoints, where the host waits for the device."""
        group = self.sharding.optimizer.param_groups[0]
        return {
            "train/loss": self.env.sum(loss.double()).item() / self.env.world,
            "train/lr": group["lr"] / group.get("lr_scale", 1.0),  # before layer decay
            "train/grad_norm": norm.item(),
            "train/skipped": self.skipped.item(),
            **({"train/gain": self.lr_hook.gain} if self.lr_hook else {}),
            **meter.read(),
        }

    def log(self, values: dict[str, float]) -> None:
        """Numbers of this step, unless the log is somebody else's by now."""
        if self.claim.held():
            self.metrics.log(self.state.step, values | self.checkpoints.figures())

    def check_claim(self) -> None:
        """On all ranks together.

        Raises:
            LockedError: this phase was taken over.
        """
        with self.env.first():
            if self.env.is_main:
                self.claim.check()

    def check_finite(self) -> None:
        allowed = self.settings.train.max_nonfinite
        if (skipped := int(self.skipped)) > allowed:
            since = self.rollback["to"] if self.rollback else 0
            after = f" since the rollback to step {since}" if since else ""
            raise NonFiniteError(
                f"{self.row.title}: the gradient was not finite in {skipped} of {self.state.step - since} steps{after}"
                f" (train.max_nonfinite = {allowed}); lower train.lr, or look at the data"
            )

    def save(self, clock: float) -> float:
        """Begin a checkpoint. Gives the time, from which the next stretch of training counts."""
        self.check_finite()
        self.metrics.flush()
        now = time.perf_counter()
        self.state.seconds += now - clock
        self.state.skipped = int(self.skipped)
        if self.lr_hook:
            self.state.lr_hook = self.lr_hook.state()
        if self.state.step != self.saved:
            self.checkpoints.start(self.state.step, self.pieces(), asdict(self.state))
            self.saved = self.state.step
        return now

    def pieces(self) -> dict[str, Tensor | Piece]:
        """This rank's part of a checkpoint."""
        pieces = self.sharding.save()
        # a rank averages what it trains, and writes the average of what it writes
        return pieces | {key: value for key, value in self.ema.save().items() if f"model/{key[4:]}" in pieces}

    def restore(self, checkpoint: Checkpoint) -> None:
        self.saved = checkpoint.step
        self.rollback = self.env.broadcast(self.folder.rollback)
        try:
            self.state = TypeAdapter(TrainState).validate_python(checkpoint.state)
            if self.rollback and self.rollback["to"] == checkpoint.step:
                self.state.skipped = 0
            self.skipped.fill_(self.state.skipped)
            if self.lr_hook:
                self.lr_hook.load_state(self.state.lr_hook)
            self.sharding.load(checkpoint.tensors)
            self.ema.load(checkpoint.tensors)
        except (ValueError, LookupError, TypeError, RuntimeError) as error:  # it has the right hashes, and is not ours
            reason = " ".join(str(error).split())
            raise ArtifactError(
                f"the checkpoint of step {checkpoint.step} in {self.folder.checkpoints} does not fit: {reason}"
            ) from error

    def evaluate(self) -> dict[str, float]:
        """On the whole validation split, with the weights that the phase hands on."""
        with self.exported_weights():
            return self.score()

    def exported_weights(self) -> AbstractContextManager[None]:
        """Return a context in which the model has the weights that the phase exports, raw or averaged."""
        if self.recipe.section(self.row.phase).export == "ema":
            return self.ema.applied(self.sharding.publish)
        return nullcontext()

    def score(self) -> dict[str, float]:
        precision, together = self.settings.train.precision, self.sharding.gathers
        return evaluate(self.model, self.eval_stream, self.env, precision, together=together)

    def finish(self) -> dict[str, Any]:
        """Evaluate, hand on the artifact, give the result."""
        scores = self.evaluate()
        self.checkpoints.wait()
        self.log(self.state.last | scored(scores))
        module = self.row.module
        with self.exported_weights():
            tensors = self.sharding.full_state_dict()
            if module is not None:
                tensors = rename_to_target(tensors, self.task, module)
            with self.env.first():
                if self.env.is_main:
                    self.write_artifact(self.folder, tensors, self.recipe.section(self.row.phase).export)
        if module is not None:
            self.score_partial(module)
        state = self.state
        return {
            **scores,
            "seconds": round(state.seconds, 3),
            "steps": state.step,
            "images": state.images,
            "flops": state.images * self.planned.cost.training_flops,
        }

    def score_partial(self, module: int) -> None:
        """How the module does beside those that are finished by now: in ``partial.json``, the events and TensorBoard.
        Every rank holds the whole model for it, and scores its share of the images."""
        joined: list[int] = self.env.broadcast(finished(self.task, self.run_dir) if self.env.is_main else None)
        if module not in joined:  # the meta model that it grew from was replaced meanwhile
            return
        model = partial_assembly(self.task, self.run_dir, joined, self.env.device)
        scores = evaluate(model, self.eval_stream, self.env, self.settings.train.precision)
        with self.env.first():
            if self.env.is_main:
                self.claim.check()
                self.folder.note_partial({"joined": joined, "modules": self.task.plan.modules, **scores})
                log_partial(self.run_dir.path / "partial" / self.folder.path.name, len(joined), scores)
                self.run_dir.note("partial_assembly", phase=self.row.key, joined=joined, top1=scores["top1"])

    def finish_assembly(self) -> None:
        """The assembled model as it is before fine-tuning: its score, and itself."""
        assembled = self.run_dir.assembled
        if self.env.broadcast(assembled.result) is not None:
            return
        scores = self.score()
        tensors = self.sharding.full_state_dict()
        with self.env.first():
            if self.env.is_main:
                self.write_artifact(assembled, tensors, "raw")
                assembled.finish({**scores, "seconds": 0.0, "steps": 0, "images": 0, "flops": 0})

    def write_artifact(self, folder: PhaseDir, tensors: dict[str, Tensor], export: Any) -> None:
        module = self.row.module
        depths = self.task.row.depths if module is None else self.task.plan.target
        save_artifact(
            folder.artifact,
            tensors,
            Manifest(
                kind="model" if module is None else "module",
                phase=self.row.phase if folder is self.folder else "assembled",
                module=module,
                model=ModelSpec.of(self.settings, depths),
                weights=export,
                recipe=self.recipe.digest,
                data=self.data.digest,
                meta=self.meta_digest,
            ),
            self.claim,
        )


def scored(scores: dict[str, float]) -> dict[str, float]:
    """An evaluation under the tags that it is logged with."""
    return {f"val/{key}": scores[key] for key in ("top1", "top5", "loss")}


def rename_to_target(tensors: dict[str, Tensor], task: ClassificationTask, module: int) -> dict[str, Tensor]:
    """Module ``module`` out of a hybrid's tensors, under the target's block indices."""
    return rename(extract(tensors, task.partition, module), task.partition, task.target)
