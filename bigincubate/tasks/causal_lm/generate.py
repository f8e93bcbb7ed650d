"""Sample text from a language model."""

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
    """Return the given tokens, followed by at most ``count`` tokens that are sampled from the model's distribution.

    Every rank computes the distributions, and all ranks use the tokens that rank 0 samples. All forward passes have the
    same shape, so that a compiled model needs one graph. There is no KV cache: this is meant for short examples.

    Args:
        model: A `CausalLM` in evaluation mode.
        tokens: The first tokens, at least one.
        count: Maximum number of tokens to sample; there are fewer if the model predicts the end of the document.
        window: Maximum number of tokens that the model reads.
        vocabulary: Number of tokens of the tokenizer. The model may have logits for more; these are not sampled.
        end: The token that ends a document.
        seed: Seed of the sampling.
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
