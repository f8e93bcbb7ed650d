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

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import ArtifactError

LAYOUT = "layout"  # in a file's header: {key: [offset, whole shape]}, for pieces that are not whole


@dataclass(frozen=True)
class Piece:
    """Elements ``offset`` … ``offset + tensor.numel()`` of a logical tensor of ``shape``."""

    tensor: Tensor
    offset: int
    shape: tuple[int, ...]


def whole(tensor: Tensor) -> Piece:
    """A piece that is all of its tensor."""
    return Piece(tensor.detach(), 0, tuple(tensor.shape))


def pack(pieces: Mapping[str, Tensor | Piece]) -> bytes:
    """A rank's pieces as one safetensors file. A plain tensor is a whole one."""
    layout = {
        key: [piece.offset, list(piece.shape)]
        for key, piece in pieces.items()
        if isinstance(piece, Piece) and tuple(piece.tensor.shape) != tuple(piece.shape)
    }
    tensors = {}
    for key, piece in pieces.items():
        tensor = piece.tensor if isinstance(piece, Piece) else piece
        tensors[key] = tensor.detach().to("cpu").contiguous()
        if key in layout:
            tensors[key] = tensors[key].flatten()
    return save(tensors, metadata={LAYOUT: json.dumps(layout)})


class PieceReader(Mapping[str, Tensor]):
    """The logical tensors in the files of all ranks, whole or in part. Nothing is loaded before it is asked for.

    Raises:
        ArtifactError: on a tensor that no rank wrote, or not all of it.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._parts: dict[str, list[tuple[int, int, Path]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._open = {}
        for file in files:
            handle = self._open[file] = safe_open(file, framework="pt")
            layout = json.loads((handle.metadata() or {}).get(LAYOUT, "{}"))
            for key in handle.keys():  # noqa: SIM118  # not a dictionary
                length = math.prod(handle.get_slice(key).get_shape())
                offset, shape = layout.get(key, (0, handle.get_slice(key).get_shape()))
                self.shapes[key] = tuple(shape)
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
