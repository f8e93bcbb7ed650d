"""Windows of tokens: the records of prepared text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dataset import RecordSchema
from .tokenizers import Tokenizer

TOKENS = "tokens"


def token_schema(window: int, tokenizer: Tokenizer, identity: dict[str, Any], domains: list[str]) -> RecordSchema:
    """Return the schema of windows of tokens.

    Args:
        window: Number of inputs of a window; a record has one more token.
        tokenizer: The tokenizer.
        identity: The tokenizer as the description of the data identifies it.
        domains: Names of the domains of the documents.
    """
    kind = token_type(tokenizer.vocabulary).name
    metadata = {
        "window": window,
        "tokenizer": identity,
        "vocabulary": tokenizer.vocabulary,
        "separator": tokenizer.separator,
        "equal_windows": True,  # in the training split
        "domains": domains,
    }
    return RecordSchema(TOKENS, {"tokens": f"ndarray:{kind}"}, metadata)


def token_type(vocabulary: int) -> np.dtype[Any]:
    """Return the type of stored tokens."""
    return np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)


def read_tokens(value: NDArray[Any] | bytes) -> NDArray[Any]:
    """Return the tokens of a record: an array, or the bytes of 64-bit integers as llm-foundry may store them.

    Raises:
        ValueError: If the number of bytes is not a multiple of eight.
    """
    return np.frombuffer(value, np.int64) if isinstance(value, bytes) else value


def join_documents(texts: Iterable[str], tokenizer: Tokenizer) -> NDArray[Any]:
    """Return the concatenated tokens of documents, with the separator before each document."""
    kind = token_type(tokenizer.vocabulary)
    pieces = [np.empty(0, kind)]
    for text in texts:
        pieces += [np.array([tokenizer.separator], kind), tokenizer.encode(text).astype(kind)]
    return np.concatenate(pieces)


def cut_windows(tokens: NDArray[Any], window: int, *, keep_rest: bool) -> Iterator[NDArray[Any]]:
    """Yield windows of ``window + 1`` tokens that overlap by one, so that each token but the first is a target once.

    Args:
        tokens: The tokens.
        window: Number of targets of a window.
        keep_rest: Whether to yield the remaining tokens at the end as a shorter window.
    """
    for first in range(0, len(tokens) - 1, window):
        piece = tokens[first : first + window + 1]
        if keep_rest or len(piece) == window + 1:
            yield piece
