"""Which blocks `torch.compile` takes, each by itself: blocks alike share a graph, however deep the model is."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def compile_blocks(model: nn.Module, blocks: Iterable[str]) -> None:
    """Compile the blocks at these paths, but not the one that serves the class token alone (`skip_unused`): there is
    too little in it to be worth a graph of its own."""
    for path in blocks:
        block = model.get_submodule(path)
        if not getattr(block, "serves_class_token", False):
            block.compile()
