"""Read and write tensors that are sharded over ranks, in files that do not depend on the sharding strategy.

A *shard* is a contiguous range of elements of a logical tensor in row-major order. Every strategy knows which shards a
rank holds, and reads the ranges that it needs. Therefore a checkpoint is written without gathering tensors, and can be
read with another world size or by another strategy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from ..errors import ArtifactError
from ..files import write_and_hash

if TYPE_CHECKING:  # `verify` reads only the headers of files, without torch
    import torch
    from torch import Tensor

DTYPES = {  # names in torch and in safetensors
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
LAYOUT = "layout"  # in a file's header: {key: [offset, logical shape]}, for shards that are not full tensors
Count = Annotated[int, Field(ge=0)]
Layout = TypeAdapter(dict[str, tuple[Count, tuple[Count, ...]]])


@dataclass(frozen=True)
class TensorShard:
    """A contiguous range of elements of a logical tensor.

    Attributes:
        tensor: The elements ``offset`` … ``offset + tensor.numel() - 1``, in any shape.
        offset: Index of the first element in the flattened logical tensor.
        shape: Shape of the logical tensor.
    """

    tensor: Tensor
    offset: int
    shape: tuple[int, ...]


def full_tensor(tensor: Tensor) -> TensorShard:
    """Return a shard that holds all elements of ``tensor``."""
    return TensorShard(tensor.detach(), 0, tuple(tensor.shape))


def copy_to_cpu(tensors: Mapping[str, Tensor | TensorShard]) -> dict[str, TensorShard]:
    """Copy tensors to the CPU. Later changes of the tensors do not affect the copies."""
    copies = {}
    for key, value in tensors.items():
        shard = value if isinstance(value, TensorShard) else full_tensor(value)
        tensor = shard.tensor.detach()
        copies[key] = TensorShard(tensor.to("cpu", copy=True).contiguous(), shard.offset, tuple(shard.shape))
    return copies


def write_sharded_tensors(path: Path, shards: Mapping[str, TensorShard]) -> dict[str, Any]:
    """Write the shards of one rank, which must be on the CPU, to a safetensors file.

    Unlike the library's own writer, this does not copy the tensors in memory, and it hashes while it writes.

    Returns:
        The manifest entry of the file; see :func:`bigincubate.files.write_and_hash`.
    """
    import torch

    layout, header, tensors, end = {}, {}, [], 0
    # wide dtypes first, so that each tensor begins at a multiple of its element size
    for key, shard in sorted(shards.items(), key=lambda item: (-item[1].tensor.element_size(), item[0])):
        tensor = shard.tensor.contiguous()
        if tuple(tensor.shape) != tuple(shard.shape):
            layout[key] = [shard.offset, list(shard.shape)]
            tensor = tensor.flatten()
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": DTYPES[str(tensor.dtype).removeprefix("torch.")],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        tensors.append(tensor.reshape(-1).view(torch.uint8).numpy())
    text = json.dumps({"__metadata__": {LAYOUT: json.dumps(layout)}, **header}).encode()
    text += b" " * (-len(text) % 8)
    return write_and_hash(path, [len(text).to_bytes(8, "little"), text, *tensors])


class ShardedTensorReader(Mapping[str, "Tensor"]):
    """Read logical tensors, full or in part, from the files of all ranks. Tensors are loaded on access.

    Args:
        files: Files of :func:`write_sharded_tensors`.

    Attributes:
        shapes: Shape of each logical tensor.

    Raises:
        ArtifactError: A file is invalid; or, on access, elements of a tensor are in none of the files.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._ranges: dict[str, list[tuple[int, int, Path]]] = {}  # offset, length, file
        self._stored: dict[str, str] = {}  # names in the files, of tensors that have others here
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._open: dict[Path, Any] = {}
        for file in files:
            try:
                handle = safe_open(file, framework="np")  # for the header: "pt" imports torch
                layout = Layout.validate_json((handle.metadata() or {}).get(LAYOUT, "{}"))
            except SafetensorError as error:
                raise ArtifactError(f"{file} is not a safetensors file: {str(error).splitlines()[0]}") from None
            except ValidationError as error:
                raise ArtifactError(f"{file}: invalid layout of tensor shards: {error.errors()[0]['msg']}") from None
            for key in handle.keys():  # noqa: SIM118  # not a dictionary
                own_shape = tuple(handle.get_slice(key).get_shape())
                length = math.prod(own_shape)
                offset, shape = layout.get(key, (0, own_shape))
                if offset + length > math.prod(shape) or self.shapes.setdefault(key, shape) != shape:
                    raise ArtifactError(f"{file}: tensor {key!r} does not fit its shape {list(shape)}")
                self._ranges.setdefault(key, []).append((offset, length, file))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, key: object) -> bool:
        """Return whether there is a tensor ``key``, without reading it."""
        return key in self.shapes

    def get(self, key: str, default: Any = None) -> Any:
        """Return the full tensor ``key``, or ``default`` if there is none."""
        return self[key] if key in self.shapes else default

    def __getitem__(self, key: str) -> Tensor:
        """Return a full tensor in its logical shape."""
        if key not in self.shapes:
            raise ArtifactError(f"the checkpoint has no tensor {key!r}")
        shape = self.shapes[key]
        return self.read_range(key, 0, math.prod(shape)).view(shape)

    def renamed(self, names: Mapping[str, str]) -> ShardedTensorReader:
        """Return a reader of some of the tensors under other names.

        Args:
            names: Names in this reader by new name. Several new names may stand for the same tensor.
        """
        other = ShardedTensorReader(())
        other.shapes = {new: self.shapes[old] for new, old in names.items()}
        other._ranges = {new: self._ranges[old] for new, old in names.items()}
        other._stored = {new: self._stored.get(old, old) for new, old in names.items()}
        other._open = self._open
        return other

    def read_range(self, key: str, offset: int, length: int) -> Tensor:
        """Return ``length`` elements of the flattened tensor ``key``, starting at ``offset``; shape [length]."""
        found: list[tuple[int, Tensor]] = []
        for start, size, file in sorted(self._ranges.get(key, []), key=lambda entry: entry[0]):
            low, high = max(start, offset), min(start + size, offset + length)
            if low < high or (length == 0 and size == 0):
                found.append((low, self._read_slice(file, key, low - start, high - start)))
        position, parts = offset, []
        for low, part in found:  # shards may overlap: skip elements that were read already
            if low <= position < low + len(part):
                parts.append(part[position - low :])
                position = low + len(part)
        if position < offset + length:
            raise ArtifactError(f"the checkpoint is incomplete: tensor {key!r} has no element {position}")
        import torch

        if not parts:
            return torch.empty(0, dtype=self.dtype(key) if key in self._ranges else None)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of the tensor ``key``."""
        import torch

        _, _, file = self._ranges[key][0]
        name = self._handle(file).get_slice(self._stored.get(key, key)).get_dtype()
        dtype: torch.dtype = getattr(torch, next(dtype for dtype, known in DTYPES.items() if known == name))
        return dtype

    def copy_to_shard(self, key: str, shard: TensorShard) -> None:
        """Copy a range of the tensor ``key`` into the tensor of ``shard``.

        Raises:
            ValueError: The tensor has another shape.
        """
        if (shape := self.shapes.get(key, shard.shape)) != shard.shape:
            raise ValueError(f"tensor {key!r} has shape {list(shape)}, expected {list(shard.shape)}")
        part = self.read_range(key, shard.offset, shard.tensor.numel())
        shard.tensor.copy_(part.view(shard.tensor.shape))

    def _read_slice(self, file: Path, key: str, low: int, high: int) -> Tensor:
        handle, key = self._handle(file), self._stored.get(key, key)
        view = handle.get_slice(key)
        if len(view.get_shape()) == 1:
            part: Tensor = view[low:high]
            return part
        tensor: Tensor = handle.get_tensor(key)
        return tensor.flatten()[low:high]

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file]
