"""Tensors that are spread over ranks, in files that know nothing of how.

A *piece* is a contiguous part, in row-major order, of a logical tensor. Every strategy can say which pieces a rank
holds, and every strategy can be restored from the pieces it asks for: so a checkpoint is written without gathering
anything, and read at another world size or by another strategy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ArtifactError
from ..files import write_hashed

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
LAYOUT = "layout"  # in a file's header: {key: [offset, whole shape]}, for pieces that are not whole
Count = Annotated[int, Field(ge=0)]
Layout = TypeAdapter(dict[str, tuple[Count, tuple[Count, ...]]])


@dataclass(frozen=True)
class Piece:
    """Elements ``offset`` … ``offset + tensor.numel()`` of a logical tensor of ``shape``."""

    tensor: Tensor
    offset: int
    shape: tuple[int, ...]


def whole(tensor: Tensor) -> Piece:
    """A piece that is all of its tensor."""
    return Piece(tensor.detach(), 0, tuple(tensor.shape))


def snapshot(pieces: Mapping[str, Tensor | Piece]) -> dict[str, Piece]:
    """Copies on the host: what happens to the tensors afterwards does not reach them."""
    copies = {}
    for key, value in pieces.items():
        piece = value if isinstance(value, Piece) else whole(value)
        tensor = piece.tensor.detach()
        copies[key] = Piece(tensor.to("cpu", copy=True).contiguous(), piece.offset, tuple(piece.shape))
    return copies


def write_pieces(path: Path, pieces: Mapping[str, Piece]) -> dict[str, Any]:
    """A rank's pieces on the host as one safetensors file, written and hashed without another copy in memory (which the
    library's own writer makes). Gives what a manifest says of the file."""
    layout, header, tensors, at = {}, {}, [], 0
    # wide types first: each tensor then begins at a multiple of its element's size
    for key, piece in sorted(pieces.items(), key=lambda item: (-item[1].tensor.element_size(), item[0])):
        tensor = piece.tensor.contiguous()
        if tuple(tensor.shape) != tuple(piece.shape):
            layout[key] = [piece.offset, list(piece.shape)]
            tensor = tensor.flatten()
        size = tensor.numel() * tensor.element_size()
        header[key] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        tensors.append(tensor.reshape(-1).view(torch.uint8).numpy())
        at += size
    text = json.dumps({"__metadata__": {LAYOUT: json.dumps(layout)}, **header}).encode()
    text += b" " * (-len(text) % 8)
    return write_hashed(path, [len(text).to_bytes(8, "little"), text, *tensors])


class PieceReader(Mapping[str, Tensor]):
    """The logical tensors in the files of all ranks, whole or in part. Nothing is loaded before it is asked for.

    Raises:
        ArtifactError: a file that holds no pieces; on access, a tensor that no rank wrote, or not all of it.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._parts: dict[str, list[tuple[int, int, Path]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._open = {}
        for file in files:
            try:
                handle = self._open[file] = safe_open(file, framework="pt")
                layout = Layout.validate_json((handle.metadata() or {}).get(LAYOUT, "{}"))
            except SafetensorError as error:
                raise ArtifactError(f"{file} holds no tensors: {str(error).splitlines()[0]}") from None
            except ValidationError as error:
                raise ArtifactError(f"{file}: not the layout of pieces: {error.errors()[0]['msg']}") from None
            for key in handle.keys():  # noqa: SIM118  # not a dictionary
                own = tuple(handle.get_slice(key).get_shape())
                length = math.prod(own)
                offset, shape = layout.get(key, (0, own))
                if offset + length > math.prod(shape) or self.shapes.setdefault(key, shape) != shape:
                    raise ArtifactError(f"{file}: tensor {key!r} does not fit its shape {list(shape)}")
                self._parts.setdefault(key, []).append((offset, length, file))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, key: str) -> Tensor:
        """The whole tensor, in its shape."""
        if key not in self.shapes:
            raise ArtifactError(f"the checkpoint has no tensor {key!r}")
        shape = self.shapes[key]
        return self.part(key, 0, math.prod(shape)).view(shape)

    def part(self, key: str, offset: int, length: int) -> Tensor:
        """``length`` elements from ``offset`` on, flat."""
        found: list[tuple[int, Tensor]] = []
        for start, size, file in sorted(self._parts.get(key, []), key=lambda part: part[0]):
            low, high = max(start, offset), min(start + size, offset + length)
            if low < high or (length == 0 and size == 0):
                found.append((low, self._slice(file, key, low - start, high - start)))
        at, parts = offset, []
        for low, part in found:  # replicas overlap: what is there already is not taken twice
            if low <= at < low + len(part):
                parts.append(part[at - low :])
                at = low + len(part)
        if at < offset + length:
            raise ArtifactError(f"the checkpoint lacks elements of tensor {key!r} from {at} on")
        if not parts:
            return torch.empty(0)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _slice(self, file: Path, key: str, low: int, high: int) -> Tensor:
        handle = self._open[file]
        view = handle.get_slice(key)
        if len(view.get_shape()) == 1:
            part: Tensor = view[low:high]
            return part
        whole: Tensor = handle.get_tensor(key)
        return whole.flatten()[low:high]
