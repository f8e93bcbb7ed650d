"""Adopted windows of tokens: their column, the checks of each record, and their schema."""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...errors import ConfigError
from ...files import fsync_path
from ..adopted_images import Description, ReadColumn
from ..dataset import RecordSchema
from ..mds_index import MdsSplit, find_encodings
from .tokenizers import BPE, BYTES, FILE, TOKENIZER_FILE, ByteTokenizer, FileTokenizer, Tokenizer
from .windows import TOKENS, read_tokens

ENCODINGS = ("ndarray", "bytes")
DOMAIN = "text"


@dataclass(frozen=True)
class AdoptedWindows:
    """Windows of tokens in shards that another program wrote; see `AdoptedRecords`.

    Attributes:
        stored: The name of the column in the shards.
        encodings: Its encoding.
        tokenizer: The tokenizer as the description of the data identifies it.
        file: The file of the tokenizer; None for the tokenizer ``bytes``.
        vocabulary: Number of tokens.
        separator: The token before each document.
    """

    unit: ClassVar[str] = "window"
    stored: dict[str, str]
    encodings: dict[str, str]
    tokenizer: dict[str, str]
    file: Path | None
    vocabulary: int
    separator: int

    @classmethod
    def find(cls, splits: Mapping[str, MdsSplit], columns: Mapping[str, str], tokenizer: str | None) -> AdoptedWindows:
        """Return the windows in the shards of all splits.

        Args:
            splits: The splits.
            columns: The name of the column with the ``tokens``.
            tokenizer: ``bytes``, or the path of a ``tokenizer.json``.

        Raises:
            ConfigError: If the column is missing or has another type, or the tokenizer is missing or not supported.
            MissingDependencyError: If the library of the tokenizer is not installed.
        """
        if columns.keys() != {TOKENS}:
            raise ConfigError("--columns: expected either image=NAME,label=NAME or tokens=NAME")
        encodings = find_encodings(splits, columns)
        if encodings[TOKENS].partition(":")[0] not in ENCODINGS:
            raise ConfigError(
                f"column {columns[TOKENS]!r} is {encodings[TOKENS]}, but tokens are {' or '.join(ENCODINGS)}"
            )
        if tokenizer is None or tokenizer.startswith(f"{BPE}:"):
            raise ConfigError("tokens need the tokenizer that made them: add --tokenizer FILE, or --tokenizer bytes")
        file = None if tokenizer == BYTES else Path(tokenizer)
        used: Tokenizer = ByteTokenizer() if file is None else FileTokenizer(file)
        identity = {"name": BYTES if file is None else FILE}
        if file is not None:
            identity["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        return cls(dict(columns), encodings, identity, file, used.vocabulary, used.separator)

    @property
    def given(self) -> dict[str, Any]:
        """Return the name of the column and the tokenizer."""
        return {"columns": self.stored, "tokenizer": self.tokenizer}

    @property
    def reading_schema(self) -> RecordSchema:
        """Return the schema without metadata, because the length of the windows is not known yet."""
        return RecordSchema(TOKENS, self.encodings, {})

    def measure(self, read: ReadColumn, *, first: bool) -> int:
        """Return the number of tokens of a window.

        Raises:
            ValueError: If there are fewer than two tokens, or one is not in the vocabulary.
        """
        tokens = read_tokens(read(TOKENS))
        if tokens.ndim != 1 or len(tokens) < 2 or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"an array {tokens.shape} of {tokens.dtype}; expected one dimension with two or more integers"
            )
        smallest, largest = int(tokens.min()), int(tokens.max())
        if smallest < 0 or largest >= self.vocabulary:
            wrong = smallest if smallest < 0 else largest
            raise ValueError(f"token {wrong} is not in 0 to {self.vocabulary - 1}, the tokens of the tokenizer")
        return len(tokens)

    def describe(self, counts: Mapping[str, Counter[int]]) -> Description:
        """Return the description, given how often each number of tokens occurs in each split."""
        window = max(length for lengths in counts.values() for length in lengths) - 1
        metadata = {
            "window": window,
            "tokenizer": self.tokenizer,
            "vocabulary": self.vocabulary,
            "separator": self.separator,
            "equal_windows": len(counts["train"]) == 1,
            "domains": [DOMAIN],
        }
        totals = {split: sum(length * times for length, times in lengths.items()) for split, lengths in counts.items()}
        line = f"tokens (training + validation): {totals['train']:,} + {totals['val']:,}"
        schema = RecordSchema(TOKENS, self.encodings, metadata)
        line = f"{line}, in windows of {window:,}: set model.context_length = {window}"
        return Description(schema, {"tokens": totals}, [line])

    def add_files(self, folder: Path) -> None:
        """Copy the file of the tokenizer."""
        if self.file is not None:
            shutil.copyfile(self.file, folder / TOKENIZER_FILE)
            fsync_path(folder / TOKENIZER_FILE)
