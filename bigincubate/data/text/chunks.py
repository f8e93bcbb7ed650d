"""Write the tokens of text in chunks of whole documents.

The hash of a document's name determines its chunk, so adding or removing a document changes only one chunk. A record of
what a chunk was made from is written after its shards; a chunk without a matching record is written again.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ...files import read_json, write_json
from ..chunk_records import RECORDS
from ..chunks import write_chunk
from ..samples import Sample
from ..sources.slices import FileSlice
from ..splits import hash_name, sort_by_name_hash
from .tokenizers import BYTES, ByteTokenizer, FileTokenizer, Tokenizer
from .windows import cut_windows, join_documents, token_schema

CHUNK_BYTES = 2**22  # mean size of the text of a chunk


class TokenPlan(NamedTuple):
    """How text becomes windows of tokens.

    Attributes:
        window: Number of targets of a window.
        name: Kind of the tokenizer: one of the constants of `tokenizers`.
        file: The file of the tokenizer; None for the tokenizer ``bytes``.
        sha256: The SHA-256 of this file; empty without a file.
    """

    window: int
    name: str = BYTES
    file: Path | None = None
    sha256: str = ""

    @property
    def identity(self) -> dict[str, str]:
        """Return the tokenizer as the description of the data identifies it."""
        return {"name": self.name} if self.file is None else {"name": self.name, "sha256": self.sha256}

    def load(self) -> Tokenizer:
        """Return the tokenizer."""
        return ByteTokenizer() if self.file is None else _load_file(self.file, self.sha256)


class TextChunk(NamedTuple):
    """Documents that are written together.

    Attributes:
        folder: The folder of the shards.
        documents: The documents.
        contents: The hash of the text of each document.
        plan: How the text becomes windows.
        part: The partition they belong to.
    """

    folder: Path
    documents: list[Sample]
    contents: list[str]
    plan: TokenPlan
    part: int = 0

    @property
    def split(self) -> str:
        """Return the split."""
        return self.folder.parent.name

    @property
    def record_file(self) -> Path:
        """Return the file that records what the chunk was made from."""
        return self.folder.parent.parent / RECORDS / f"{self.split}-{self.folder.name}.json"

    @property
    def key(self) -> str:
        """Return a SHA-256 of everything that determines the content of the chunk."""
        values = (self.split, self.contents, self.plan.window, self.plan.sha256)
        return hashlib.sha256(repr(values).encode()).hexdigest()

    def counts(self) -> dict[str, int] | None:
        """Return the numbers of tokens and windows; None if the chunk is missing or was made from something else."""
        record = read_json(self.record_file) if self.folder.exists() else None
        return record["counts"] if record and record.get("key") == self.key else None


@lru_cache(maxsize=1)
def _load_file(file: Path, sha256: str) -> FileTokenizer:
    return FileTokenizer(file)


def make_chunks(
    folder: Path, parts: Sequence[Sequence[Sample]], contents: dict[str, str], plan: TokenPlan
) -> list[TextChunk]:
    """Return the chunks of a split; each has documents of one partition, in the order of the hashes of their names."""
    chunks: list[TextChunk] = []
    first = 0
    for part, documents in enumerate(parts):
        count = math.ceil(sum(document_bytes(document) for document in documents) / CHUNK_BYTES)
        groups: list[list[Sample]] = [[] for _ in range(count)]
        for document in sort_by_name_hash(documents):
            # not the first bytes of the hash, which determine the split and so are similar in all validation documents
            groups[int.from_bytes(hash_name(document.name)[8:16], "big") * count >> 64].append(document)
        chunks += [
            TextChunk(folder / f"{first + n:05}", group, [contents[document.name] for document in group], plan, part)
            for n, group in enumerate(groups)
            if group
        ]
        first += count
    return chunks


def document_bytes(document: Sample) -> int:
    """Return the number of bytes of a document's text."""
    assert isinstance(document.image, FileSlice)
    return document.image.size


def read_text(document: Sample) -> str:
    """Return the text of a document."""
    return document.read().decode()


def write_text_chunk(chunk: TextChunk) -> int:
    """Write a chunk atomically, and return the number of bytes of its text."""
    chunk.record_file.unlink(missing_ok=True)
    if chunk.folder.exists():
        shutil.rmtree(chunk.folder)
    tokenizer = chunk.plan.load()
    tokens = join_documents(map(read_text, chunk.documents), tokenizer)
    counts = {"tokens": len(tokens), "windows": 0}

    def windows() -> Iterator[dict[str, Any]]:
        for window in cut_windows(tokens, chunk.plan.window, keep_rest=chunk.split == "val"):
            counts["windows"] += 1
            yield {"tokens": window}

    write_chunk(chunk.folder, token_schema(chunk.plan.window, tokenizer, {}, []).columns, windows())
    write_json(chunk.record_file, {"key": chunk.key, "counts": counts})
    return sum(map(document_bytes, chunk.documents))
