"""What a rank really holds and sends: the measure that :mod:`.footprint` is held to."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .compat.deepspeed import local_partition

# c10d's operator -> the kind of collective, and which argument is the whole tensor or the list of its parts
WHOLE = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
}
NORMS = 2  # elements: LAMB sums two squares for each parameter


class Collectives(TorchDispatchMode):
    """Counts the payload of this rank's collectives while it is entered, by kind, in ``bytes``; see
    :mod:`.sharding.communication`. Flags, words and norms are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        name = operator._schema.name.removeprefix("c10d::")
        if operator.namespace == "c10d" and name in WHOLE:
            kind, index = WHOLE[name]
            for tensor in tree_leaves(arguments[index]):
                if tensor.is_floating_point() and tensor.numel() > NORMS:
                    self.bytes[kind] += tensor.numel() * tensor.element_size()
        return operator(*arguments, **(options or {}))


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Address and bytes of what the tensors lie in, each once."""
    found = {}
    for tensor in tensors:
        storage = (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found


def alive(device: torch.device) -> dict[int, int]:
    """All that Python knows of on a device."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    return storages(tensor for tensor in tensors if tensor.device == device and tensor.layout is torch.strided)


def held(
    model: nn.Module, optimizer: Optimizer, shards: Iterable[Tensor], average: Iterable[Tensor]
) -> dict[str, dict[int, int]]:
    """What a strategy is known to hold, as :func:`storages`. What is in two of them counts for the first."""
    parameters = list(model.parameters())
    shares = [each for p in parameters if (each := local_partition(p)) is not None]
    inner = getattr(optimizer, "optim", optimizer)  # fairscale's
    state = [value for kept in inner.state.values() for value in kept.values() if isinstance(value, Tensor)]
    parts = {
        "weights": storages([*(parameter.detach() for parameter in parameters), *shares, *model.buffers()]),
        "optimizer": storages(state),
        "average": storages(average),
        "masters": storages(shards),
        "gradients": storages(p.grad for p in parameters if p.grad is not None),
    }
    seen: set[int] = {0}
    for name, part in parts.items():
        parts[name] = {address: size for address, size in part.items() if address not in seen}
        seen |= part.keys()
    return parts


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """The most bytes that tensors take during ``step``, those that were there before included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    before = sum(alive(device).values())
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        step()
    assert profile.kineto_results is not None
    now = most = 0
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return before + most
