"""Convert windows of tokens to rows of a batch: inputs, and the token that follows each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.text.windows import read_tokens
from ...models.language.causal_lm import IGNORED


class TokenWindows:
    """Decode windows of tokens and collate them.

    Args:
        window: Number of inputs of a window, which has one more token.
        vocabulary: Number of different tokens.
        separator: The token before each document, also used for padding.
        mask_documents: Whether batches have a column with the number of each input's document.
        byte_lengths: Number of bytes of text that each token represents, ``[vocabulary]``, for evaluation; None for
            training.
    """

    def __init__(
        self,
        window: int,
        vocabulary: int,
        separator: int,
        *,
        mask_documents: bool = False,
        byte_lengths: np.ndarray | None = None,
    ) -> None:
        self.window, self.vocabulary, self.separator = window, vocabulary, separator
        self.mask_documents = mask_documents
        self.byte_lengths = None if byte_lengths is None else torch.from_numpy(byte_lengths.astype(np.int64))

    def decode(self, record: dict[str, Any]) -> np.ndarray:
        """Return the tokens of a window.

        Raises:
            ValueError: There are too few or too many tokens, or one is not in the vocabulary.
        """
        tokens = read_tokens(record["tokens"])
        if tokens.ndim != 1 or not 2 <= len(tokens) <= self.window + 1:
            raise ValueError(f"a window of shape {tokens.shape}; expected 2 to {self.window + 1} tokens")
        for token in (int(tokens.min()), int(tokens.max())):
            if not 0 <= token < self.vocabulary:
                raise ValueError(f"token {token} is not in 0 to {self.vocabulary - 1}")
        return tokens

    def compact(self, sample: np.ndarray) -> tuple[np.ndarray, int]:
        """Return the tokens and their size in bytes."""
        return sample, sample.nbytes

    def view(self, sample: np.ndarray, epoch: int, sample_id: int, repeat: int) -> np.ndarray:
        """Return the tokens."""
        return sample

    def collate(self, views: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """Return the columns of a batch, int64 ``[n, window]``.

        ``inputs`` are the tokens, and ``targets`` the tokens that follow them, or `IGNORED` beyond the end of a short
        window. With ``mask_documents``, ``documents`` are the numbers of the inputs' documents within their window. For
        evaluation, ``bytes`` are the numbers of bytes of the targets, which are 0 for separators.
        """
        tokens = torch.full((len(views), self.window + 1), self.separator)
        targets = torch.full((len(views), self.window), IGNORED)
        for row, view in enumerate(views):
            values = torch.from_numpy(view.astype(np.int64))
            tokens[row, : len(values)] = values
            targets[row, : len(values) - 1] = values[1:]
        inputs = tokens[:, :-1].contiguous()
        columns = {"inputs": inputs, "targets": targets}
        if self.mask_documents:
            columns["documents"] = (inputs == self.separator).cumsum(1)
        if self.byte_lengths is not None:
            columns["bytes"] = self.byte_lengths[tokens[:, 1:]] * (targets != IGNORED)
        return columns
