"""Tasks: the only package that knows inputs, targets, losses and metrics."""

from .base import Task
from .metric import Metric

__all__ = ["Metric", "Task"]
