"""Compile the blocks of a model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def compile_blocks(model: nn.Module, blocks: Iterable[str]) -> None:
    """Compile each block at these paths with `torch.compile`, so that equal blocks share one graph at any depth.

    A block whose attribute ``skip_compile`` is true is not compiled.
    """
    for path in blocks:
        block = model.get_submodule(path)
        if not getattr(block, "skip_compile", False):
            block.compile()
