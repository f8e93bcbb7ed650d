"""What a rank holds and sends under each sharding strategy and world size, counted before anything runs.

Weights, gradients and averages are fp32, as the trainer keeps them; optimizer state is what the optimizer itself makes
in a step. Nothing is imported of DeepSpeed or fairscale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .config import PHASES, Recipe, Settings, Sharding
from .errors import ConfigError
from .models import Partition
from .optim import Trained, trained
from .plan import PhasePlan, Plan, PlannedRow, phase_model
from .sharding.communication import Share, Strategy, strategies, whole
from .sharding.zero import client
from .sharding.zero_config import config_file, read

FP32 = 4  # bytes
NAMES = tuple(strategies({}, "pretrain", 1))


@dataclass(frozen=True)
class Footprint:
    """Bytes on the rank that has the most of them; all of them together are never there at one moment.

    ``gradients``: when the last backward is over, or, with several micro-batches, whole, while they add up.
    ``buckets``: in which DeepSpeed collects gradients to send them, of a fixed size (``reduce_bucket_size``), and the
    copy of one that it scatters.
    ``gathered``: whole weights beside the shares, while a forward or backward passes through them.
    ``activations``: kept for the backward of a micro-batch.
    """

    strategy: str
    world: int
    micro_batches: int
    images: int  # in a micro-batch
    weights: int
    gradients: int
    optimizer: int
    masters: int
    average: int
    buckets: int
    gathered: int
    activations: int
    total: int
    collectives: dict[str, int]  # payload a step, by kind
    sent: int  # and in all


@dataclass(frozen=True)
class Tensors:
    """What a phase trains, in the order of the optimizer and in that of DeepSpeed, and what it does not."""

    trained: list[Trained]
    flat: list[Trained] | None  # None: ZeRO refuses the optimizer
    frozen: list[Trained]
    buffers: int  # bytes of the model's
    units: list[list[Trained]]  # trained tensors by block; the first entry has those that are in none


def tensors_of(row: PhasePlan, settings: Settings, plan: Plan) -> Tensors:
    """The row's tensors with what its optimizer keeps of them. Allocates none."""
    model = phase_model(row, settings, plan.family, device="meta")
    own = trained(model, settings)
    try:
        flat = trained(model, settings, client)
    except ConfigError:
        flat = None
    frozen = [
        Trained(name, tuple(parameter.shape), -1, 0, 0)
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    ]
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    blocks = [f"{block.path}." for block in Partition(plan.family, row.depths).blocks()]
    units = [[tensor for tensor in own if tensor.name.startswith(path)] for path in blocks]
    rest = [tensor for tensor in own if not tensor.name.startswith(tuple(blocks))]
    return Tensors(own, flat, frozen, buffers, [rest, *units])


def footprints(
    recipe: Recipe, plan: Plan, rows: Iterable[PlannedRow], worlds: Iterable[int]
) -> dict[str, list[Footprint]]:
    """For each row of the plan, by its key: one for each world and each strategy that takes the phase's optimizer.

    Raises:
        ConfigError: a batch cannot be shared by so many ranks.
    """
    found: dict[str, list[Footprint]] = {}
    for planned in rows:
        settings = recipe.settings(planned.phase)
        tensors = tensors_of(plan.row(planned.phase, planned.module), settings, plan)
        found[planned.key] = [
            _footprint(name, settings, planned, tensors, world)
            for world in worlds
            for name in NAMES
            if tensors.flat is not None or not name.startswith("zero")
        ]
    return found


def shareable(recipe: Recipe, world: int) -> bool:
    """Whether every phase's batch can be shared by ``world`` ranks."""
    return all(shares_out(recipe.settings(phase), world) for phase in PHASES)


def shares_out(settings: Settings, world: int) -> bool:
    """Whether a phase's batch can be shared by ``world`` ranks."""
    return settings.train.batch_size // settings.augment.repeats % world == 0


def _footprint(name: str, settings: Settings, planned: PlannedRow, tensors: Tensors, world: int) -> Footprint:
    train = settings.train
    if not shares_out(settings, world):
        raise ConfigError(f"--world {world}: a batch of {train.batch_size} cannot be shared by so many ranks")
    share = train.batch_size // world
    micro_batches = -(-share // (train.micro_batch or share))
    config = zero_optimization(settings.sharding, name)
    strategy = strategies(config, planned.phase, micro_batches)[name] if world > 1 else Strategy()
    own = (tensors.flat if name.startswith("zero") else tensors.trained) or []
    every = [*own, *tensors.frozen]

    def most(share: Share, of: list[Trained], each: Callable[[Trained, int], int]) -> int:
        """Bytes on the rank that has the most."""
        ranks = (zip(of, share(of, world, rank), strict=True) for rank in range(world))
        return max(sum(each(tensor, size) for tensor, size in rank) for rank in ranks)

    def fp32(tensor: Trained, size: int) -> int:
        return FP32 * size

    def state(tensor: Trained, size: int) -> int:
        return tensor.each * size + tensor.beside * (size > 0)

    gradients, summed = (most(share, own, fp32) for share in (strategy.gradients, whole))
    if micro_batches > 1:
        gradients = summed + gradients if strategy.standing else max(summed, gradients)
    weights = most(strategy.weights, own, fp32) + most(strategy.frozen, tensors.frozen, fp32)
    parts = {
        "weights": weights + tensors.buffers,
        "gradients": gradients,
        "optimizer": most(strategy.state, own, state),
        "masters": most(strategy.masters, own, fp32),
        "average": most(strategy.average, own, fp32) if settings.ema.decay else 0,
        "buckets": FP32 * (strategy.buckets + min(strategy.copied, sum(whole(own, world, 0)))),
        "gathered": FP32 * strategy.gathered(every, tensors.units, world),
        "activations": planned.cost.activation_bytes * (share // micro_batches),
    }
    collectives: dict[str, int] = {}
    for travel in strategy.travels:
        times = travel.times * (micro_batches if travel.each == "micro_batch" else 1)
        payload = FP32 * times * travel.payload(own if travel.of == "trained" else every, world)
        collectives[travel.kind] = collectives.get(travel.kind, 0) + payload
    return Footprint(
        strategy=name,
        world=world,
        micro_batches=micro_batches,
        images=share // micro_batches,
        total=sum(parts.values()),
        collectives=collectives,
        sent=sum(collectives.values()),
        **parts,
    )


def zero_optimization(sharding: Sharding, strategy: str) -> dict[str, Any]:
    """What DeepSpeed would be told: the recipe's file where it is for this strategy, else the one that is shipped."""
    if not strategy.startswith("zero"):
        return {}
    file = config_file(sharding if sharding.strategy == strategy else Sharding.model_validate({"strategy": strategy}))
    found: dict[str, Any] = read(file).get("zero_optimization", {})
    return found
