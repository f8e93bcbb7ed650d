"""Check the values of a configuration's arguments, because transformers does not check them."""

from __future__ import annotations

import difflib
import json
import math
from typing import Any

from ...errors import ConfigError

OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "n_inner")  # sizes whose defaults are computed from other sizes
ACTIVATIONS = ("hidden_act", "activation_function")


def check_value(key: str, value: Any, default: Any) -> None:
    """Check that a value has the type of the default and is in the valid range.

    Args:
        key: The key of ``model.args``.
        value: Its value.
        default: The default value in transformers' configuration.

    Raises:
        ConfigError: The value is invalid; the message says what is expected.
    """
    if value is None and default is None:
        return
    is_integer = type(value) is int
    if isinstance(default, bool):
        valid, expected = isinstance(value, bool), "expected true or false"
    elif key.endswith("_token_id"):
        valid, expected = is_integer and value >= 0, "expected an integer of 0 or more"
    elif isinstance(default, int) or key in OPTIONAL_SIZES:
        valid, expected = is_integer and value >= 1, "expected a positive integer"
    elif isinstance(default, float):
        valid = (is_integer or isinstance(value, float)) and 0 < value < math.inf
        expected = "expected a positive number"
    elif isinstance(default, str):
        valid, expected = isinstance(value, str), "expected text"
        if valid and key in ACTIVATIONS:
            valid, expected = _check_activation(value)
    else:
        return
    if not valid:
        raise ConfigError(f"model.args.{key} = {json.dumps(value, default=str)}: {expected}")


def _check_activation(name: str) -> tuple[bool, str]:
    """Return whether transformers has an activation of this name, and the text of the error if it does not."""
    from transformers.activations import ACT2FN

    near = difflib.get_close_matches(name, ACT2FN, n=1)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(ACT2FN))}"
    return name in ACT2FN, f"transformers has no such activation; {hint}"
