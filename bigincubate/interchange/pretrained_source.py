"""What is known of a pretrained model: the recipe key that names it, and its tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class PretrainedSource(NamedTuple):
    """A recipe key that names a pretrained model. As text, it begins an error message: ``meta.init = 'x'``.

    Attributes:
        key: The key.
        init: Its value: a path, or the name of a model in a hub.
    """

    key: str
    init: str

    def __str__(self) -> str:
        """Return the key with its value."""
        return f"{self.key} = {self.init!r}"


class PretrainedModel(NamedTuple):
    """The tensors of a pretrained model, with their names in this package.

    Attributes:
        tensors: The tensors by name. If the model has no head of the right shape, they include a new one.
        head: Names of the tensors of its head, if it may be replaced by one with other outputs.
        records: Properties of the records that it was trained on, such as the names of classes, if they are known.
    """

    tensors: dict[str, Tensor]
    head: tuple[str, ...]
    records: dict[str, Any]
