"""Uses of private parts of fairscale's OSS. fairscale is imported only by :func:`import_fairscale`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import MissingDependencyError


def import_fairscale() -> tuple[Any, Any]:
    """Import fairscale and return its classes ``OSS`` and ``ShardedDataParallel``.

    Raises:
        MissingDependencyError: fairscale is not installed.
    """
    try:
        from fairscale.nn.data_parallel import ShardedDataParallel
        from fairscale.optim import OSS
    except ImportError as error:
        raise MissingDependencyError(
            f"sharding.strategy = \"oss\" needs fairscale ({error}): pip install 'bigincubate[fairscale]'"
        ) from None
    return OSS, ShardedDataParallel


def owner_rank(oss: Any, parameter: Tensor) -> int:
    """Return the rank that holds the optimizer state of ``parameter``."""
    rank: int = oss._param_to_rank[parameter]
    return rank
