"""Memory and communication of a rank under each sharding strategy and world size, estimated before anything runs.

Weights, gradients and moving averages are fp32, as in the trainer. The size of the optimizer state comes from a step of
the optimizer itself on fake tensors. DeepSpeed and fairscale are not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..config import PHASES, Recipe, Settings, ShardingConfig
from ..errors import ConfigError
from ..models.partition import Partition
from ..optim.state_size import ParamInfo, trainable_param_info
from ..sharding.communication import LocalNumel, StrategyLayout, replicated, strategy_layouts
from ..sharding.flat_lamb import flat_slice_optimizer
from ..sharding.zero_config import read_config, resolve_config_path
from .cost import PlannedRow
from .phases import PhasePlan, Plan, phase_model

FP32_BYTES = 4
STRATEGY_NAMES = tuple(strategy_layouts({}, "pretrain", 1))


@dataclass(frozen=True)
class RankFootprint:
    """Bytes on the rank that needs the most, for one strategy and world size.

    Attributes:
        strategy: name of the sharding strategy.
        world: number of ranks.
        micro_batches: micro-batches per step on each rank.
        samples: samples per micro-batch.
        weights: weights and buffers that the model computes with.
        gradients: gradients when the last backward is done; with several micro-batches, while they accumulate.
        optimizer: optimizer state.
        masters: fp32 master weights, if the model computes with a copy.
        average: moving average of the weights.
        buckets: DeepSpeed's gradient buckets of fixed size (``reduce_bucket_size``), and the copy of one in transit.
        gathered: full weights gathered during forward and backward, in addition to the shards.
        activations: activations kept for the backward of a micro-batch.
        total: sum of all parts, an upper bound: they are not all in memory at the same time.
        collectives: payload per step by kind of collective (bytes).
        sent: payload per step in total (bytes).
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
        trainable: trainable parameters in the optimizer's order.
        flat: trainable parameters in the order of ZeRO's optimizer; None if ZeRO does not support the optimizer.
        frozen: frozen parameters.
        buffers: bytes of the model's buffers.
        units: trainable parameters by block; the first entry has those outside of any block.
    """

    trainable: list[ParamInfo]
    flat: list[ParamInfo] | None
    frozen: list[ParamInfo]
    buffers: int
    units: list[list[ParamInfo]]


def phase_tensors(row: PhasePlan, settings: Settings, plan: Plan) -> PhaseTensors:
    """Return the parameters of a row's model without allocating any of them."""
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
    blocks = [f"{block.path}." for block in Partition(plan.family, row.depths).blocks()]
    units = [[tensor for tensor in trainable if tensor.name.startswith(path)] for path in blocks]
    rest = [tensor for tensor in trainable if not tensor.name.startswith(tuple(blocks))]
    return PhaseTensors(trainable, flat, frozen, buffers, [rest, *units])


def estimate_footprints(
    recipe: Recipe, plan: Plan, rows: Iterable[PlannedRow], worlds: Iterable[int]
) -> dict[str, list[RankFootprint]]:
    """Return the footprints of each row by its key: one per world size and strategy that supports the optimizer.

    Raises:
        ConfigError: a phase's batch size is not divisible by a world size.
    """
    found: dict[str, list[RankFootprint]] = {}
    for planned in rows:
        settings = recipe.settings(planned.phase)
        tensors = phase_tensors(plan.row(planned.phase, planned.module), settings, plan)
        found[planned.key] = [
            _estimate_footprint(name, settings, planned, tensors, world)
            for world in worlds
            for name in STRATEGY_NAMES
            if tensors.flat is not None or not name.startswith("zero")
        ]
    return found


def all_batches_divisible(recipe: Recipe, world: int) -> bool:
    """Return whether the batch of every phase can be divided among ``world`` ranks."""
    return all(batch_divisible(recipe.settings(phase), world) for phase in PHASES)


def batch_divisible(settings: Settings, world: int) -> bool:
    """Return whether a phase's batch can be divided among ``world`` ranks."""
    return settings.train.batch_size % world == 0


def _estimate_footprint(
    name: str, settings: Settings, planned: PlannedRow, tensors: PhaseTensors, world: int
) -> RankFootprint:
    train = settings.train
    if not batch_divisible(settings, world):
        raise ConfigError(f"--world {world}: train.batch_size = {train.batch_size} is not divisible by {world} ranks")
    local_batch = train.batch_size // world
    micro_batches = -(-local_batch // (train.micro_batch or local_batch))
    section = zero_section(settings.sharding, name)
    layout = strategy_layouts(section, planned.phase, micro_batches)[name] if world > 1 else StrategyLayout()
    trainable = (tensors.flat if name.startswith("zero") else tensors.trainable) or []
    all_tensors = [*trainable, *tensors.frozen]

    def max_bytes(numel: LocalNumel, of: list[ParamInfo], size_in_bytes: Callable[[ParamInfo, int], int]) -> int:
        """Return the bytes on the rank that has the most."""
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
        "activations": planned.cost.activation_bytes * (local_batch // micro_batches),
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
        samples=local_batch // micro_batches,
        total=sum(parts.values()),
        collectives=collectives,
        sent=sum(collectives.values()),
        **parts,
    )


def zero_section(sharding: ShardingConfig, strategy: str) -> dict[str, Any]:
    """Return ``zero_optimization`` of a strategy's DeepSpeed file; empty for other strategies.

    The file is the recipe's if the recipe chooses this strategy, else the shipped one.
    """
    if not strategy.startswith("zero"):
        return {}
    if sharding.strategy != strategy:
        sharding = ShardingConfig.model_validate({"strategy": strategy})
    return read_config(resolve_config_path(sharding)).get("zero_optimization", {})
