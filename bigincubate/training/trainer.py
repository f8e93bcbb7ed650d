"""The training loop of all phases. Phases differ in their row of the plan, not in the code here.

Three layers: :meth:`Trainer.run` trains a phase from its last checkpoint to its artifact, :meth:`Trainer.loop` iterates
over optimizer steps, and :meth:`Trainer.forward_backward` computes the gradient of one step. Leases and records of
attempts are in :mod:`bigincubate.training.run_phase`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from ..data.batch import Batch
from ..distributed.signals import StopFlag
from ..distributed.stragglers import StragglerWatch
from ..errors import ArtifactError, NonFiniteError, Preempted
from ..models.drop_path import apply_masks, draw_masks
from ..models.surgery import extract, rename_tensors
from ..planning.context import PhaseContext
from ..storage.artifacts import ArtifactManifest, Lineage, check_artifact_lineage, save_artifact
from ..storage.checkpoint_manager import Checkpoint, CheckpointManager
from ..storage.lease import Lease
from ..storage.run_directory import PhaseDir
from ..storage.sharded_tensors import TensorShard
from ..tasks.metric import check_finite_metrics
from .builder import PhaseComponents, build_phase, describe_model, open_checkpoints
from .control import ControlPoll
from .determinism import deterministic_algorithms
from .finite_checks import check_skipped_steps, check_training
from .kept_state import load_kept_state
from .metrics_writer import MetricsWriter, StartRate, ThroughputMeter
from .partial_assembly import score_partial_assembly
from .profiling import StepProfiler
from .step_timer import StepTimer

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """The state of a phase except for tensors. Random numbers and the data position are functions of ``step``.

    Attributes:
        step: Number of completed optimizer steps.
        seen: Number of units (`Task.unit`) trained on; each view of a sample counts.
        seconds: Training time over all attempts.
        skipped: Number of steps skipped because their gradient was not finite.
        lr_hook: State of the learning-rate hook.
        last: Metrics of the last step, logged together with the final evaluation.
    """

    step: int = 0
    seen: int = 0
    seconds: float = 0.0
    skipped: int = 0
    lr_hook: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)


class Trainer:
    """Train one phase on one rank.

    Args:
        context: The phase.
        parts: Model, sharding, optimizer and data of the phase.
        checkpoints: The phase's resume checkpoints.
        stop: True after a stop signal.
        lease: Lease on the phase's folder.
        stragglers: Compares the work of the ranks; None if it is not compared.
    """

    def __init__(
        self,
        context: PhaseContext,
        parts: PhaseComponents,
        checkpoints: CheckpointManager,
        stop: StopFlag,
        lease: Lease,
        stragglers: StragglerWatch | None = None,
    ) -> None:
        self.context, self.parts, self.checkpoints, self.stop, self.lease = context, parts, checkpoints, stop, lease
        self.recipe, self.row, self.planned = context.recipe, context.row, context.planned
        self.run_dir, self.env, self.data = context.run, context.env, context.data
        self.settings, self.folder, self.task = context.settings, context.folder, context.task
        self.model, self.wrapped, self.sharding, self.ema = parts.model, parts.wrapped, parts.sharding, parts.ema
        self.total, self.profiler = context.planned.steps, StepProfiler(context)
        self.timer = StepTimer(context, stragglers)
        self.state = TrainState()
        self.saved = -1  # step of the newest checkpoint
        self.rollback: dict[str, Any] | None = None
        self.skipped = torch.zeros((), device=self.env.device)

    @classmethod
    def build(
        cls,
        context: PhaseContext,
        stop: StopFlag,
        lease: Lease | None = None,
        start: Mapping[str, Tensor] | None = None,
        stragglers: StragglerWatch | None = None,
    ) -> Trainer:
        """Build the components of a phase and open its checkpoints. Must be called on all ranks.

        Args:
            context: The phase.
            stop: True after a stop signal.
            lease: Lease on the phase's folder.
            start: Initial weights that replace those of the phase; see :func:`build_model`.
            stragglers: Compares the work of the ranks; None if it is not compared.
        """
        lease = lease or Lease()
        parts = build_phase(context, start)
        checkpoints = open_checkpoints(context, parts.inputs, lease)
        return cls(context, parts, checkpoints, stop, lease, stragglers)

    # ------------------------------------------------------------------------------------------ the run

    def run(self) -> dict[str, Any]:
        """Train from the last checkpoint to the end, write the artifact, and return the result."""
        if (checkpoint := self.checkpoints.load_latest()) is not None:
            self.restore(checkpoint)
        else:
            if self.row.is_assembled:
                self.finish_assembly()
            load_kept_state(self.context, self.sharding)
        self.metrics = self.open_metrics()
        if self.state.step == 0:
            self.metrics.add_text("recipe", self.recipe.toml())
        try:
            with deterministic_algorithms(self.env.device, self.settings.train.deterministic):
                try:
                    self.train()
                except NonFiniteError as error:
                    self.roll_back(error)
                    self.train()
                return self.finish()
        finally:
            self.metrics.close()
            self.checkpoints.close()

    def open_metrics(self) -> MetricsWriter:
        """Open the metrics log for the steps after the current one."""
        first = self.state.step + (0 < self.state.step < self.total)  # the last step is logged with its evaluation
        fleet = self.run_dir.path / "fleet" / self.folder.path.relative_to(self.run_dir.path)
        return MetricsWriter.open(self.folder, first, self.planned, enabled=self.env.is_main, fleet=fleet)

    def roll_back(self, error: NonFiniteError) -> None:
        """Restore the last valid checkpoint and reset the number of skipped steps, at most once per phase.

        This recovers from transient faults. If the data or the settings are the cause, the error occurs again.

        Raises:
            NonFiniteError: ``error``, if there is no checkpoint or the phase has already been rolled back.
        """
        self.checkpoints.wait()
        checkpoint = None if self.rollback else self.checkpoints.load_latest()
        if checkpoint is None:
            raise error
        self.check_lease()
        if self.env.is_main:  # before the rollback, so that there is no second one even if this process is killed
            self.folder.write_rollback(checkpoint.step, at=self.state.step)
            self.run_dir.log_event("rolled_back", phase=self.row.key, step=self.state.step, to=checkpoint.step)
            logger.warning("%s; resuming from the checkpoint of step %d", error, checkpoint.step)
        self.metrics.close()
        self.restore(checkpoint)
        self.metrics = self.open_metrics()

    def train(self) -> None:
        """Train to the last step."""
        self.profiler.check_range(self.state.step + 1)
        with closing(self.profiler), closing(self.parts.train_stream.batches(self.state.step)) as batches:
            self.loop(batches)

    def loop(self, batches: Iterator[Batch]) -> None:
        """Run the remaining optimizer steps, and save a checkpoint after the last one.

        Raises:
            Preempted: A stop signal was received, and a checkpoint was written.
            NonFiniteError: The gradient was not finite in more steps than allowed.
            LockedError: Another process has taken over the phase.
        """
        state, log, every = self.state, self.recipe.log, self.recipe.checkpoint.every_steps
        units, step_flops = self.planned.batch_units, self.step_flops
        meter = ThroughputMeter(step_flops / units, self.task.unit, self.env.device)
        start_rate = StartRate(self.folder if self.env.is_main else None, step_flops)
        clock, poll = time.perf_counter(), ControlPoll(self.env)
        ends = (self.planned.stable_steps, self.total)  # a fork may end the phase where this one begins to decay
        while state.step < self.total:
            stop, failed, lost = poll.any_rank(state.step, bool(self.stop), self.checkpoints.failed, self.lease.lost)
            if failed or lost:
                self.checkpoints.wait()
                self.check_lease()
            if stop:
                self.save(clock)
                self.checkpoints.wait()
                raise Preempted(f"{self.row.title}: stopped at step {state.step} of {self.total} with a checkpoint")
            self.profiler.begin(state.step + 1)
            waiting = time.perf_counter()
            batch = self.task.prepare_batch(next(batches), self.env)
            waited = time.perf_counter() - waiting
            if state.step == 0 and log.images and (images := self.task.preview(batch.first(log.images))) is not None:
                self.metrics.add_images(0, images)

            loss, norm = self.step(batch)
            state.step += 1
            self.profiler.end(state.step)
            self.timer.end_step(waited)
            meter.waited += waited
            state.seen += units
            meter.seen += units
            start_rate.finish_step(loss)

            logged = state.step % log.every_steps == 0 or state.step in ends
            values = self.measure(loss, norm, meter) if logged else {}
            if state.step in ends:
                state.last = values
            if state.step == self.total:
                break
            if log.eval_every_epochs and state.step % (log.eval_every_epochs * self.parts.steps_per_epoch) == 0:
                values |= self.validation_tags(self.evaluate())
                meter.restart()
                poll.restart()
            if values:
                self.log(values)
                self.check_skipped()
            if state.step % every == 0 or state.step in ends:
                clock = self.save(clock)
        self.save(clock)

    def step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run one optimizer step. Return the loss of this rank and the norm of the gradient, both on the device."""
        self.parts.schedule.set_rates(self.sharding.optimizer, self.state.step)
        loss = self.forward_backward(batch)
        norm, skipped = self.sharding.step(self.settings.train.clip_grad)
        self.skipped += skipped
        self.ema.update()
        return loss, norm

    def forward_backward(self, batch: Batch) -> Tensor:
        """Accumulate the gradient of the mean loss over the micro-batches of a batch, and return that mean."""
        count, num_drop_paths = self.parts.micro_batches, self.parts.num_drop_paths
        train, step = self.settings.train, self.state.step
        total = torch.zeros((), device=self.env.device)
        if num_drop_paths:
            masks = draw_masks(train.seed, step, num_drop_paths, train.batch_size)
        for index in range(count):
            last = index == count - 1
            micro = batch.micro_batch(index, count)
            if num_drop_paths:  # before `to`: indexing on the CPU needs no synchronization with the device
                apply_masks(self.model, masks[:, micro.global_position])
            micro = micro.to(self.env.device)
            with self.sharding.gradient_sync(last):
                with (
                    self.timer.forward(),
                    torch.autocast(self.env.device.type, torch.bfloat16, enabled=train.precision == "bf16"),
                ):
                    loss = self.task.loss(self.wrapped, micro, step) / count
                self.sharding.backward(loss)
            total += loss.detach()
        return total

    # ------------------------------------------------------------------------------------------ logging and checkpoints

    def measure(self, loss: Tensor, norm: Tensor, meter: ThroughputMeter) -> dict[str, float]:
        """Return the metrics of a step, for which the host waits for the device."""
        group = self.sharding.optimizer.param_groups[0]
        return {
            "train/loss": self.env.sum_over_ranks(loss.double()).item() / self.env.world,
            "train/lr": group["lr"] / group.get("lr_scale", 1.0),  # before layer decay
            "train/grad_norm": norm.item(),
            "train/skipped": self.skipped.item(),
            **({"train/gain": self.parts.lr_hook.gain} if self.parts.lr_hook else {}),
            **meter.read(),
            **self.timer.report(self.lease),
        }

    def log(self, values: dict[str, float]) -> None:
        """Write the metrics of this step, unless another process has taken over the phase."""
        if self.lease.is_held():
            self.metrics.log(self.state.step, values | self.checkpoints.pop_metrics())

    def check_lease(self) -> None:
        """Check that this process still owns the phase. Must be called on all ranks.

        Raises:
            LockedError: Another process has taken over the phase.
        """
        with self.env.main_process_first():
            if self.env.is_main:
                self.lease.check()

    @property
    def first_counted_step(self) -> int:
        """The step since which skipped steps are counted."""
        return self.rollback["to"] if self.rollback else 0

    @property
    def step_flops(self) -> int:
        """The training FLOPs of an optimizer step."""
        return self.settings.train.batch_size * self.planned.cost.training_flops

    def check_skipped(self) -> None:
        """Check that at most ``train.max_nonfinite`` steps were skipped; see :func:`check_skipped_steps`."""
        allowed = self.settings.train.max_nonfinite
        check_skipped_steps(self.row.title, int(self.skipped), self.state.step, self.first_counted_step, allowed)

    def save(self, clock: float) -> float:
        """Start saving a checkpoint.

        Args:
            clock: Time (``time.perf_counter``) at which training started or the last checkpoint was saved.

        Returns:
            The current time.
        """
        self.check_skipped()
        self.metrics.flush()
        now = time.perf_counter()
        self.state.seconds += now - clock
        self.state.skipped = int(self.skipped)
        if self.parts.lr_hook:
            self.state.lr_hook = self.parts.lr_hook.state()
        if self.state.step != self.saved:
            self.checkpoints.start_save(self.state.step, self.checkpoint_tensors(), asdict(self.state))
            self.saved = self.state.step
        return now

    def checkpoint_tensors(self) -> dict[str, Tensor | TensorShard]:
        """Return this rank's part of a checkpoint."""
        tensors = self.sharding.save()
        # a rank has the averages of all its trainable parameters, but writes only those whose weights it writes
        return tensors | {key: value for key, value in self.ema.save().items() if f"model/{key[4:]}" in tensors}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore the state of training from a checkpoint.

        Raises:
            ArtifactError: The checkpoint does not fit the phase.
        """
        self.saved = checkpoint.step
        self.rollback = self.env.broadcast(self.folder.rollback)
        try:
            self.state = TypeAdapter(TrainState).validate_python(checkpoint.state)
            if self.rollback and self.rollback["to"] == checkpoint.step:
                self.state.skipped = 0
            self.skipped.fill_(self.state.skipped)
            if self.parts.lr_hook:
                self.parts.lr_hook.load_state(self.state.lr_hook)
            self.sharding.load(checkpoint.tensors)
            self.ema.load(checkpoint.tensors)
        except (ValueError, LookupError, TypeError, RuntimeError) as error:  # valid hashes, but unexpected content
            reason = " ".join(str(error).split())
            raise ArtifactError(
                f"the checkpoint of step {checkpoint.step} in {self.folder.checkpoints} does not fit this phase:"
                f" {reason}"
            ) from error

    def evaluate(self) -> dict[str, float]:
        """Evaluate the exported weights (raw or averaged) on the validation split."""
        with self.exported_weights():
            return self.score()

    def exported_weights(self) -> AbstractContextManager[None]:
        """Return a context in which the model has the exported weights (raw or averaged)."""
        if self.recipe.phase_overrides(self.row.phase).export == "ema":
            return self.ema.applied(self.sharding.sync_weights_from_master)
        return nullcontext()

    def score(self) -> dict[str, float]:
        """Evaluate the model with its current weights."""
        return self.task.evaluate(
            self.model, self.parts.eval_stream, self.env, pad_batches_across_ranks=self.sharding.forward_is_collective
        )

    def validation_tags(self, scores: dict[str, float]) -> dict[str, float]:
        """Return the metrics of an evaluation by their tags in the logs."""
        return {f"val/{metric.name}": scores[metric.name] for metric in self.task.metrics}

    def finish(self) -> dict[str, Any]:
        """Evaluate, write the artifact, and return the result.

        Raises:
            NonFiniteError: The training, a metric or a weight is not finite.
        """
        check_training(self.row.title, self.state.last, int(self.skipped), self.state.step - self.first_counted_step)
        scores = self.evaluate()
        check_finite_metrics(self.task.metrics, scores, self.row.title)
        self.checkpoints.wait()
        self.log(self.state.last | self.validation_tags(scores))
        module = self.row.module
        with self.exported_weights():
            text = self.task.example_output(self.model, self.env) if module is None else None
            if text is not None:
                self.metrics.add_text("example", text, self.state.step)
            tensors = self.sharding.full_state_dict()
            if module is not None:  # rename blocks to their indices in the target
                partition = self.context.partition
                tensors = rename_tensors(extract(tensors, partition, module), partition, self.context.target_partition)
            with self.env.main_process_first():
                if self.env.is_main:
                    self.write_artifact(self.folder, tensors, self.recipe.phase_overrides(self.row.phase).export)
        if module is not None:
            self.score_partial(module)
        steps, seen, seconds = self.state.step, self.state.seen, round(self.state.seconds, 3)
        flops = steps * self.step_flops
        result = self.task.make_result(scores, steps=steps, seen=seen, flops=flops, seconds=seconds)
        return result | ({} if text is None else {"example": text})

    def score_partial(self, module: int) -> None:
        """Evaluate this module together with the other finished modules; see :func:`score_partial_assembly`."""
        score_partial_assembly(self.context, self.parts.eval_stream, self.lease, module)

    def finish_assembly(self) -> None:
        """Evaluate and write the assembled model before fine-tuning."""
        assembled = self.run_dir.assembled
        expected = Lineage(self.planned.identity, self.data.digest, self.parts.inputs)
        valid = assembled.result is not None and check_artifact_lineage(assembled.artifact, expected) is None
        if self.env.broadcast(valid):
            return
        scores = self.score()
        check_finite_metrics(self.task.metrics, scores, "assembled model")
        tensors = self.sharding.full_state_dict()
        with self.env.main_process_first():
            if self.env.is_main:
                self.write_artifact(assembled, tensors, "raw")
                assembled.write_result(self.task.make_result(scores))

    def write_artifact(self, folder: PhaseDir, tensors: dict[str, Tensor], export: Any) -> None:
        """Write the weights of the model, or of a module under its names in the target, as an artifact."""
        about, start, module = self.data.schema.metadata, self.parts.initial_weights, self.row.module
        depths = self.row.depths if module is None else self.context.plan.target
        manifest = ArtifactManifest(
            kind="model" if module is None else "module",
            phase=self.row.phase if folder is self.folder else "assembled",
            module=module,
            model=describe_model(self.task, depths, records=about, initial_weights=start),
            weights=export,
            identity=self.planned.identity,
            data=self.data.digest,
            inputs=self.parts.inputs,
        )
        save_artifact(folder.artifact, tensors, manifest, self.lease)
