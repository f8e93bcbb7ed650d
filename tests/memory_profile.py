"""Measure the memory that a rank holds and the bytes that it sends, to check :mod:`bigincubate.planning.memory`."""

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

# c10d operator -> kind of collective, index of the argument with the full tensor or the list of its parts
PAYLOAD_ARGUMENT = {
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
MAX_NORM_NUMEL = 2  # LAMB sums two squared norms for each parameter


class CollectiveCounter(TorchDispatchMode):
    """Count the payload of this rank's collectives while the context is active.

    See :mod:`bigincubate.sharding.communication` for the definition of payload. Integers and norms are not counted.

    Attributes:
        bytes: payload by kind of collective.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, operator: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        name = operator._schema.name.removeprefix("c10d::")
        if operator.namespace == "c10d" and name in PAYLOAD_ARGUMENT:
            kind, index = PAYLOAD_ARGUMENT[name]
            for tensor in tree_leaves(arguments[index]):
                if tensor.is_floating_point() and tensor.numel() > MAX_NORM_NUMEL:
                    self.bytes[kind] += tensor.numel() * tensor.element_size()
        return operator(*arguments, **(options or {}))


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Return bytes by address of the distinct storages of ``tensors``."""
    found = {}
    for tensor in tensors:
        storage = (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found


def live_storages(device: torch.device) -> dict[int, int]:
    """Return bytes by address of all storages on ``device`` that Python's garbage collector can find."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), Tensor)]
    return storages(tensor for tensor in tensors if tensor.device == device and tensor.layout is torch.strided)


def bytes_by_role(
    model: nn.Module, optimizer: Optimizer, shards: Iterable[Tensor], average: Iterable[Tensor]
) -> dict[str, dict[int, int]]:
    """Return the storages of a training process by role: weights, optimizer, average, masters, gradients.

    Args:
        model: the model.
        optimizer: its optimizer, or fairscale's wrapper of it.
        shards: this rank's shards of the trainable parameters.
        average: their moving average.

    Returns:
        Bytes by address for each role. A storage with several roles counts for the first one.
    """
    parameters = list(model.parameters())
    partitions = [p.ds_tensor for p in parameters if hasattr(p, "ds_tensor")]  # of ZeRO-3
    inner = getattr(optimizer, "optim", optimizer)  # fairscale keeps the state in the wrapped optimizer
    state = [value for entry in inner.state.values() for value in entry.values() if isinstance(value, Tensor)]
    roles = {
        "weights": storages([*(parameter.detach() for parameter in parameters), *partitions, *model.buffers()]),
        "optimizer": storages(state),
        "average": storages(average),
        "masters": storages(shards),
        "gradients": storages(p.grad for p in parameters if p.grad is not None),
    }
    seen: set[int] = {0}
    for name, found in roles.items():
        roles[name] = {address: size for address, size in found.items() if address not in seen}
        seen |= found.keys()
    return roles


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Return the peak bytes of tensors during ``step``, including those that existed before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    before = sum(live_storages(device).values())
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        step()
    assert profile.kineto_results is not None
    now = peak = 0
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return before + peak
