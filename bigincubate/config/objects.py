"""Load an object that a recipe or an environment variable names as ``package.module:attribute``."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import ConfigError

OBJECT_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


def load_object(name: str, *arguments: str, key: str) -> Any:
    """Return the function or class that ``name`` refers to, importing its module.

    Args:
        name: ``"package.module:attribute"``.
        arguments: Names of the positional arguments that it will be called with; without any, they are not checked.
        key: The recipe key or environment variable with the value ``name``, for the error message.

    Raises:
        ConfigError: ``name`` is malformed, its module cannot be imported, or has no function or class of this name that
            takes these arguments.
    """
    if not OBJECT_NAME.fullmatch(name):
        raise ConfigError(f"{key} = {name!r}: expected package.module:attribute, such as mypackage.extras:MyClass")
    module, _, attribute = name.partition(":")
    try:
        loaded = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{key} = {name!r}: cannot import {module} ({error}); correct the name, or add its folder to PYTHONPATH"
        ) from None
    if not hasattr(loaded, attribute):
        raise ConfigError(f"{key} = {name!r}: {module} has no attribute {attribute!r}; correct the name")
    if not callable(found := getattr(loaded, attribute)):
        raise ConfigError(f"{key} = {name!r}: this is a {type(found).__name__}, expected a function or a class")
    if arguments and not _takes(found, arguments):
        raise ConfigError(f"{key} = {name!r}: it cannot be called with ({', '.join(arguments)}); correct the name")
    return found


def _takes(function: Callable[..., Any], arguments: Sequence[str]) -> bool:
    """Return whether a function can be called with these arguments, as far as its signature is known."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some built-in functions have none
        return True
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True
