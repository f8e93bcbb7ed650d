"""DeepSpeed's ZeRO: optimizer state (1), gradients too (2), parameters too (3) are cut over the ranks.

DeepSpeed lays the parameters of a group end to end and gives each rank a flat slice of them (stages 1 and 2), or cuts
each parameter and lays the cuts end to end (stage 3). What a rank updates is fp32; :class:`Share` says which part of
which parameter lies where, and that is all that checkpoints and moving averages need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import Lamb, Lion
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from ..checkpoint.pieces import Piece, PieceReader
from ..cluster.env import RunEnv
from ..compat.deepspeed import flat_slices, import_deepspeed, sync_weights_from_master
from ..errors import ConfigError
from .flat_lamb import FlatLamb
from .state import NUMBER, packed

ELEMENTWISE = (Adam, AdamW, SGD, RMSprop, Lion)  # an element's update depends on that element alone


@dataclass(frozen=True)
class Share:
    """Elements ``offset`` … ``offset + length`` of a parameter, at ``start`` in a flat fp32 tensor of this rank."""

    name: str
    shape: tuple[int, ...]
    offset: int
    length: int
    flat: Tensor
    start: int

    def of(self, flat: Tensor) -> Piece:
        """The same part of ``flat``, which is laid out as the parameters are. A view."""
        return Piece(flat.detach().narrow(0, self.start, self.length), self.offset, self.shape)


class Zero:
    """Stage 1, 2 or 3, by ``config`` (see :mod:`.zero_config`)."""

    optimizer: Optimizer

    def __init__(self, env: RunEnv, config: dict[str, Any]) -> None:
        self.env, self.config = env, config
        self.stage: int = config["zero_optimization"]["stage"]
        self.gathers = self.stage == 3
        self.open = ExitStack()  # while gradients add up on this rank

    def prepare(
        self, model: nn.Module, units: Sequence[str], make_optimizer: Callable[[nn.Module], Optimizer]
    ) -> nn.Module:
        """
        Raises:
            ConfigError: the optimizer needs whole tensors.
            EnvironmentFault: DeepSpeed is not installed.
        """
        self.deepspeed = import_deepspeed(self.env.device.type)
        self.model = model
        self.optimizer = client(make_optimizer(model))
        trainable = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        shapes = {name: tuple(parameter.shape) for parameter, name in trainable.items()}
        self.engine, self.zero, _, _ = self.deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=self.config, dist_init_required=False
        )
        self.parts = [
            Share(trainable[parameter], shapes[trainable[parameter]], offset, length, flat, start)
            for parameter, offset, length, flat, start in flat_slices(self.zero, self.stage, self.env.rank)
            if length > 0
        ]
        wrapped: nn.Module = self.engine
        return wrapped

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        if not last and not self.engine.inside_no_sync_ctxt:
            self.open.enter_context(self.engine.coalesce_grad_reduction())
        yield
        if last:
            self.open.close()  # now they travel; a single micro-batch's already did, during its backward

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, max_norm: float) -> tuple[Tensor, Tensor]:
        assert max_norm == self.engine.gradient_clipping()
        # the norm is the same on every rank; where it is not finite, DeepSpeed drops the gradient and does no more
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm(), device=self.env.device, dtype=torch.float32)
        return norm, torch.tensor(self.zero.overflow, device=self.env.device)

    def before_update(self, call: Callable[[Tensor], None]) -> None:
        raise ConfigError(
            'optim.lr_scaling = "adascale" sets learning rates between gradients and update, which'
            f' sharding.strategy = "zero{self.stage}" does in one; use "ddp" or "oss"'
        )

    def shards(self) -> dict[str, Piece]:
        return {share.name: share.of(share.flat) for share in self.parts}

    def publish(self) -> None:
        sync_weights_from_master(self.zero, self.stage)

    def save(self) -> dict[str, Tensor | Piece]:
        tensors: dict[str, Tensor | Piece] = {}
        for share in self.parts:
            tensors[f"model/{share.name}"] = share.of(share.flat)
            for key, value in self.optimizer.state.get(share.flat, {}).items():
                path = f"optim/{key}/{share.name}"
                if isinstance(value, Tensor) and value.shape == share.flat.shape:
                    tensors[path] = share.of(value)
                elif share.offset == 0:  # a count: written by the rank that has the parameter's beginning
                    tensors |= packed(path, value)
        for index, group in enumerate(self.optimizer.param_groups):
            if "step" in group and self.env.is_main:
                tensors |= packed(f"group/step/{group.get('origin', index)}", group["step"])
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        assert isinstance(tensors, PieceReader)
        for share in self.parts:
            share.of(share.flat).tensor.copy_(tensors.part(f"model/{share.name}", share.offset, share.length))
        by_name = {share.name: share for share in self.parts}
        for path, shape in tensors.shapes.items():
            kind, _, rest = path.removeprefix(NUMBER).partition("/")
            key, _, name = rest.partition("/")
            if kind == "optim" and name in by_name:
                share = by_name[name]
                state = self.optimizer.state[share.flat]
                if path.startswith(NUMBER):
                    state[key] = tensors[path].item()
                elif key == "step" or shape != share.shape:
                    fused = self.optimizer.defaults.get("fused")
                    state[key] = tensors[path].to(share.flat.device if fused else "cpu", copy=True)
                else:
                    flat = state.setdefault(key, torch.zeros_like(share.flat))
                    share.of(flat).tensor.copy_(tensors.part(path, share.offset, share.length))
            elif kind == "group":
                for index, group in enumerate(self.optimizer.param_groups):
                    if group.get("origin", index) == int(name):
                        number = path.startswith(NUMBER)
                        group["step"] = tensors[path].item() if number else tensors[path].clone()
        self.publish()

    def full_state_dict(self) -> dict[str, Tensor]:
        if self.stage < 3:
            return {name: value.detach().cpu() for name, value in self.model.state_dict().items()}
        parameters = dict(self.model.named_parameters())
        whole = {}
        for name, value in self.model.state_dict().items():
            # one after the other: a rank never has all of them but on the CPU
            with self.deepspeed.zero.GatheredParameters([parameters[name]] if name in parameters else []):
                whole[name] = parameters.get(name, value).detach().cpu().clone()
        return whole


def client(plain: Optimizer) -> Optimizer:
    """The optimizer that DeepSpeed runs on flat slices."""
    cautious = any(group.get("caution") for group in plain.param_groups)
    if type(plain) is Lamb and not cautious:
        return FlatLamb.of(plain)
    if type(plain) not in ELEMENTWISE or cautious:
        raise ConfigError(
            f"optim.name: {type(plain).__name__}{' with caution' if cautious else ''} looks at whole tensors, of which"
            ' ZeRO leaves a rank slices; use adamw, adam, sgd, rmsprop, lion or lamb, or sharding.strategy = "fsdp2"'
        )
    return plain
