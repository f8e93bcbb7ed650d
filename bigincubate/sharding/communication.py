"""Numbers of elements that a rank holds and sends in a step under each strategy, to estimate memory and traffic.

A :data:`LocalNumel` function returns how many elements of each tensor a rank holds. A :class:`StrategyLayout` has one
such function for weights, one for gradients, one for optimizer state and so on. The layouts describe the measured
behavior of the libraries, which in places differs from their documentation;
``tests/distributed/test_planned_memory.py`` compares each layout with two real ranks.

Traffic is counted as *payload*: the full tensors of a rank's collectives, including padding. This is the buffer of an
all-reduce, reduce or broadcast, the input of a reduce-scatter and the output of an all-gather. On W ranks, a ring
algorithm sends 2 * (W - 1) / W of the payload over each rank's link for an all-reduce, and (W - 1) / W for the other
collectives. Norms and flags (a few bytes each) are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..optim.state_size import ParamInfo

FAIRSCALE_BUCKET_NUMEL = 2**23  # elements; size of fairscale's bucket of gradients for each owner
DEEPSPEED_ALIGNMENT = 2  # elements: DeepSpeed pads a rank's slice of a group to a multiple of this

# takes tensors, world size and rank; returns the number of elements of each tensor on that rank
LocalNumel = Callable[[Sequence[ParamInfo], int, int], list[int]]
# takes all tensors, trainable tensors by block (first the tensors outside of blocks) and world size; returns the number
# of elements that are gathered at the same time
GatheredNumel = Callable[[Sequence[ParamInfo], Sequence[Sequence[ParamInfo]], int], int]


def replicated(tensors: Sequence[ParamInfo], world: int, rank: int) -> list[int]:
    """Return the full size of each tensor, which every rank holds."""
    return [math.prod(tensor.shape) for tensor in tensors]


def absent(tensors: Sequence[ParamInfo], world: int, rank: int) -> list[int]:
    """Return zero for each tensor, which no rank holds."""
    return [0] * len(tensors)


def dim0_shard(tensors: Sequence[ParamInfo], world: int, rank: int) -> list[int]:
    """Return the sizes of FSDP2's shards: equal chunks of dimension 0, the last ones smaller or empty."""
    sizes = []
    for tensor in tensors:
        chunk = -(-tensor.shape[0] // world)
        rows = min(max(tensor.shape[0] - rank * chunk, 0), chunk)
        sizes.append(rows * math.prod(tensor.shape[1:]))
    return sizes


def padded_even_shard(tensors: Sequence[ParamInfo], world: int, rank: int) -> list[int]:
    """Return the sizes of ZeRO-3's shards: an equal part of each tensor, padded."""
    return [-(-size // world) for size in replicated(tensors, world, rank)]


def flat_slice(tensors: Sequence[ParamInfo], world: int, rank: int) -> list[int]:
    """Return the sizes in ZeRO-1 and 2, where a rank has an equal slice of each group's concatenated tensors."""
    sizes = replicated(tensors, world, rank)
    totals: dict[int, int] = {}
    starts = []
    for tensor, size in zip(tensors, sizes, strict=True):
        starts.append(totals.get(tensor.group, 0))
        totals[tensor.group] = starts[-1] + size
    align = DEEPSPEED_ALIGNMENT
    length = {group: align * -(-total // (align * world)) for group, total in totals.items()}
    return [
        max(0, min(start + size, (rank + 1) * length[tensor.group]) - max(start, rank * length[tensor.group]))
        for tensor, start, size in zip(tensors, starts, sizes, strict=True)
    ]


def grads_touching_slice(tensors: Sequence[ParamInfo], world: int, rank: int) -> list[int]:
    """Return the gradient sizes in ZeRO-1 and 2: a full gradient for each tensor that overlaps the rank's slice."""
    parts, sizes = flat_slice(tensors, world, rank), replicated(tensors, world, rank)
    return [size if part else 0 for part, size in zip(parts, sizes, strict=True)]


def assign_owners(tensors: Sequence[ParamInfo], world: int) -> list[int]:
    """Return the rank that owns each tensor in fairscale, which chooses the rank with the fewest elements so far."""
    load = [0] * world
    owners = []
    for size in replicated(tensors, world, 0):
        owners.append(load.index(min(load)))
        load[owners[-1]] += size
    return owners


def owned_only(tensors: Sequence[ParamInfo], world: int, rank: int) -> list[int]:
    """Return the sizes of tensors that fairscale keeps only on their owner."""
    owners, sizes = assign_owners(tensors, world), replicated(tensors, world, rank)
    return [size if owner == rank else 0 for size, owner in zip(sizes, owners, strict=True)]


def bucketed_grads(tensors: Sequence[ParamInfo], world: int, rank: int) -> list[int]:
    """Return the gradient sizes in fairscale.

    Every rank has one bucket for each owner, which is filled in order of tensor size. If a gradient does not fit into
    the bucket, only the owner keeps it.
    """
    sizes, owners = replicated(tensors, world, rank), assign_owners(tensors, world)
    filled, kept = [0] * world, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=sizes.__getitem__):
        size, owner = sizes[index], owners[index]
        fits = filled[owner] + size < FAIRSCALE_BUCKET_NUMEL
        filled[owner] += size * fits
        kept[index] = size if fits or owner == rank else 0
    return kept


@dataclass(frozen=True)
class CollectiveCost:
    """One kind of collective in an optimizer step.

    Attributes:
        kind: Name of the collective.
        numel: Number of elements of each tensor on a rank.
        tensors: The tensors on which it runs: ``"trainable"`` or ``"all"``.
        times: Number of runs per ``per``.
        per: ``"step"`` or ``"micro_batch"``.
    """

    kind: Literal["all_reduce", "reduce", "reduce_scatter", "all_gather", "broadcast"]
    numel: LocalNumel
    tensors: Literal["trainable", "all"] = "trainable"
    times: int = 1
    per: Literal["step", "micro_batch"] = "step"

    def payload_numel(self, tensors: Sequence[ParamInfo], world: int) -> int:
        """Return the payload of one run in elements. Shards are padded to equal size."""
        return sum(self.numel(tensors, world, 0)) * (1 if self.numel is replicated else world)


@dataclass(frozen=True)
class StrategyLayout:
    """The parts of tensors that a rank holds, and the collectives of a step.

    Attributes:
        weights: Trainable weights that the model computes with.
        frozen: Frozen weights.
        gradients: Gradients after the last backward.
        persistent_gradients: Whether memory for ``gradients`` stays allocated while full gradients are accumulated over
            micro-batches.
        optimizer_state: Optimizer state.
        masters: Master weights that the optimizer updates, if the model computes with a copy.
        average: Moving average of the weights.
        gathered: Full weights that are gathered temporarily, in addition to the shards.
        bucket_numel: Number of elements in communication buckets of fixed size.
        max_copied_numel: Maximum number of gradient elements that are copied to a send buffer.
        collectives: Collectives of a step.
    """

    weights: LocalNumel = replicated
    frozen: LocalNumel = replicated
    gradients: LocalNumel = replicated
    persistent_gradients: bool = False
    optimizer_state: LocalNumel = replicated
    masters: LocalNumel = absent
    average: LocalNumel = replicated
    gathered: GatheredNumel = lambda tensors, units, world: 0
    bucket_numel: int = 0
    max_copied_numel: int = 0
    collectives: tuple[CollectiveCost, ...] = ()


def gathered_two_blocks(tensors: Sequence[ParamInfo], units: Sequence[Sequence[ParamInfo]], world: int) -> int:
    """Return the elements that FSDP2 gathers at once: all tensors outside of blocks, and two blocks.

    The second block is the prefetched one.
    """
    sizes = [world * sum(dim0_shard(unit, world, 0)) for unit in units]
    return sizes[0] + sum(sorted(sizes[1:])[-2:])


def gathered_all_blocks(tensors: Sequence[ParamInfo], units: Sequence[Sequence[ParamInfo]], world: int) -> int:
    """Return the elements that FSDP2 gathers with several micro-batches: all, from the first to the last one."""
    return sum(world * sum(dim0_shard(unit, world, 0)) for unit in units)


def strategy_layouts(zero_section: dict[str, Any], phase: str, micro_batches: int) -> dict[str, StrategyLayout]:
    """Return the layout of each strategy by its name.

    - FSDP2 gathers a block in the forward and again in the backward. With several micro-batches, it gathers only in the
      first forward and the last backward; in between, all trainable weights stay gathered.
    - ZeRO-1 and 2 do not reduce-scatter: DeepSpeed all-reduces a full bucket of gradients and keeps a slice, at twice
      the cost. Stage 1 frees the gradients of other ranks' slices, as stage 2 does.
    - ZeRO-3 gathers frozen tensors too. Gathered weights are kept until the backward if they are reused within
      ``stage3_max_reuse_distance`` elements. The default of 10^9 is nearly always enough, so the full model is in
      memory and gathered once per micro-batch. DeepSpeed decides this only once, in the first forward. Fine-tuning
      first evaluates the assembled model, without a backward, and therefore gathers twice per micro-batch.
    - ZeRO-3 keeps full copies of tensors with at most ``stage3_param_persistence_threshold`` elements in addition to
      their shards, and gathers them once per step, after the update, frozen ones included. Its fp32 master weights are
      a second copy of the shards, although these are fp32 too.

    Args:
        zero_section: ``zero_optimization`` of the DeepSpeed configuration; empty for other strategies.
        phase: Name of the phase.
        micro_batches: Micro-batches per step on each rank.
    """
    limit = zero_section.get("stage3_param_persistence_threshold", 100_000)

    def shard_and_persistent(tensors: Sequence[ParamInfo], world: int, rank: int) -> list[int]:
        parts, sizes = padded_even_shard(tensors, world, rank), replicated(tensors, world, rank)
        return [part + size * (size <= limit) for part, size in zip(parts, sizes, strict=True)]

    def persistent(tensors: Sequence[ParamInfo], world: int, rank: int) -> list[int]:
        return padded_even_shard([tensor for tensor in tensors if math.prod(tensor.shape) <= limit], world, rank)

    def not_persistent(tensors: Sequence[ParamInfo], world: int, rank: int) -> list[int]:
        return padded_even_shard([tensor for tensor in tensors if math.prod(tensor.shape) > limit], world, rank)

    # stage 3 always has one bucket; stages 1 and 2 have buckets only during the backward, two if communication overlaps
    bucket = zero_section.get("reduce_bucket_size", 500_000_000)
    gathers_twice = phase == "finetune" or zero_section.get("stage3_max_reuse_distance", 10**9) == 0
    zero1 = StrategyLayout(
        gradients=grads_touching_slice,
        optimizer_state=flat_slice,
        masters=flat_slice,
        average=flat_slice,
        bucket_numel=2 * bucket if zero_section.get("overlap_comm") else bucket,
        collectives=(CollectiveCost("all_reduce", replicated), CollectiveCost("all_gather", flat_slice)),
    )
    return {
        "ddp": StrategyLayout(collectives=(CollectiveCost("all_reduce", replicated),)),
        "oss": StrategyLayout(
            gradients=bucketed_grads,
            optimizer_state=owned_only,
            collectives=(CollectiveCost("reduce", replicated), CollectiveCost("broadcast", replicated)),
        ),
        "fsdp2": StrategyLayout(
            weights=dim0_shard,
            gradients=dim0_shard,
            optimizer_state=dim0_shard,
            average=dim0_shard,
            gathered=gathered_two_blocks if micro_batches == 1 else gathered_all_blocks,
            collectives=(
                CollectiveCost("all_gather", dim0_shard, times=2),
                CollectiveCost("reduce_scatter", dim0_shard),
            ),
        ),
        "zero1": zero1,
        "zero2": zero1,
        "zero3": StrategyLayout(
            weights=shard_and_persistent,
            frozen=shard_and_persistent,
            gradients=padded_even_shard,
            persistent_gradients=True,
            optimizer_state=padded_even_shard,
            masters=padded_even_shard,
            average=padded_even_shard,
            gathered=lambda tensors, units, world: sum(size for size in replicated(tensors, 1, 0) if size > limit),
            bucket_numel=bucket,
            max_copied_numel=bucket,
            collectives=(
                CollectiveCost("all_gather", not_persistent, "all", times=2 if gathers_twice else 1, per="micro_batch"),
                CollectiveCost("all_gather", persistent, "all"),
                CollectiveCost("reduce_scatter", padded_even_shard),
            ),
        ),
    }
