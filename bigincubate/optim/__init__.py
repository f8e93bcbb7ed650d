"""Optimizer, learning-rate schedule and moving average of a phase."""

from .ema import Ema
from .optimizer import make_optimizer, make_schedule, scaled_lr
from .state_size import Trained, trained

__all__ = ["Ema", "Trained", "make_optimizer", "make_schedule", "scaled_lr", "trained"]
