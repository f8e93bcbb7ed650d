"""The learning rate, a pure function of the optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.optim import Optimizer

from ..config import ScheduleConfig, Settings
from ..errors import ConfigError


def scaled_lr(settings: Settings) -> float:
    """Return the peak learning rate: ``train.lr`` times a factor that depends on ``optim.lr_scaling``.

    The factor is ``batch_size / lr_base_batch`` for "linear", its square root for "sqrt", and 1 for "none" and for a
    learning-rate hook, which scales the result in each step.
    """
    ratio = settings.train.batch_size / settings.optim.lr_base_batch
    return settings.train.lr * {"linear": ratio, "sqrt": ratio**0.5}.get(settings.optim.lr_scaling, 1.0)


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule of one phase, or of two phases that share it.

    Attributes:
        config: Its shape.
        peak: Learning rate after the warm-up.
        warmup: Steps of the warm-up.
        total: Steps of the schedule.
        start: Step of the schedule at which the phase begins.
    """

    config: ScheduleConfig
    peak: float
    warmup: int
    total: int
    start: int = 0

    @classmethod
    def of(cls, settings: Settings, total: int, steps_per_epoch: int, start: int = 0) -> Schedule:
        """Return the schedule that settings describe.

        Args:
            settings: Settings of a phase.
            total: Optimizer steps that the schedule spans.
            steps_per_epoch: Optimizer steps of an epoch.
            start: Step of the schedule at which the phase begins.
        """
        warmup = round(settings.schedule.warmup_epochs * steps_per_epoch)
        return cls(settings.schedule, scaled_lr(settings), warmup, total, start)

    @property
    def decay_start(self) -> int:
        """The step at which ``wsd`` and ``linear`` begin to decay; not before the warm-up ends, nor after ``total``."""
        share = self.config.decay_share if self.config.name == "wsd" else 1.0
        return min(self.total, max(self.warmup, self.total - round(share * self.total)))

    @property
    def stable_steps(self) -> int:
        """The number of steps of the phase before ``wsd`` decays; 0 for other schedules."""
        return max(0, self.decay_start - self.start) if self.config.name == "wsd" else 0

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step of the schedule, before layer decay."""
        config, peak, low = self.config, self.peak, self.config.min_lr
        if step < self.warmup:
            return config.warmup_lr + step * ((peak - config.warmup_lr) / self.warmup)
        if config.name == "constant":
            return peak
        total = max(self.total, 1)
        if config.name == "cosine":  # over all steps, as in timm: the warm-up replaces its beginning
            return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * step / total))
        if step < self.decay_start:
            return peak
        done = (step - self.decay_start) / max(self.total - self.decay_start, 1)
        root = config.name == "wsd" and config.decay == "sqrt"
        return low + (peak - low) * (1 - (math.sqrt(done) if root else done))

    def set_rates(self, optimizer: Optimizer, step: int) -> None:
        """Set the learning rates of all parameter groups for a step of the phase."""
        rate = self.learning_rate(self.start + step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)  # lr_scale: layer decay


def make_schedule(settings: Settings, total: int, steps_per_epoch: int, start: int = 0) -> Schedule:
    """Return the schedule of a phase; see :meth:`Schedule.of`.

    Raises:
        ConfigError: The warm-up is at least as long as the schedule.
    """
    schedule = Schedule.of(settings, total, steps_per_epoch, start)
    if schedule.warmup and schedule.warmup >= total > 0:
        raise ConfigError(
            f"schedule.warmup_epochs is {schedule.warmup} steps, but the phase has only {total}; lower it"
        )
    return schedule
