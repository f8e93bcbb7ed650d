"""The interface of a sharding strategy, and checkpoints that every strategy can read.

Keys of a checkpoint are ``model/NAME``, ``optim/STATE/NAME`` and ``group/step/INDEX`` (timm's LAMB counts steps per
parameter group). Some optimizers store Python numbers and would compute other results from tensors; these numbers are
saved as 64-bit tensors with the prefix ``number/`` and restored as numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..compat.torch import skip_fused_step_if
from ..distributed.process_group import DistributedContext
from ..storage.sharded_tensors import ShardedTensorReader, TensorShard, full_tensor

NUMBER_PREFIX = "number/"


class Sharding(ABC):
    """A sharding strategy on one rank. Default methods are for strategies with all weights on every rank.

    Args:
        env: The process group.

    Attributes:
        optimizer: The optimizer whose ``param_groups`` contain the learning rates. Set by :meth:`prepare`.
        model: The model before it is wrapped. Set by :meth:`prepare`.
        pre_step_hook: See :meth:`register_pre_step_hook`.
        forward_is_collective: Whether the forward runs collectives. If so, all ranks must call it equally often.
    """

    optimizer: Optimizer
    model: nn.Module
    pre_step_hook: Callable[[Tensor], None] | None = None
    forward_is_collective = False

    def __init__(self, env: DistributedContext) -> None:
        self.env = env

    @abstractmethod
    def prepare(
        self, model: nn.Module, units: Sequence[str], make_optimizer: Callable[[nn.Module], Optimizer]
    ) -> nn.Module:
        """Shard a model and create its optimizer.

        Args:
            model: The model on its device. ``requires_grad`` of its parameters must not change later.
            units: Paths of the model's blocks, each of which is sharded as a unit.
            make_optimizer: Returns the optimizer of a model's trainable parameters.

        Returns:
            The module to call in training.
        """

    @cached_property
    def trainable(self) -> dict[str, Tensor]:
        """The trainable parameters by name, after :meth:`prepare`."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    @abstractmethod
    def gradient_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Return the context for forward and backward of a micro-batch. Only the last one reduces gradients."""

    def backward(self, loss: Tensor) -> None:
        """Compute gradients of ``loss`` (scalar) and add them to those of earlier micro-batches."""
        loss.backward()

    @abstractmethod
    def step(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """Clip the gradients, update the weights and clear the gradients.

        If the gradient norm is not finite, all ranks skip the update: weights and optimizer state do not change.

        Args:
            max_norm: Maximum L2 norm of the gradient; 0 turns clipping off.

        Returns:
            The norm before clipping and whether the update was skipped, both scalars on the device.
        """

    def register_pre_step_hook(self, hook: Callable[[Tensor], None]) -> None:
        """Register a function that is called before every update on all ranks.

        Args:
            hook: Takes the norm of the gradient before clipping (scalar); may change learning rates.

        Raises:
            ConfigError: The strategy does not have the gradients of each rank before they are reduced.
        """
        self.pre_step_hook = hook

    def updated_tensors(self) -> Mapping[str, Tensor]:
        """Return the tensors that the optimizer updates on this rank, by parameter name."""
        return self.trainable

    def local_shard(self, name: str, value: Tensor) -> TensorShard:
        """Return this rank's shard of a parameter or of its optimizer state: a view, not a copy.

        Args:
            name: Name of the parameter.
            value: A tensor with the layout of the parameter's entry in :meth:`updated_tensors`.
        """
        return full_tensor(value)

    def local_shards(self) -> dict[str, TensorShard]:
        """Return this rank's shards of the trainable parameters by name: the tensors themselves, not copies."""
        return {name: self.local_shard(name, updated) for name, updated in self.updated_tensors().items()}

    def sync_weights_from_master(self) -> None:  # noqa: B027  # in most strategies the local shards are the weights
        """Copy the local shards, after a change, to the weights that the model computes with."""

    def saved_tensors(self) -> Mapping[str, Tensor]:
        """Return the subset of :meth:`updated_tensors` that this rank saves; other ranks save the others."""
        return self.updated_tensors()

    def save(self) -> dict[str, Tensor | TensorShard]:
        """Return this rank's part of weights and optimizer state for a checkpoint, without communication."""
        tensors: dict[str, Tensor | TensorShard] = {}
        for name, updated in self.saved_tensors().items():
            shard = tensors[f"model/{name}"] = self.local_shard(name, updated)
            for key, value in self.inner_optimizer.state.get(updated, {}).items():
                if isinstance(value, Tensor) and value.shape == updated.shape:
                    tensors[f"optim/{key}/{name}"] = self.local_shard(name, value)
                elif shard.offset == 0:  # a step count: saved by the rank with the parameter's first element
                    tensors |= _pack_value(f"optim/{key}/{name}", value)
        for index, groups in self._groups_by_index().items():
            if "step" in groups[0] and self.env.is_main:
                tensors |= _pack_value(f"group/step/{index}", groups[0]["step"])
        return tensors

    @torch.no_grad()
    def load(self, tensors: ShardedTensorReader) -> None:
        """Restore weights and optimizer state that any strategy saved at any world size."""
        for name, shard in self.local_shards().items():
            tensors.copy_to_shard(f"model/{name}", shard)
        self._load_optimizer(tensors)
        self.sync_weights_from_master()

    @torch.no_grad()
    def load_optimizer_state(self, tensors: ShardedTensorReader, sources: Mapping[str, str]) -> None:
        """Load the optimizer state of some parameters from a checkpoint of another model.

        Parameters whose shape differs are left out. The optimizer must count the steps of each parameter
        separately.

        Args:
            tensors: The checkpoint, of the same optimizer.
            sources: Names of parameters in the other model by name in this one.
        """
        targets: dict[str, list[str]] = {}
        for name, source in sources.items():
            if tensors.shapes.get(f"model/{source}") == tuple(self.trainable[name].shape):
                targets.setdefault(source, []).append(name)
        renamed: dict[str, str] = {}
        for path in tensors:
            kind, _, rest = path.removeprefix(NUMBER_PREFIX).partition("/")
            source = {"model": rest, "optim": rest.partition("/")[2]}.get(kind, "")
            renamed |= {path.removesuffix(source) + name: path for name in targets.get(source, ())}
        self._load_optimizer(tensors.renamed(renamed))

    def _load_optimizer(self, tensors: ShardedTensorReader) -> None:
        optimizer, updated, groups = self.inner_optimizer, self.updated_tensors(), self._groups_by_index()
        for path, shape in tensors.shapes.items():
            kind, _, rest = path.removeprefix(NUMBER_PREFIX).partition("/")
            key, _, name = rest.partition("/")
            if kind == "optim" and name in updated:
                parameter = updated[name]
                state = optimizer.state[parameter]
                if path.startswith(NUMBER_PREFIX) or key == "step" or shape != tensors.shapes[f"model/{name}"]:
                    device = parameter.device if optimizer.defaults.get("fused") else "cpu"
                    state[key] = _unpack_value(path, tensors[path].to(device))
                else:
                    if key not in state:  # several parameters may share one state tensor
                        state[key] = torch.zeros_like(parameter, dtype=tensors.dtype(path))
                    tensors.copy_to_shard(path, self.local_shard(name, state[key]))
            elif kind == "group":
                if int(name) not in groups:
                    raise ValueError(f"{path}: there are {len(groups)} parameter groups")
                for group in groups[int(name)]:
                    group["step"] = _unpack_value(path, tensors[path])

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return all parameters and persistent buffers, unsharded, in fp32 on the CPU. Collective."""
        return {name: value.detach().cpu() for name, value in self.model.state_dict().items()}

    @property
    def inner_optimizer(self) -> Optimizer:
        """Return the optimizer that contains the state of this rank."""
        return self.optimizer

    def _groups_by_index(self) -> dict[int, list[dict[str, Any]]]:
        """Return parameter groups by index; groups that :mod:`.flat_lamb` split have that of the original group."""
        groups: dict[int, list[dict[str, Any]]] = {}
        for index, group in enumerate(self.inner_optimizer.param_groups):
            groups.setdefault(group.get("origin", index), []).append(group)
        return groups


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients in place so that their L2 norm is at most ``max_norm`` (0: leave them unchanged).

    Returns:
        The norm before clipping: a scalar on the device, a ``DTensor`` if the gradients are.
    """
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
    return norm


def update_weights_unless(skip: Tensor, optimizer: Optimizer, inner: Optimizer | None = None) -> None:
    """Run ``optimizer.step()`` unless ``skip`` is true.

    A fused optimizer reads ``skip`` on the device. With any other optimizer, the host waits for the device here.

    Args:
        skip: Boolean scalar on the device of the optimizer's tensors.
        optimizer: The optimizer to step.
        inner: The optimizer that ``optimizer`` wraps, if it wraps one.
    """
    inner = inner or optimizer
    if inner.defaults.get("fused"):
        skip_fused_step_if(inner, skip)
    elif bool(skip):
        return
    optimizer.step()


def _pack_value(path: str, value: Any) -> dict[str, Tensor]:
    """Return a small value by its key: a copy of a tensor, or a Python number as a 64-bit tensor."""
    if isinstance(value, Tensor):
        return {path: value.clone()}  # parameters may share a step count, but safetensors refuses shared memory
    return {NUMBER_PREFIX + path: torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)}


def _unpack_value(path: str, value: Tensor) -> Any:
    return value.item() if path.startswith(NUMBER_PREFIX) else value.clone()
