"""Estimate memory and communication per rank for each sharding strategy and world size, without training.

Weights, gradients and moving averages are fp32, as in the trainer. The size of the optimizer state is measured with one
step of the optimizer on fake tensors. DeepSpeed and fairscale are not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..config import PHASES, Recipe, Settings, ShardingConfig
from ..errors import ConfigError
from ..models.base import ModelFamily
from ..models.partition import Partition
from ..optim.state_size import ParamInfo, trainable_param_info
from ..sharding.communication import LocalNumel, StrategyLayout, replicated, strategy_layouts
from ..sharding.flat_lamb import flat_slice_optimizer
from ..sharding.zero_config import read_config, resolve_config_path
from .phases import PhasePlan, Plan, phase_model
from .planned_row import PlannedRow

FP32_BYTES = 4
STRATEGY_NAMES = tuple(strategy_layouts({}, "pretrain", 1))


@dataclass(frozen=True)
class RankFootprint:
    """Memory of the rank that needs the most, and its communication, for one strategy and world size, in bytes.

    Attributes:
        strategy: Name of the sharding strategy.
        world: Number of ranks.
        micro_batches: Number of micro-batches per step on each rank.
        samples: Number of samples per micro-batch.
        weights: Weights and buffers of the model.
        gradients: Gradients after the last backward pass; with several micro-batches, during accumulation.
        optimizer: Optimizer state.
        masters: fp32 master weights, if the model computes with a copy.
        average: Moving average of the weights.
        buckets: DeepSpeed's gradient buckets of fixed size (``reduce_bucket_size``), and the copy of the bucket that
            is being reduced.
        gathered: Complete weights gathered during forward and backward passes, in addition to the shards.
        activations: Activations saved for the backward pass of a micro-batch, and large temporary tensors
            (`ModelFamily.workspace_bytes`).
        total: Sum of all parts; an upper bound, because they are not all in memory at the same time.
        collectives: Payload per step for each kind of collective.
        sent: Total payload per step.
    """

    strategy: str
    world: int
    micro_batches: int
    samples: int
    weights: int
    gradients: int
    optimizer: int
    masters: int
    average: int
    buckets: int
    gathered: int
    activations: int
    total: int
    collectives: dict[str, int]
    sent: int


@dataclass(frozen=True)
class PhaseTensors:
    """The parameters of a phase's model.

    Attributes:
        trainable: Trainable parameters in the optimizer's order.
        flat: Trainable parameters in the order of ZeRO's optimizer; None if ZeRO does not support the optimizer.
        frozen: Frozen parameters.
        buffers: Size of the model's buffers in bytes.
        units: Trainable parameters of each block; the first entry has those outside of all blocks.
    """

    trainable: list[ParamInfo]
    flat: list[ParamInfo] | None
    frozen: list[ParamInfo]
    buffers: int
    units: list[list[ParamInfo]]


def phase_tensors(row: PhasePlan, settings: Settings, plan: Plan) -> PhaseTensors:
    """Return the parameters of a phase's model without allocating them."""
    model = phase_model(row, settings, plan.family, device="meta")
    trainable = trainable_param_info(model, settings)
    try:
        flat = trainable_param_info(model, settings, flat_slice_optimizer)
    except ConfigError:
        flat = None
    frozen = [
        ParamInfo(name, tuple(parameter.shape), -1, 0, 0)
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    ]
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    partition = Partition(plan.family, row.depths)
    units: dict[str, list[ParamInfo]] = {"": [], **{block.path: [] for block in partition.blocks()}}
    for tensor in trainable:
        block = partition.block_of(tensor.name)
        units[block.path if block else ""].append(tensor)
    return PhaseTensors(trainable, flat, frozen, buffers, list(units.values()))


def estimate_footprints(
    recipe: Recipe,
    plan: Plan,
    rows: Iterable[PlannedRow],
    worlds: Iterable[int],
    strategies: Collection[str] = STRATEGY_NAMES,
) -> dict[str, list[RankFootprint]]:
    """Return the footprints of each phase by its key, for each world size and each of the strategies that supports it.

    Raises:
        ConfigError: The batch size of a phase is not divisible by a world size.
    """
    found: dict[str, list[RankFootprint]] = {}
    of_shape: dict[object, list[RankFootprint]] = {}
    worlds = list(worlds)
    for planned in rows:
        settings, row = recipe.settings(planned.phase), plan.row(planned.phase, planned.module)
        shape = _tensor_shapes(row)
        if shape not in of_shape:
            tensors = phase_tensors(row, settings, plan)
            of_shape[shape] = [
                _estimate_footprint(name, settings, planned, tensors, world, plan.family)
                for world in worlds
                for name in strategies
                if tensors.flat is not None or not name.startswith("zero")
            ]
        found[planned.key] = [
            _replace_activations(footprint, planned, plan.family.workspace_bytes(settings.model, footprint.samples))
            for footprint in of_shape[shape]
        ]
    return found


def _tensor_shapes(row: PhasePlan) -> object:
    """Return a value that is equal for phases whose tensors have the same shapes, trained and frozen."""
    if row.module is None:
        return row.phase
    last = len(row.slots) - 1
    frozen = sorted(depths for module, depths in enumerate(row.depths) if module != row.module)
    return row.phase, row.depths[row.module], row.module == 0, row.module == last, tuple(frozen)


def _replace_activations(footprint: RankFootprint, planned: PlannedRow, workspace: int) -> RankFootprint:
    """Return the footprint of a phase with tensors of the same shapes, whose activations may be larger or smaller."""
    activations = planned.cost.activation_bytes * footprint.samples + workspace
    return replace(footprint, activations=activations, total=footprint.total - footprint.activations + activations)


def all_batches_divisible(recipe: Recipe, world: int) -> bool:
    """Return whether the batch of every phase can be divided among ``world`` ranks."""
    return all(batch_divisible(recipe.settings(phase), world) for phase in PHASES)


def batch_divisible(settings: Settings, world: int) -> bool:
    """Return whether a phase's batch can be divided among ``world`` ranks."""
    return settings.train.batch_size % world == 0


def _estimate_footprint(
    name: str, settings: Settings, planned: PlannedRow, tensors: PhaseTensors, world: int, family: ModelFamily
) -> RankFootprint:
    train = settings.train
    if not batch_divisible(settings, world):
        raise ConfigError(f"--world {world}: train.batch_size = {train.batch_size} is not divisible by {world} ranks")
    local_batch = train.batch_size // world
    micro_batches = -(-local_batch // (train.micro_batch or local_batch))
    samples = local_batch // micro_batches
    section = zero_section(settings.sharding, name)
    layout = strategy_layouts(section, planned.phase, micro_batches)[name] if world > 1 else StrategyLayout()
    trainable = (tensors.flat if name.startswith("zero") else tensors.trainable) or []
    all_tensors = [*trainable, *tensors.frozen]

    def max_bytes(numel: LocalNumel, of: list[ParamInfo], size_in_bytes: Callable[[ParamInfo, int], int]) -> int:
        """Return the largest number of bytes on any rank."""
        ranks = (zip(of, numel(of, world, rank), strict=True) for rank in range(world))
        return max(sum(size_in_bytes(tensor, size) for tensor, size in rank) for rank in ranks)

    def fp32(tensor: ParamInfo, size: int) -> int:
        return FP32_BYTES * size

    def state(tensor: ParamInfo, size: int) -> int:
        return tensor.state_bytes_per_element * size + tensor.extra_state_bytes * (size > 0)

    gradients, full = (max_bytes(numel, trainable, fp32) for numel in (layout.gradients, replicated))
    if micro_batches > 1:
        gradients = full + gradients if layout.persistent_gradients else max(full, gradients)
    weights = max_bytes(layout.weights, trainable, fp32) + max_bytes(layout.frozen, tensors.frozen, fp32)
    copied = min(layout.max_copied_numel, sum(replicated(trainable, world, 0)))
    parts = {
        "weights": weights + tensors.buffers,
        "gradients": gradients,
        "optimizer": max_bytes(layout.optimizer_state, trainable, state),
        "masters": max_bytes(layout.masters, trainable, fp32),
        "average": max_bytes(layout.average, trainable, fp32) if settings.ema.decay else 0,
        "buckets": FP32_BYTES * (layout.bucket_numel + copied),
        "gathered": FP32_BYTES * layout.gathered(all_tensors, tensors.units, world),
        "activations": planned.cost.activation_bytes * samples + family.workspace_bytes(settings.model, samples),
    }
    collectives: dict[str, int] = {}
    for cost in layout.collectives:
        times = cost.times * (micro_batches if cost.per == "micro_batch" else 1)
        numel = cost.payload_numel(trainable if cost.tensors == "trainable" else all_tensors, world)
        collectives[cost.kind] = collectives.get(cost.kind, 0) + FP32_BYTES * times * numel
    return RankFootprint(
        strategy=name,
        world=world,
        micro_batches=micro_batches,
        samples=samples,
        total=sum(parts.values()),
        collectives=collectives,
        sent=sum(collectives.values()),
        **parts,
    )


def zero_section(sharding: ShardingConfig, strategy: str) -> dict[str, Any]:
    """Return the ``zero_optimization`` section of a strategy's DeepSpeed file; empty for other strategies.

    The file is that of the recipe if the recipe uses this strategy, and otherwise the shipped one.
    """
    if not strategy.startswith("zero"):
        return {}
    if sharding.strategy != strategy:
        sharding = ShardingConfig.model_validate({"strategy": strategy})
    return read_config(resolve_config_path(sharding)).get("zero_optimization", {})
