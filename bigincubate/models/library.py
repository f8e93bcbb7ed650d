"""Look up the family of a recipe's model."""

from __future__ import annotations

from ..config import ModelConfig
from ..config.objects import load_object
from ..errors import ConfigError
from .base import ModelFamily
from .language.families import find_transformers_family
from .vision.families import find_timm_family


def find_family(model: ModelConfig) -> ModelFamily:
    """Return the family of a recipe's model.

    ``model.library`` is ``"timm"``, ``"transformers"``, or a function ``"package.module:function"`` that takes the
    model settings and returns a `ModelFamily`.

    Raises:
        ConfigError: The library cannot be loaded, or it does not support the model.
    """
    if model.library == "timm":
        return find_timm_family(model.name)
    if model.library == "transformers":
        return find_transformers_family(model.name)
    family = load_object(model.library, "model", key="model.library")(model)
    if not isinstance(family, ModelFamily):
        raise ConfigError(
            f"model.library = {model.library!r}: the function returned {type(family).__name__}, not a ModelFamily"
        )
    return family
