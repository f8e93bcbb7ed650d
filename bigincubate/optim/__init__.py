"""Optimizer, learning-rate schedule and moving average of a phase."""

from .ema import Ema
from .optimizer import make_optimizer, make_schedule, scaled_lr
from .state_size import ParamInfo, trainable_param_info

__all__ = ["Ema", "ParamInfo", "make_optimizer", "make_schedule", "scaled_lr", "trainable_param_info"]
