"""DeepSpeed's ZeRO: shards optimizer state (stage 1), also gradients (stage 2), also parameters (stage 3).

DeepSpeed concatenates the parameters of a group and gives each rank a flat slice (stages 1 and 2), or splits each
parameter and concatenates a rank's parts (stage 3). Ranks update fp32 master tensors. :class:`ParamSlice` says which
part of a parameter is where in them, which is all that checkpoints and moving averages need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..compat.deepspeed import flat_slices, import_deepspeed, sync_weights_from_master
from ..distributed.process_group import DistributedContext
from ..errors import ConfigError
from ..storage.sharded_tensors import ShardedTensorReader, TensorShard
from .flat_lamb import flat_slice_optimizer
from .state import NUMBER_PREFIX, pack_value


@dataclass(frozen=True)
class ParamSlice:
    """This rank's part of a parameter in a flat fp32 master tensor.

    Attributes:
        name: name of the parameter.
        shape: shape of the full parameter.
        offset: index of the first element in the flattened parameter.
        length: number of elements.
        flat: the master tensor.
        start: index of the first element in ``flat``.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    length: int
    flat: Tensor
    start: int

    def of(self, flat: Tensor) -> TensorShard:
        """Return this part as a view of ``flat``, a tensor with the layout of the master tensor."""
        return TensorShard(flat.detach().narrow(0, self.start, self.length), self.offset, self.shape)


class Zero:
    """DeepSpeed's ZeRO, stage 1, 2 or 3.

    Args:
        env: the process group.
        config: DeepSpeed configuration, see :mod:`.zero_config`.
    """

    optimizer: Optimizer

    def __init__(self, env: DistributedContext, config: dict[str, Any]) -> None:
        self.env, self.config = env, config
        self.stage: int = config["zero_optimization"]["stage"]
        self.forward_is_collective = self.stage == 3
        self.accumulation = ExitStack()  # open while gradients accumulate without communication

    def prepare(
        self, model: nn.Module, units: Sequence[str], make_optimizer: Callable[[nn.Module], Optimizer]
    ) -> nn.Module:
        """Create the optimizer and DeepSpeed's engine.

        Raises:
            ConfigError: the optimizer needs whole tensors.
            MissingDependencyError: DeepSpeed is not installed.
        """
        self.deepspeed = import_deepspeed(self.env.device.type)
        self.model = model
        self.optimizer = flat_slice_optimizer(make_optimizer(model))
        trainable = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        shapes = {name: tuple(parameter.shape) for parameter, name in trainable.items()}
        self.engine, self.zero, _, _ = self.deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=self.config, dist_init_required=False
        )
        self.slices = [
            ParamSlice(trainable[parameter], shapes[trainable[parameter]], offset, length, flat, start)
            for parameter, offset, length, flat, start in flat_slices(self.zero, self.stage, self.env.rank)
            if length > 0
        ]
        wrapped: nn.Module = self.engine
        return wrapped

    @contextmanager
    def gradient_sync(self, last: bool) -> Iterator[None]:
        """Accumulate full gradients on each rank, and reduce them when the last micro-batch is done."""
        if not last and not self.engine.inside_no_sync_ctxt:
            self.accumulation.enter_context(self.engine.coalesce_grad_reduction())
        yield
        if last:
            self.accumulation.close()  # reduces gradients; a single micro-batch did so during its backward

    def backward(self, loss: Tensor) -> None:
        """Compute gradients."""
        self.engine.backward(loss)

    def step(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """Clip, update and clear gradients in DeepSpeed, which skips the update if the norm is not finite."""
        assert max_norm == self.engine.gradient_clipping()
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), device=self.env.device, dtype=torch.float32)
        return norm, torch.tensor(self.zero.overflow, device=self.env.device)

    def register_pre_step_hook(self, hook: Callable[[Tensor], None]) -> None:
        """Raise ConfigError: DeepSpeed computes the norm and updates in one call."""
        raise ConfigError(
            "optim.lr_scaling: a learning-rate hook runs between the backward pass and the update, which"
            f' sharding.strategy = "zero{self.stage}" does in one call; use "ddp" or "oss"'
        )

    def local_shards(self) -> dict[str, TensorShard]:
        """Return this rank's parts of the fp32 master tensors."""
        return {part.name: part.of(part.flat) for part in self.slices}

    def sync_weights_from_master(self) -> None:
        """Copy the fp32 master tensors into the weights of the model. Collective."""
        sync_weights_from_master(self.zero, self.stage)

    def save(self) -> dict[str, Tensor | TensorShard]:
        """Return this rank's parts of master weights and optimizer state."""
        tensors: dict[str, Tensor | TensorShard] = {}
        for part in self.slices:
            tensors[f"model/{part.name}"] = part.of(part.flat)
            for key, value in self.optimizer.state.get(part.flat, {}).items():
                path = f"optim/{key}/{part.name}"
                if isinstance(value, Tensor) and value.shape == part.flat.shape:
                    tensors[path] = part.of(value)
                elif part.offset == 0:  # a step count: saved by the rank with the parameter's first element
                    tensors |= pack_value(path, value)
        for index, group in enumerate(self.optimizer.param_groups):
            if "step" in group and self.env.is_main:
                tensors |= pack_value(f"group/step/{group.get('origin', index)}", group["step"])
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore this rank's parts of master weights and optimizer state, then the weights of the model."""
        assert isinstance(tensors, ShardedTensorReader)
        for part in self.slices:
            part.of(part.flat).tensor.copy_(tensors.read_range(f"model/{part.name}", part.offset, part.length))
        by_name = {part.name: part for part in self.slices}
        for path, shape in tensors.shapes.items():
            kind, _, rest = path.removeprefix(NUMBER_PREFIX).partition("/")
            key, _, name = rest.partition("/")
            if kind == "optim" and name in by_name:
                part = by_name[name]
                state = self.optimizer.state[part.flat]
                if path.startswith(NUMBER_PREFIX):
                    state[key] = tensors[path].item()
                elif key == "step" or shape != part.shape:
                    fused = self.optimizer.defaults.get("fused")
                    state[key] = tensors[path].to(part.flat.device if fused else "cpu", copy=True)
                else:
                    flat = state.setdefault(key, torch.zeros_like(part.flat))
                    part.of(flat).tensor.copy_(tensors.read_range(path, part.offset, part.length))
            elif kind == "group":
                for index, group in enumerate(self.optimizer.param_groups):
                    if group.get("origin", index) == int(name):
                        number = path.startswith(NUMBER_PREFIX)
                        group["step"] = tensors[path].item() if number else tensors[path].clone()
        self.sync_weights_from_master()

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return all parameters and persistent buffers on the CPU. Collective in stage 3."""
        if self.stage < 3:
            return {name: value.detach().cpu() for name, value in self.model.state_dict().items()}
        parameters = dict(self.model.named_parameters())
        tensors = {}
        for name, value in self.model.state_dict().items():
            # one parameter at a time, so that the full model is never on the device
            with self.deepspeed.zero.GatheredParameters([parameters[name]] if name in parameters else []):
                tensors[name] = parameters.get(name, value).detach().cpu().clone()
        return tensors
