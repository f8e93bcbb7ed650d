"""DeepSpeed's ZeRO: shard optimizer state (stage 1), gradients too (stage 2), and parameters too (stage 3).

DeepSpeed concatenates the parameters of a group and gives each rank a flat slice (stages 1 and 2), or splits each
parameter and concatenates a rank's parts (stage 3). Ranks update fp32 master tensors. ``flat_slices`` maps parts of
parameters to positions in the master tensors, for checkpoints and moving averages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..compat.deepspeed import flat_slices, import_deepspeed, sync_weights_from_master
from ..distributed.process_group import DistributedContext
from ..errors import ConfigError
from ..storage.sharded_tensors import TensorShard
from .base import Sharding
from .flat_lamb import flat_slice_optimizer


class Zero(Sharding):
    """DeepSpeed's ZeRO, stage 1, 2 or 3.

    Args:
        env: The process group.
        config: DeepSpeed configuration, see :mod:`.zero_config`.
    """

    def __init__(self, env: DistributedContext, config: dict[str, Any]) -> None:
        super().__init__(env)
        self.config = config
        self.stage: int = config["zero_optimization"]["stage"]
        self.forward_is_collective = self.stage == 3
        self.accumulation = ExitStack()  # open while gradients are accumulated without communication

    def prepare(
        self, model: nn.Module, units: Sequence[str], make_optimizer: Callable[[nn.Module], Optimizer]
    ) -> nn.Module:
        """Create the optimizer and DeepSpeed's engine.

        Raises:
            ConfigError: The optimizer cannot run on slices of tensors.
            MissingDependencyError: DeepSpeed is not installed.
        """
        self.deepspeed = import_deepspeed(self.env.device.type)
        self.model = model
        self.optimizer = flat_slice_optimizer(make_optimizer(model))
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self.trainable.items()}
        names = {parameter: name for name, parameter in self.trainable.items()}
        self.engine, self.zero, _, _ = self.deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=self.config, dist_init_required=False
        )
        slices = flat_slices(self.zero, self.stage, self.env.rank)
        self.slices = {names[part.parameter]: part for part in slices if part.length > 0}
        wrapped: nn.Module = self.engine
        return wrapped

    @contextmanager
    def gradient_sync(self, last: bool) -> Iterator[None]:
        """Accumulate full gradients on each rank, and reduce them after the last micro-batch."""
        if not last and not self.engine.inside_no_sync_ctxt:
            self.accumulation.enter_context(self.engine.coalesce_grad_reduction())
        yield
        if last:
            self.accumulation.close()  # reduces gradients, unless a single micro-batch reduced them in its backward

    def backward(self, loss: Tensor) -> None:
        """Compute gradients of ``loss`` (scalar) and add them to those of earlier micro-batches."""
        self.engine.backward(loss)

    def step(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """Let DeepSpeed clip gradients, update weights and clear gradients; it skips an update of non-finite norm."""
        assert max_norm == self.engine.gradient_clipping()
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), device=self.env.device, dtype=torch.float32)
        return norm, torch.tensor(self.zero.overflow, device=self.env.device)

    def register_pre_step_hook(self, hook: Callable[[Tensor], None]) -> None:
        """Raise ConfigError: DeepSpeed computes the norm and updates in one call."""
        raise ConfigError(
            "optim.lr_scaling: a learning-rate hook runs between the gradient norm and the update, which"
            f' sharding.strategy = "zero{self.stage}" computes in one call; use "ddp" or "oss"'
        )

    def updated_tensors(self) -> Mapping[str, Tensor]:
        """Return the fp32 master tensor of each parameter of which this rank has a part."""
        return {name: part.flat for name, part in self.slices.items()}

    def local_shard(self, name: str, value: Tensor) -> TensorShard:
        """Return this rank's part of a parameter: a view of ``value``, which has the layout of the master tensor."""
        part = self.slices[name]
        return TensorShard(value.detach().narrow(0, part.start, part.length), part.offset, self.shapes[name])

    def sync_weights_from_master(self) -> None:
        """Copy the fp32 master tensors into the weights of the model. Collective."""
        sync_weights_from_master(self.zero, self.stage)

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return all parameters and persistent buffers on the CPU. Collective in stage 3."""
        if self.stage < 3:
            return {name: value.detach().cpu() for name, value in self.model.state_dict().items()}
        parameters = dict(self.model.named_parameters())
        tensors = {}
        for name, value in self.model.state_dict().items():
            # gather one parameter at a time, so that the full model is never on the device
            with self.deepspeed.zero.GatheredParameters([parameters[name]] if name in parameters else []):
                tensors[name] = parameters.get(name, value).detach().cpu().clone()
        return tensors
