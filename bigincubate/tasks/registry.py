"""Which class a recipe's ``task.name`` stands for."""

from __future__ import annotations

from ..config import DataConfig, Settings
from ..config.objects import load_object
from .base import Task

TASKS = {"image_classification": "bigincubate.tasks.image_classification.task:ImageClassification"}


def task_class(name: str) -> type[Task]:
    """Return the class of a task.

    Args:
        name: one of ``TASKS``, or ``package.module:Class``.

    Raises:
        ConfigError: there is no such class.
    """
    found: type[Task] = load_object(TASKS.get(name, name), key="task.name")
    return found


def make_task(settings: Settings, data: DataConfig) -> Task:
    """Return the task of a phase with these settings.

    Raises:
        ConfigError: ``task.name`` names no class.
    """
    return task_class(settings.task.name)(settings, data)
