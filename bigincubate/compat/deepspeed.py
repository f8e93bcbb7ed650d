"""Uses of private parts of DeepSpeed's ZeRO optimizers. DeepSpeed is imported only by :func:`import_deepspeed`."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import MissingDependencyError


class FlatSlice(NamedTuple):
    """Elements ``offset`` to ``offset + length`` of a parameter, stored from ``start`` in a flat fp32 tensor.

    Attributes:
        parameter: The model's parameter.
        offset: Index of the first element in the flattened parameter; may be negative if ``length`` is not positive.
        length: Number of elements; not positive if this rank has none of the parameter.
        flat: One-dimensional fp32 master tensor of this rank.
        start: Index of the first element in ``flat``.
    """

    parameter: nn.Parameter
    offset: int
    length: int
    flat: Tensor
    start: int


def import_deepspeed(device_type: str) -> Any:
    """Import DeepSpeed for ``device_type`` without its warnings and log messages.

    Raises:
        MissingDependencyError: DeepSpeed is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    logger = logging.getLogger("DeepSpeed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
    except ImportError as error:
        raise MissingDependencyError(
            f"sharding.strategy = \"zero…\" needs DeepSpeed ({error}): pip install 'bigincubate[deepspeed]'"
        ) from None
    logger.setLevel(logging.CRITICAL)
    # disable a shared-memory all-reduce for inference, which all ranks would compile at the same time
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def flat_slices(zero: Any, stage: int, rank: int) -> Iterator[FlatSlice]:
    """Yield the position of each parameter's fp32 master copy on ``rank``.

    Args:
        zero: The ZeRO optimizer that ``deepspeed.initialize`` returned.
        stage: ZeRO stage. In stages 1 and 2, a rank has one slice of each group's concatenated parameters; in stage 3,
            it has one part of each parameter.
        rank: This rank.
    """
    return _parameter_parts(zero, rank) if stage == 3 else _group_slices(zero, rank)


def _group_slices(zero: Any, rank: int) -> Iterator[FlatSlice]:
    for index, flat in enumerate(zero.single_partition_of_fp32_groups):
        low = rank * zero.partition_size[index]
        high = low + zero.partition_size[index]
        placed = zip(zero.round_robin_bit16_groups[index], zero.round_robin_bit16_offsets[index], strict=True)
        for parameter, begin in placed:
            first, last = max(low, begin), min(high, begin + parameter.numel())
            yield FlatSlice(parameter, first - begin, last - first, flat, first - low)


def _parameter_parts(zero: Any, rank: int) -> Iterator[FlatSlice]:
    for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        start = 0
        for parameter in group:
            size = parameter.partition_numel()
            offset = rank * size
            yield FlatSlice(parameter, offset, min(size, parameter.ds_numel - offset), flat, start)
            start += size


@torch.no_grad()
def sync_weights_from_master(zero: Any, stage: int) -> None:
    """Copy the fp32 master tensors into the weights that the model computes with. Collective."""
    if stage < 3:
        zero.update_lp_params()
        return
    zero._partition_all_parameters()
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    if persistent := zero.persistent_parameters:
        persistent[0].all_gather(persistent)
