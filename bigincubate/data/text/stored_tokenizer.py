"""Choose, train and store the tokenizer of a data set."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ...errors import ConfigError
from ...files import fsync_path, hash_file, link_or_copy, read_json, write_json
from ..chunk_records import RECORDS
from ..process_pool import run_in_processes
from ..samples import Sample
from .chunks import TokenPlan, document_bytes, read_text
from .tokenizers import BPE, BYTES, FILE, TOKENIZER_FILE, FileTokenizer, import_tokenizers, train_bpe

MIN_BPE_TOKENS = 258  # the bytes, the separator, and one merge
MAX_TRAINING_BYTES = 2**30  # of the training documents, for training a tokenizer


class TokenizerChoice(NamedTuple):
    """The tokenizer that a user chose.

    Attributes:
        window: Number of tokens that a language model reads at once.
        train: Number of tokens of the tokenizer to train; None if none is trained.
        content: The content of the given tokenizer file; None without a file.
    """

    window: int
    train: int | None = None
    content: bytes | None = None

    @property
    def identity(self) -> str:
        """Return the text that identifies the tokenizer in the description of the data."""
        if self.content is not None:
            return hashlib.sha256(self.content).hexdigest()
        return BYTES if self.train is None else f"{BPE}:{self.train}"


class _Training(NamedTuple):
    """A tokenizer to train."""

    file: Path
    documents: Sequence[Sample]
    vocabulary: int
    jobs: int


def choose_tokenizer(text: str, window: int) -> TokenizerChoice:
    """Parse the name of a tokenizer: ``bytes``, ``bpe:N``, or the path of a file.

    Raises:
        ConfigError: If N is not an integer or is out of range, or the file is refused.
        MissingDependencyError: If a required package is not installed.
    """
    if text == BYTES:
        return TokenizerChoice(window)
    name, _, size = text.partition(":")
    if name != BPE:
        FileTokenizer(Path(text))
        return TokenizerChoice(window, content=Path(text).read_bytes())
    if not size.isdecimal() or not MIN_BPE_TOKENS <= int(size) <= 2**24:
        raise ConfigError(f"tokenizer {text}: expected bpe:N with a vocabulary of N tokens, at least {MIN_BPE_TOKENS}")
    import_tokenizers(f"tokenizer {text}")
    return TokenizerChoice(window, train=int(size))


def store_tokenizer(
    out: Path, documents: Sequence[Sample], contents: Mapping[str, str], choice: TokenizerChoice, jobs: int
) -> TokenPlan:
    """Store the tokenizer in the folder of the data. Train it first, unless it was trained on the same documents.

    Args:
        out: The folder of the data.
        documents: The training documents.
        contents: The hash of the text of each document, by name.
        choice: The tokenizer.
        jobs: Number of threads.
    """
    file, record = out / TOKENIZER_FILE, out / RECORDS / TOKENIZER_FILE
    if choice.content is not None:
        file.write_bytes(choice.content)
        fsync_path(file)
        return TokenPlan(choice.window, FILE, file, choice.identity)
    if choice.train is None:
        file.unlink(missing_ok=True)
        return TokenPlan(choice.window)
    key = hashlib.sha256(repr((choice.train, [contents[document.name] for document in documents])).encode()).hexdigest()
    stored = read_json(record) or {}
    if stored.get("key") != key or not file.exists() or hash_file(file) != stored.get("sha256"):
        record.parent.mkdir(exist_ok=True)
        training = _Training(file, documents, choice.train, jobs)
        with run_in_processes(_train, [training], 1, "tokenizer", always_fork=True) as trained:
            stored = {"key": key, "sha256": next(trained)}
        write_json(record, stored)
    return TokenPlan(choice.window, BPE, file, stored["sha256"])


def copy_tokenizer(plan: TokenPlan, folder: Path) -> None:
    """Store the tokenizer in the folder of a partition as well."""
    if plan.file is not None:
        folder.mkdir(parents=True)
        link_or_copy(plan.file, folder / TOKENIZER_FILE)


def _train(training: _Training) -> str:
    """Train a tokenizer, and return the SHA-256 of its file."""
    os.environ.setdefault("RAYON_NUM_THREADS", str(training.jobs))  # the threads of the library
    train_bpe(_first_texts(training.documents), training.vocabulary, training.file)
    fsync_path(training.file)
    return hash_file(training.file)


def _first_texts(documents: Sequence[Sample]) -> Iterator[str]:
    """Yield the texts of documents up to the maximum size for training a tokenizer."""
    size = 0
    for document in documents:
        if size >= MAX_TRAINING_BYTES:
            return
        size += document_bytes(document)
        yield read_text(document)
