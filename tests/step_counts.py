"""Count what a rank does in an optimizer step: operators, collectives, and reads of tensors by the host."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# On a GPU, the host waits for the device in these, because their results, or the shapes of these, depend on values.
READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "bincount", "repeat_interleave"}
COPIES = {"cpu", "numpy", "tolist"}  # on the CPU these call no operator
TORCH = str(Path(torch.__file__).parent)


class StepCounter(TorchDispatchMode):
    """Count operators while the context is active.

    Attributes:
        operators: Calls by name of the operator, including collectives.
        reads: Calls for which the host would wait for a GPU, by ``file.py:function`` of the caller outside of torch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self._copies = CopyCounter(self.reads)

    def __enter__(self) -> StepCounter:
        self._copies.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._copies.__exit__(*error)

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        name = operator._schema.name.partition("::")[2]
        self.operators[name] += 1
        if name in READS or (name.startswith("index") and _has_mask(arguments)):
            self.reads[_caller()] += 1
        return operator(*arguments, **(options or {}))


class CopyCounter(TorchFunctionMode):
    """Count calls of ``Tensor.cpu``, ``Tensor.numpy`` and ``Tensor.tolist`` in ``reads``."""

    def __init__(self, reads: Counter[str]) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__name__", "") in COPIES:
            self.reads[_caller()] += 1
        return function(*arguments, **(options or {}))


def _has_mask(arguments: tuple[Any, ...]) -> bool:
    """Return whether a boolean tensor selects elements: the shape of the result then depends on its values."""
    indices = arguments[1] if len(arguments) > 1 and isinstance(arguments[1], (list, tuple)) else ()
    return any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)


def _caller() -> str:
    """Return ``file.py:function`` of the innermost frame that is neither in torch nor here."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith((TORCH, "<"))
    ):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"
