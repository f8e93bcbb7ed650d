"""How much of each tensor a rank has, and what travels in a step, under each strategy: what plans are counted from.

A *share* says how many elements of each tensor a rank has; a strategy is a row of shares, which follows what the
libraries were seen to do, not what is said of them. A test holds every row to two real ranks.

What travels is counted as *payload*: the whole tensors that a rank's collectives work on, which is the buffer of an
all-reduce, a reduce or a broadcast, the input of a reduce-scatter and the output of an all-gather, padding included.
(Of that a ring sends 2·(W-1)/W through each rank's link for an all-reduce, (W-1)/W for the others.) Norms and flags, a
few bytes each, are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..optim import Trained

BUCKET = 2**23  # elements of gradients that fairscale reduces together, for each owner
ALIGN = 2  # elements: DeepSpeed pads a group to a multiple of this for each rank

Share = Callable[[Sequence[Trained], int, int], list[int]]  # tensors, world, rank -> elements of each on that rank


def whole(tensors: Sequence[Trained], world: int, rank: int) -> list[int]:
    return [math.prod(tensor.shape) for tensor in tensors]


# all tensors; the trained ones by block, first those that are in none; world -> elements that are whole for a while
Gathered = Callable[[Sequence[Trained], Sequence[Sequence[Trained]], int], int]


def none(tensors: Sequence[Trained], world: int, rank: int) -> list[int]:
    return [0] * len(tensors)


def rows(tensors: Sequence[Trained], world: int, rank: int) -> list[int]:
    """FSDP2: chunks of the first dimension, of one height but for the last. A class token has one row, on rank 0."""
    found = []
    for tensor in tensors:
        chunk = -(-tensor.shape[0] // world)
        height = min(max(tensor.shape[0] - rank * chunk, 0), chunk)
        found.append(height * math.prod(tensor.shape[1:]))
    return found


def even(tensors: Sequence[Trained], world: int, rank: int) -> list[int]:
    """ZeRO-3: an equal part of each tensor, padded."""
    return [-(-size // world) for size in whole(tensors, world, rank)]


def slices(tensors: Sequence[Trained], world: int, rank: int) -> list[int]:
    """ZeRO-1 and 2: an equal slice of each group's tensors, laid end to end."""
    sizes = whole(tensors, world, rank)
    totals: dict[int, int] = {}
    starts = []
    for tensor, size in zip(tensors, sizes, strict=True):
        starts.append(totals.get(tensor.group, 0))
        totals[tensor.group] = starts[-1] + size
    length = {group: ALIGN * -(-total // (ALIGN * world)) for group, total in totals.items()}
    return [
        max(0, min(start + size, (rank + 1) * length[tensor.group]) - max(start, rank * length[tensor.group]))
        for tensor, start, size in zip(tensors, starts, sizes, strict=True)
    ]


def touched(tensors: Sequence[Trained], world: int, rank: int) -> list[int]:
    """ZeRO-1 and 2 keep whole the gradient of a tensor of which a rank's slice has any part."""
    parts, sizes = slices(tensors, world, rank), whole(tensors, world, rank)
    return [size if part else 0 for part, size in zip(parts, sizes, strict=True)]


def owners(tensors: Sequence[Trained], world: int) -> list[int]:
    """fairscale: each tensor goes to the rank that has least so far."""
    load = [0] * world
    found = []
    for size in whole(tensors, world, 0):
        found.append(load.index(min(load)))
        load[found[-1]] += size
    return found


def owned(tensors: Sequence[Trained], world: int, rank: int) -> list[int]:
    sizes = whole(tensors, world, rank)
    return [size if owner == rank else 0 for size, owner in zip(sizes, owners(tensors, world), strict=True)]


def bucketed(tensors: Sequence[Trained], world: int, rank: int) -> list[int]:
    """fairscale keeps a bucket for every owner on every rank, filled with the smallest tensors first; only of what does
    not fit in has the owner alone the gradient."""
    sizes, of = whole(tensors, world, rank), owners(tensors, world)
    filled, kept = [0] * world, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=sizes.__getitem__):
        size, owner = sizes[index], of[index]
        fits = filled[owner] + size < BUCKET
        filled[owner] += size * fits
        kept[index] = size if fits or owner == rank else 0
    return kept


@dataclass(frozen=True)
class Travel:
    """One kind of collective: which share of what makes its whole tensor, and how often in a step."""

    kind: Literal["all_reduce", "reduce", "reduce_scatter", "all_gather", "broadcast"]
    share: Share
    of: Literal["trained", "all"] = "trained"
    times: int = 1
    each: Literal["step", "micro_batch"] = "step"

    def payload(self, tensors: Sequence[Trained], world: int) -> int:
        """Elements a time. Shares of one size, padded, make the whole."""
        return sum(self.share(tensors, world, 0)) * (1 if self.share is whole else world)


@dataclass(frozen=True)
class Strategy:
    """Which share of what a rank has."""

    weights: Share = whole
    frozen: Share = whole
    gradients: Share = whole  # when the last backward is over
    standing: bool = False  # room for them is there all the time, beside whole ones that add up over micro-batches
    state: Share = whole  # of the optimizer
    masters: Share = none  # what is updated, where the model computes with something else
    average: Share = whole
    gathered: Gathered = lambda tensors, units, world: 0
    buckets: int = 0  # elements, of fixed size
    copied: int = 0  # elements at most: gradients copied once more to be sent
    travels: tuple[Travel, ...] = ()


def blocks(tensors: Sequence[Trained], units: Sequence[Sequence[Trained]], world: int) -> int:
    """FSDP2: what is in no block, and two blocks: the next is on its way while one computes."""
    sizes = [world * sum(rows(unit, world, 0)) for unit in units]
    return sizes[0] + sum(sorted(sizes[1:])[-2:])


def trainable(tensors: Sequence[Trained], units: Sequence[Sequence[Trained]], world: int) -> int:
    return sum(world * sum(rows(unit, world, 0)) for unit in units)


def strategies(config: dict[str, Any], phase: str, micro_batches: int) -> dict[str, Strategy]:
    """The rows, for DeepSpeed's ``zero_optimization`` and the number of micro-batches a step.

    - FSDP2 gathers a block in the forward and once more in the backward, and only in the first and the last of several
      micro-batches: in between everything that trains is whole.
    - ZeRO-1 and 2 do not reduce-scatter: DeepSpeed all-reduces a bucket of gradients whole and takes its slice, at
      twice the price. Stage 1 drops what it does not own as stage 2 does.
    - ZeRO-3 gathers frozen tensors as well. What it has gathered it keeps for the backward if that comes within
      ``stage3_max_reuse_distance`` elements, a thousand million where nothing is said: so nearly always, and then the
      whole model is there, gathered once a micro-batch. But what it decided in the first forward it never decides
      again, and fine-tuning evaluates the assembled model first, without a backward: there it gathers twice.
      Tensors up to ``stage3_param_persistence_threshold`` stay whole beside their shares; they are gathered once, after
      the update, the frozen ones too. fp32 masters are a second copy of the shares, though these are fp32 as well.
    """
    limit = config.get("stage3_param_persistence_threshold", 100_000)

    def kept(tensors: Sequence[Trained], world: int, rank: int) -> list[int]:
        sizes = whole(tensors, world, rank)
        return [part + size * (size <= limit) for part, size in zip(even(tensors, world, rank), sizes, strict=True)]

    def small(tensors: Sequence[Trained], world: int, rank: int) -> list[int]:
        return even([tensor for tensor in tensors if math.prod(tensor.shape) <= limit], world, rank)

    def large(tensors: Sequence[Trained], world: int, rank: int) -> list[int]:
        return even([tensor for tensor in tensors if math.prod(tensor.shape) > limit], world, rank)

    # stage 3 has one bucket all the time, the others have theirs during the backward, two to fill one while one is sent
    bucket = config.get("reduce_bucket_size", 500_000_000)
    again = phase == "finetune" or config.get("stage3_max_reuse_distance", 10**9) == 0
    sliced = Strategy(
        gradients=touched,
        state=slices,
        masters=slices,
        average=slices,
        buckets=2 * bucket if config.get("overlap_comm") else bucket,
        travels=(Travel("all_reduce", whole), Travel("all_gather", slices)),
    )
    return {
        "ddp": Strategy(travels=(Travel("all_reduce", whole),)),
        "oss": Strategy(gradients=bucketed, state=owned, travels=(Travel("reduce", whole), Travel("broadcast", whole))),
        "fsdp2": Strategy(
            weights=rows,
            gradients=rows,
            state=rows,
            average=rows,
            gathered=blocks if micro_batches == 1 else trainable,
            travels=(Travel("all_gather", rows, times=2), Travel("reduce_scatter", rows)),
        ),
        "zero1": sliced,
        "zero2": sliced,  # as stage 1 in all but name
        "zero3": Strategy(
            weights=kept,
            frozen=kept,
            gradients=even,
            standing=True,
            state=even,
            masters=even,
            average=even,
            gathered=lambda tensors, units, world: sum(size for size in whole(tensors, 1, 0) if size > limit),
            buckets=bucket,
            copied=bucket,
            travels=(
                Travel("all_gather", large, of="all", times=2 if again else 1, each="micro_batch"),
                Travel("all_gather", small, of="all"),
                Travel("reduce_scatter", even),
            ),
        ),
    }
