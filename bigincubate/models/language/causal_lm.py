"""A causal language model: a model of transformers without a head, and a head that computes the loss in chunks.

The loop over the blocks is implemented here, because that of transformers builds a dense attention mask for every
batch, with which torch cannot use its flash attention kernel.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # target of a position whose loss does not count
CHUNK_TOKENS = 1024


class ChunkedHead(nn.Linear):
    """The output layer. With targets, it computes losses in chunks, so the logits of all tokens are never in memory.

    One forward call computes all chunks, so that a sharding strategy gathers the weight only once.

    Attributes:
        chunk_tokens: Number of tokens whose logits are computed at once.
    """

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__(width, vocabulary, bias=False)
        self.chunk_tokens = CHUNK_TOKENS

    def forward(  # type: ignore[override]
        self, hidden: Tensor, targets: Tensor | None = None, with_hits: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits, or the losses of the targets.

        Args:
            hidden: Output of the final norm, ``[n, T, width]``.
            targets: The token to predict at each position or `IGNORED`, int64 ``[n, T]``.
            with_hits: Whether to return the hits as well.

        Returns:
            Without targets, the logits ``[n, T, V]``. With targets, the cross entropy of each target, float32
            ``[n, T]``, which is 0 for ignored targets. With hits, also whether each target has the largest logit, bool
            ``[n, T]``.
        """
        if targets is None:
            return super().forward(hidden)
        recompute = torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad)
        # the backward pass recomputes the logits of each chunk
        score = partial(checkpoint, self._score, use_reentrant=False, preserve_rng_state=False)
        pairs = zip(
            hidden.flatten(0, 1).split(self.chunk_tokens), targets.flatten().split(self.chunk_tokens), strict=True
        )
        scored = [(score if recompute else self._score)(rows, expected, with_hits) for rows, expected in pairs]
        losses = torch.cat([loss for loss, _ in scored]).view(targets.shape)
        if not with_hits:
            return losses
        return losses, torch.cat([hits for _, hits in scored if hits is not None]).view(targets.shape)

    def _score(self, rows: Tensor, targets: Tensor, with_hits: bool) -> tuple[Tensor, Tensor | None]:
        logits = super().forward(rows).float()
        losses = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
        return losses, logits.argmax(-1) == targets if with_hits else None


class CausalLM(nn.Module):
    """A model of transformers without its head, and a `ChunkedHead`, which never shares the embedding's weight.

    The names of the tensors begin as in transformers' ``LlamaForCausalLM``: with ``model.`` or ``lm_head.``.

    Args:
        model: The model without a head.
        embedding: Name of its token embedding.
        positions: Name of its learned position embedding; None if it has the rotary embedding ``rotary_emb``.
        blocks: Name of its list of blocks.
        norm: Name of its final norm.
    """

    def __init__(self, model: nn.Module, *, embedding: str, positions: str | None, blocks: str, norm: str) -> None:
        super().__init__()
        self.model = model
        self._names = embedding, positions, blocks, norm
        tokens = model.get_submodule(embedding)
        assert isinstance(tokens, nn.Embedding)
        self.lm_head = ChunkedHead(tokens.embedding_dim, tokens.num_embeddings)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        *,
        with_hits: bool = False,
        position: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits, or the losses of the targets; see `ChunkedHead.forward`.

        Args:
            tokens: Tokens, int64 ``[n, T]``.
            targets: The token to predict at each position or `IGNORED`, int64 ``[n, T]``.
            documents: The number of each token's document, which never decreases within a row, int64 ``[n, T]``. Tokens
                then attend only to their own document, and positions restart at each document.
            with_hits: Whether to return the hits as well.
            position: If given, compute only the logits of this position, ``[n, V]``.
        """
        embedding, positions, blocks, norm = self._names
        places, mask = locate_tokens(tokens, documents)
        hidden = self.model.get_submodule(embedding)(tokens)
        options: dict[str, Any] = {"attention_mask": mask}
        if positions is not None:
            hidden = hidden + self.model.get_submodule(positions)(places)
        else:
            options["position_embeddings"] = rotary_table(self.model.get_submodule("rotary_emb"), places)
        for block in self.model.get_submodule(blocks).children():
            output = block(hidden, **options)
            hidden = output[0] if isinstance(output, tuple) else output
        if position is not None:
            hidden = hidden[:, position]
        return self.lm_head(self.model.get_submodule(norm)(hidden), targets, with_hits)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the embeddings' weights. timm's optimizer factory applies no weight decay to them."""
        return {f"{name}.weight" for name, module in self.named_modules() if isinstance(module, nn.Embedding)}


def locate_tokens(tokens: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the position of each token, and the mask of attention.

    Args:
        tokens: Tokens ``[n, T]``.
        documents: The number of each token's document, which never decreases within a row, ``[n, T]``. None: each row
            is one document.

    Returns:
        The positions, int64 ``[1, T]`` or, with documents, ``[n, T]``; and a mask, bool ``[n, 1, T, T]``, or None for
        causal attention within the whole row, for which torch needs no mask.
    """
    index = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
    if documents is None:
        return index, None
    starts = documents != documents.roll(1, dims=1)
    starts[:, 0] = False  # the first token has position 0 in any case
    positions = index - (index * starts).cummax(dim=1).values
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    return positions, (same & (index.unsqueeze(2) >= index.unsqueeze(1))).unsqueeze(1)


@torch.no_grad()
def rotary_table(rotary: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosine and sine of each position and dimension, float32 ``[n, T, width of a head]``.

    The result is that of transformers' rotary embedding, whose own code does not run on the meta device.

    Args:
        rotary: A rotary embedding whose frequencies do not depend on the length of the input.
        positions: Positions ``[n, T]``.
    """
    angles = positions.unsqueeze(-1).float() * rotary.inv_freq.float()
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling
