"""Draw the continuation of a text from a language model."""

from __future__ import annotations

import torch
from torch import nn

from ...distributed.process_group import DistributedContext


def complete(
    model: nn.Module,
    tokens: list[int],
    count: int,
    *,
    window: int,
    vocabulary: int,
    end: int,
    seed: int,
    env: DistributedContext,
) -> list[int]:
    """Return tokens and at most ``count`` further ones, drawn from the distribution that the model predicts.

    Every rank computes the same distributions, and those of rank 0 decide. All forward passes have the same shape, so
    that a compiled model needs one graph. There is no cache of keys and values: this is for short examples.

    Args:
        model: A `CausalLM` in evaluation mode.
        tokens: The first tokens, at least one.
        count: Number of tokens to draw; fewer if the document ends before.
        window: Number of tokens that the model reads.
        vocabulary: Number of tokens that may be drawn; a model may have more.
        end: The token that ends a document.
        seed: Seed of the draws.
        env: The process group.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens, length = list(tokens), len(tokens)
    while len(tokens) < length + count:
        read = tokens[-window:]
        inputs = torch.tensor([read + [end] * (window - len(read))], device=env.device)
        logits = model(inputs, position=len(read) - 1)[0, :vocabulary]
        chosen = int(torch.multinomial(logits.double().softmax(-1).cpu(), 1, generator=generator))
        chosen = env.broadcast(chosen)
        if chosen == end:
            break
        tokens.append(chosen)
    return tokens
