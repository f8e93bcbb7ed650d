"""Compile the blocks of a model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def compile_blocks(model: nn.Module, blocks: Iterable[str]) -> None:
    """Compile each of the blocks at these paths with `torch.compile`; equal blocks share a graph, whatever the depth.

    A block with the attribute ``skip_compile`` set is left as it is.
    """
    for path in blocks:
        block = model.get_submodule(path)
        if not getattr(block, "skip_compile", False):
            block.compile()
