"""Deep Incubation: train the modules of a large model separately, then assemble and fine-tune them.

The names below are loaded on first use, so importing the package loads neither torch nor timm.
"""

from __future__ import annotations

from importlib import import_module

# Nothing else is imported here, because Ctrl-C gives a traceback until `__main__` begins. Type checkers know this name.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from . import errors as errors
    from .api import RunResult, evaluate, fork, load_model, plan, run, train_phase
    from .config import Recipe, load_recipe
    from .data.prepare import prepare_dataset
    from .models.hybrid import build_hybrid, extract_module, grow
    from .models.partition import Partition
    from .models.surgery import assemble

__version__ = "0.2.0"

__all__ = [
    "Partition",
    "Recipe",
    "RunResult",
    "assemble",
    "build_hybrid",
    "errors",
    "evaluate",
    "extract_module",
    "fork",
    "grow",
    "load_model",
    "load_recipe",
    "plan",
    "prepare_dataset",
    "run",
    "train_phase",
]

_MODULES = {
    "api": ("RunResult", "evaluate", "fork", "load_model", "plan", "run", "train_phase"),
    "config": ("Recipe", "load_recipe"),
    "data.prepare": ("prepare_dataset",),
    "models.hybrid": ("build_hybrid", "extract_module", "grow"),
    "models.partition": ("Partition",),
    "models.surgery": ("assemble",),
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name == "errors":
        return import_module(".errors", __name__)
    for module, names in _MODULES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f".{module}", __name__), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names, including those that are not loaded yet."""
    return sorted({*globals(), *__all__})
