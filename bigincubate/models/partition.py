"""Map tensors and blocks to modules, by index arithmetic on a model's parameter names.

*Depths* are the number of blocks that each module has in each stage: one inner tuple per module, one entry per stage.
The depths of the target, the meta model and every hybrid have the same shape, so a tensor is identified in all of them
by its module and its *local* name, in which block indices start at the module's first block in the stage.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

from ..errors import ArtifactError, ConfigError, check_integer, format_count
from .base import Depths, ModelFamily

if TYPE_CHECKING:
    from torch import nn


class BlockRef(NamedTuple):
    """One block of a model.

    Attributes:
        module: The module that it belongs to.
        stage: Its stage.
        index_in_stage: Its index in the stage.
        index_in_module: Its index among the module's blocks in that stage.
        path: Its path in the model, such as ``blocks.7``.
    """

    module: int
    stage: int
    index_in_stage: int
    index_in_module: int
    path: str


def normalize_depths(value: Sequence[int | Sequence[int]], stages: int, what: str = "depths") -> Depths:
    """Return depths as nested tuples.

    Args:
        value: ``[3, 3, 3, 3]`` (one stage), or ``[[2, 2, 6, 0], ...]`` (one number per stage).
        stages: Number of stages of the family.
        what: Name of the setting, for messages.

    Raises:
        ConfigError: The value is not a list of non-negative integers, or has the wrong number of stages.
    """
    if not value:
        raise ConfigError(f"{what} is empty: set the depth of each module")
    modules: list[tuple[int, ...]] = []
    for index, entry in enumerate(value):
        row = tuple(entry) if isinstance(entry, (list, tuple)) else (entry,)
        if any(isinstance(depth, bool) or not isinstance(depth, int) or depth < 0 for depth in row):
            raise ConfigError(f"{what}: module {index} is {entry}; depths must be non-negative integers")
        if len(row) != stages:
            form = "one depth" if stages == 1 else f"a list of {stages} depths, one per stage"
            raise ConfigError(f"{what}: module {index} is {entry}; this model needs {form} for each module")
        modules.append(row)
    return tuple(modules)


def show_depths(depths: Depths) -> list[int | list[int]]:
    """Return depths in the format of recipes: per module, one number or a list with one number per stage."""
    return [list(row) if len(row) > 1 else row[0] for row in depths]


def hybrid_depths(target: Depths, meta: Depths, module: int) -> Depths:
    """Return the meta model's depths with one module at its target depth."""
    return (*meta[:module], target[module], *meta[module + 1 :])


@lru_cache
def _patterns(family: ModelFamily) -> tuple[re.Pattern[str], re.Pattern[str] | None]:
    """Return a pattern for tensors in a block (groups stage, block, rest), and one for other tensors of a stage."""
    block = re.escape(family.block).replace(r"\{stage\}", r"(?P<stage>\d+)")
    block = block.replace(r"\{block\}", r"(?P<block>\d+)") + r"\.(?P<rest>.+)"
    head, staged, _ = family.block.partition("{stage}")
    return re.compile(block), re.compile(re.escape(head) + r"(?P<stage>\d+)\..+") if staged else None


@dataclass(frozen=True)
class Partition:
    """The partition of one model into modules: its family and depths.

    Module 0 owns the stem, module K-1 the tail (final norm, pooling, head). Layers of a stage outside its blocks (such
    as down-sampling, which timm puts at the *start* of a stage) belong to the module with the stage's first block.

    Attributes:
        family: The model's family.
        depths: Number of blocks per module and stage.

    Raises:
        ConfigError: The depths do not divide the sequence of blocks into contiguous modules.
    """

    family: ModelFamily
    depths: Depths

    def __post_init__(self) -> None:
        check_layout(self.family, self.depths)

    @classmethod
    def from_model(
        cls, model: nn.Module, *, modules: int | None = None, depths: Sequence[int | Sequence[int]] | None = None
    ) -> Partition:
        """Return a partition of an existing timm model.

        Args:
            model: A timm model of a supported family.
            modules: Number of modules, of (almost) equal depth, for a model without stages; by default 1, or as many as
                ``depths`` has.
            depths: Number of blocks of each module instead: ``[3, 3, 3, 3]``, or per module a list with one number per
                stage.

        Raises:
            ConfigError: The family is not supported, the depths do not add up to the model's, or the model has stages
                and ``depths`` is missing.

        Example:
            >>> bi.Partition.from_model(timm.create_model("vit_small_patch16_224"), modules=4).depths
            ((3,), (3,), (3,), (3,))
        """
        from torch import nn

        from .vision.build import check_timm_model
        from .vision.families import find_timm_family

        name = type(model).__name__
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model is a {name}; pass a timm model")
        if modules is not None:
            check_integer("modules", modules)
        family = find_timm_family(name, model)
        check_timm_model(model, name)
        found = family.count_blocks(model.state_dict())
        number = modules or 1
        if depths is None and number > 1 and family.stages > 1:
            raise ConfigError(
                f"{name} has {family.stages} stages: use Partition.from_model(model, depths=...), with a list of"
                f" {family.stages} depths for each module"
            )
        if depths is None:
            return cls(family, find_balanced_cut([[1] * found[0]], number) if number > 1 else (found,))
        if modules is not None and modules != len(depths):
            raise ConfigError(f"modules = {modules}, but depths lists {len(depths)}; leave one of them out")
        partition = cls(family, normalize_depths(depths, family.stages))
        if partition.stage_depths != found:
            raise ConfigError(
                f"depths = {depths} have {partition.stage_depths} blocks per stage, the model has {found}"
            )
        return partition

    @property
    def modules(self) -> int:
        """Return K, the number of modules."""
        return len(self.depths)

    @cached_property
    def stage_depths(self) -> tuple[int, ...]:
        """Return the number of blocks of each stage."""
        return tuple(sum(column) for column in zip(*self.depths, strict=True))

    @cached_property
    def _starts(self) -> Depths:
        columns = [tuple(accumulate(column, initial=0))[:-1] for column in zip(*self.depths, strict=True)]
        return tuple(zip(*columns, strict=True))

    @cached_property
    def _starts_in_stage(self) -> Depths:
        return tuple(zip(*self._starts, strict=True))

    def start(self, module: int, stage: int) -> int:
        """Return the index in the stage of the module's first block."""
        return self._starts[module][stage]

    def block_path(self, module: int, stage: int, index_in_module: int) -> str:
        """Return the path of a block of a module, such as ``blocks.7``."""
        return self.family.block_path(stage, self.start(module, stage) + index_in_module)

    def blocks(self) -> Iterator[BlockRef]:
        """Yield all blocks in the order of execution."""
        for module, depths in enumerate(self.depths):
            for stage, depth in enumerate(depths):
                for index in range(depth):
                    path = self.block_path(module, stage, index)
                    yield BlockRef(module, stage, self.start(module, stage) + index, index, path)

    def block_of(self, name: str) -> BlockRef | None:
        """Return the block of a parameter or buffer; None if it is in the stem, in the tail or between blocks.

        Raises:
            ArtifactError: This model has no block with that index.
        """
        match = _patterns(self.family)[0].fullmatch(name)
        if match is None:
            return None
        stage, index = int(match.groupdict().get("stage", 0)), int(match["block"])
        path = self.family.block_path(stage, index)
        if stage < self.family.stages and index < self.stage_depths[stage]:
            module = bisect_right(self._starts_in_stage[stage], index) - 1
            return BlockRef(module, stage, index, index - self.start(module, stage), path)
        raise ArtifactError(f"tensor {name!r}: this model of depths {show_depths(self.depths)} has no block {path}")

    def owner(self, name: str) -> int:
        """Return the module that a parameter or persistent buffer belongs to.

        Non-persistent buffers do not belong to a module: each model computes them.

        Raises:
            ArtifactError: A model of this family and depths has no such tensor.
        """
        if block := self.block_of(name):
            return block.module
        stage_pattern = _patterns(self.family)[1]
        if stage_pattern and (match := stage_pattern.fullmatch(name)) and int(match["stage"]) < self.family.stages:
            stage = int(match["stage"])
            return next(module for module, depths in enumerate(self.depths) if depths[stage])
        owners = dict.fromkeys(self.family.stem, 0) | dict.fromkeys(self.family.tail, self.modules - 1)
        prefixes = [prefix for prefix in owners if f"{name}.".startswith(f"{prefix}.")]
        if prefixes:
            return owners[max(prefixes, key=len)]
        raise ArtifactError(f"tensor {name!r} is not part of a {self.family.name} model")

    def is_boundary(self, name: str) -> bool:
        """Return whether a tensor belongs to the stem or the tail: it lies in no block and in no stage.

        Raises:
            ArtifactError: A model of this family and depths has no such tensor.
        """
        self.owner(name)
        stage_pattern = _patterns(self.family)[1]
        return self.block_of(name) is None and not (stage_pattern and stage_pattern.fullmatch(name))

    def to_local_name(self, name: str) -> tuple[int, str]:
        """Return the module and local name of a tensor; local block indices start at the module's first block."""
        block = self.block_of(name)
        if block is None:
            return self.owner(name), name
        return block.module, self.family.block_path(block.stage, block.index_in_module) + name[len(block.path) :]

    def to_global_name(self, module: int, local_name: str) -> str:
        """Return the name of a module's tensor in this model; the inverse of `to_local_name`.

        Raises:
            ArtifactError: The module has no such tensor.
        """
        name = local_name
        if match := _patterns(self.family)[0].fullmatch(local_name):
            stage, index = int(match.groupdict().get("stage", 0)), int(match["block"])
            if stage < self.family.stages:
                name = f"{self.block_path(module, stage, index)}.{match['rest']}"
        if self.owner(name) != module:
            raise ArtifactError(f"module {module} of depths {self.depths[module]} has no tensor {local_name!r}")
        return name


def check_layout(family: ModelFamily, depths: Depths, what: str = "depths") -> None:
    """Check that each module and each stage has blocks, and that the modules are in the order of execution.

    Args:
        family: The model's family.
        depths: Number of blocks per module and stage.
        what: Name of the setting, for messages.

    Raises:
        ConfigError: The depths are invalid; the message names the module or stage.
    """
    last = 0
    for module, row in enumerate(depths):
        assert len(row) == family.stages, "depths come from normalize_depths"
        stages = [stage for stage, depth in enumerate(row) if depth]
        if not stages:
            raise ConfigError(f"{what}: module {module} has no blocks; each module needs at least one")
        if stages[0] < last:
            raise ConfigError(
                f"{what}: module {module} starts in stage {stages[0]}, but module {module - 1} ends in stage {last}; "
                "each module must start where the one before it ends, or later"
            )
        last = stages[-1]
    for stage, total in enumerate(map(sum, zip(*depths, strict=True))):
        if not total:
            raise ConfigError(f"{what}: stage {stage} has no blocks; each stage needs at least one")


def check_depths(family: ModelFamily, target: Depths, meta: Depths) -> None:
    """Check that a meta model fits a target: same modules and stages, no module deeper, starts of equal parity.

    Each module then starts at an index of the same parity in every hybrid, so blocks compute the same when an earlier
    module changes its depth.

    Raises:
        ConfigError: The meta model does not fit; the message names the module, the stage and the remedy.
    """
    check_layout(family, target, "target_depths")
    check_layout(family, meta, "meta_depths")
    if len(target) != len(meta):
        raise ConfigError(
            f"target_depths has {format_count(len(target), 'module')}, but meta_depths has {len(meta)}; use equal"
            " numbers"
        )
    for module, (deep, shallow) in enumerate(zip(target, meta, strict=True)):
        for stage, (large, small) in enumerate(zip(deep, shallow, strict=True)):
            where = f"module {module}" + (f", stage {stage}" if family.stages > 1 else "")
            if bool(large) != bool(small):
                raise ConfigError(
                    f"{where}: target depth {large}, meta depth {small}; the meta model must have blocks exactly where "
                    "the target has blocks"
                )
            if small > large:
                raise ConfigError(f"{where}: meta depth {small} must not be larger than target depth {large}")
    deep_partition, shallow_partition = Partition(family, target), Partition(family, meta)
    for block in shallow_partition.blocks():
        starts = [p.start(block.module, block.stage) for p in (deep_partition, shallow_partition)]
        if (starts[0] - starts[1]) % family.parity:
            raise ConfigError(
                f"module {block.module} starts stage {block.stage} at block {starts[0]} in the target and at block "
                f"{starts[1]} in the meta model; what a {family.name} block computes depends on its index modulo "
                f"{family.parity}, so the two must differ by a multiple of {family.parity}: change a depth of module "
                f"{block.module - 1} in stage {block.stage} by one"
            )


def default_meta_depths(target: Depths, parity: int) -> Depths:
    """Return the smallest meta depths that fit a target: one block per module and stage.

    If another module follows in the same stage, the depth is congruent to the target's modulo ``parity``, so that
    the next module starts with the same parity: for Swin, 2 blocks if the target's depth is even, 1 if it is odd.
    """
    return tuple(
        tuple(
            (depth % parity or parity) if depth and any(row[stage] for row in target[module + 1 :]) else min(depth, 1)
            for stage, depth in enumerate(depths)
        )
        for module, depths in enumerate(target)
    )


def find_balanced_cut(costs: Sequence[Sequence[int]], modules: int, parity: int = 1) -> Depths:
    """Divide the blocks into contiguous modules so that the cost of the most expensive module is minimal.

    Among equal solutions, take the one with the smallest sum of squared costs, then the one with the earliest cuts,
    because a block costs less to incubate in a later module.

    Args:
        costs: The cost of each block, one list per stage, in any unit (`ModelFamily.count_block_flops` gives FLOPs).
        modules: Number of modules.
        parity: Within a stage, modules start only at block indices that are a multiple of this number.

    Raises:
        ConfigError: The model cannot be divided into this many modules.
    """
    blocks = [(stage, index) for stage, row in enumerate(costs) for index in range(len(row))]
    total = list(accumulate((cost for row in costs for cost in row), initial=0))
    boundaries = [at for at, (_, index) in enumerate(blocks) if index % parity == 0] + [len(blocks)]
    if not 1 <= modules < len(boundaries):
        raise ConfigError(f"plan.modules = {modules}: this model can have 1 to {len(boundaries) - 1} modules")

    costs_before = [total[at] for at in boundaries]
    largest = _smallest_limit(costs_before, modules)
    chosen = _most_equal_boundaries(costs_before, modules, largest)
    pieces = [Counter(stage for stage, _ in blocks[boundaries[i] : boundaries[j]]) for i, j in pairwise(chosen)]
    return tuple(tuple(piece[stage] for stage in range(len(costs))) for piece in pieces)


def _smallest_limit(costs_before: Sequence[int], pieces: int) -> int:
    """Return the smallest possible cost of the most expensive of ``pieces`` intervals, by bisection.

    Args:
        costs_before: The total cost before each boundary, in increasing order.
        pieces: Number of intervals.
    """

    def needs_more(limit: int) -> bool:
        at = 0
        for _ in range(pieces):
            at = bisect_right(costs_before, costs_before[at] + limit) - 1
        return at < len(costs_before) - 1

    limits = range(max(b - a for a, b in pairwise(costs_before)), costs_before[-1] - costs_before[0] + 1)
    return limits[bisect_left(limits, True, key=lambda limit: not needs_more(limit))]


def _most_equal_boundaries(costs_before: Sequence[int], pieces: int, limit: int) -> list[int]:
    """Return the boundaries of intervals with the smallest sum of squared costs, and of equal ones the earliest.

    Args:
        costs_before: The total cost before each boundary, in increasing order.
        pieces: Number of intervals.
        limit: The highest cost of an interval.

    Returns:
        Indices of ``pieces + 1`` boundaries, from the first to the last.
    """
    end = len(costs_before) - 1
    first, last = [end], [0]  # the first boundary before the last n intervals, and the last one after the first n
    for _ in range(pieces):
        first.append(bisect_left(costs_before, costs_before[first[-1]] - limit))
        last.append(bisect_right(costs_before, costs_before[last[-1]] + limit) - 1)
    best: dict[int, int] = {end: 0}  # the smallest sum of squares from a boundary to the end
    following: list[dict[int, int]] = []  # for each interval, from the last one, its end by its start
    for left in range(1, pieces + 1):
        sums, ends = {}, {}
        for i in range(max(first[left], pieces - left), min(last[pieces - left], end - left) + 1):
            reach = bisect_right(costs_before, costs_before[i] + limit)
            options = (
                (best[j] + (costs_before[j] - costs_before[i]) ** 2, j) for j in range(i + 1, reach) if j in best
            )
            if found := min(options, default=None):
                sums[i], ends[i] = found
        best = sums
        following.append(ends)
    chosen = [0]
    for ends in reversed(following):
        chosen.append(ends[chosen[-1]])
    return chosen
