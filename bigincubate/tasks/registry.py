"""Look up the class of a task by ``task.name``."""

from __future__ import annotations

from ..config import DataConfig, Settings
from ..config.objects import load_object
from ..errors import ConfigError
from .base import Task
from .names import TASKS


def task_class(name: str) -> type[Task]:
    """Return the class of a task.

    Args:
        name: One of ``TASKS``, or ``package.module:Class``.

    Raises:
        ConfigError: There is no such class.
    """
    found = load_object(TASKS.get(name, name), "settings", "data", key="task.name")
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError(f"task.name = {name!r}: expected a subclass of bigincubate.tasks.base.Task")
    return found


def make_task(settings: Settings, data: DataConfig) -> Task:
    """Build the task of a phase.

    Raises:
        ConfigError: ``task.name`` is not the name of a task class.
    """
    return task_class(settings.task.name)(settings, data)
