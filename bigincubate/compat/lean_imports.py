"""Import a library without packages that it imports and that are not used here."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


class DeferredModule(ModuleType):
    """A module that is imported when something in it is first used."""

    def __getattr__(self, name: str) -> Any:
        """Import the module and return one of its attributes."""
        if name.startswith("__") and name != "__path__":  # asked of all modules by the inspect module, for example
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        module = importlib.import_module(self.__name__)
        package, _, part = self.__name__.rpartition(".")
        setattr(sys.modules[package], part, module)
        return getattr(module, name)


@contextmanager
def replaced_modules(modules: dict[str, ModuleType | None]) -> Iterator[None]:
    """Let imports find these modules while the block runs; None lets them fail. Modules that were imported are kept."""
    added = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(added)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name, module in added.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
