"""Lossless tokenizers: the tokens of any text represent exactly its bytes.

Special tokens are never recognized in text: ``<|endoftext|>`` in a document is encoded like any other text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import ConfigError, MissingDependencyError
from ...files import name_in_errors, quote_path, raise_os_errors, unreadable_error
from ..dataset import DatasetInfo
from ..remote import check_hash, fetch

BYTES, BPE, FILE = "bytes", "bpe", "file"
TOKENIZER_FILE = "tokenizer.json"
SEPARATOR = "<|endoftext|>"
# names of end-of-text tokens; the first one that a tokenizer has is the separator
END_OF_TEXT = (SEPARATOR, "<|end_of_text|>", "<|eot|>", "</s>", "<eos>", "[EOS]", "<|im_end|>")
ROUND_TRIP_TEXTS = ("", " a  b\n\n\tc ", "naïve 東京 🙂 e\u0301 \u00a0\ufeff\r\n\0", "".join(map(chr, range(1, 0x250))))


class Tokenizer(Protocol):
    """Converts text to tokens and back."""

    @property
    def vocabulary(self) -> int:
        """Number of tokens, including the separator."""

    @property
    def separator(self) -> int:
        """The token before each document."""

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the tokens of a text; never the separator."""

    def decode(self, tokens: Sequence[int] | NDArray[Any]) -> str:
        """Return the text of tokens. Bytes that are not valid UTF-8 become U+FFFD. The separator has no text."""

    def byte_lengths(self) -> NDArray[np.int64]:
        """Return the number of bytes of text that each token represents, ``[vocabulary]``; 0 for the separator."""


class ByteTokenizer:
    """A token for each byte, and a separator."""

    vocabulary, separator = 257, 256

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the bytes of a text."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64)

    def decode(self, tokens: Sequence[int] | NDArray[Any]) -> str:
        """Return the text of bytes."""
        return bytes(token for token in map(int, tokens) if token != self.separator).decode(errors="replace")

    def byte_lengths(self) -> NDArray[np.int64]:
        """Return 1 for each byte."""
        return np.array([1] * 256 + [0])


class FileTokenizer:
    """A byte-level BPE tokenizer from a file of the library ``tokenizers``.

    Args:
        file: The file.

    Raises:
        ConfigError: If the tokenizer is not byte-level, is not lossless, or has no end-of-text token.
        MissingDependencyError: If the library is not installed.
    """

    def __init__(self, file: Path) -> None:
        library = import_tokenizers(f"reading {quote_path(file)}")
        try:
            content = json.loads(file.read_bytes())
            problem = _find_problem(content)
            names = [token["content"] for token in content["added_tokens"]]
        except OSError as error:
            raise unreadable_error(error, file, ConfigError) from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            problem, names = "it was not written by the library tokenizers", []
        if not problem and not any(name in names for name in END_OF_TEXT):
            problem = f"it has no end-of-text token to separate documents: expected one of {', '.join(END_OF_TEXT)}"
        if problem:
            raise ConfigError(f"tokenizer {quote_path(file)} is refused: {problem}")
        separator = next(name for name in END_OF_TEXT if name in names)
        for token in content["added_tokens"]:
            token["special"] = token["special"] or token["content"] == separator
        try:
            self._tokenizer = library.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library raises Exception itself
            raise ConfigError(f"tokenizer {quote_path(file)} is refused: {str(error).splitlines()[0]}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # encode their names in text like any other text
        self._special = {token["id"] for token in content["added_tokens"] if token["special"]}
        self.separator: int = self._tokenizer.token_to_id(separator)
        for text in (*ROUND_TRIP_TEXTS, *END_OF_TEXT, " ".join(names)):
            tokens = self.encode(text)
            if self.decode(tokens) != text or self.byte_lengths()[tokens].sum() != len(text.encode()):
                raise ConfigError(
                    f"tokenizer {quote_path(file)} is refused: it does not decode {text!r} to the same text"
                )

    @cached_property
    def vocabulary(self) -> int:
        """Number of tokens: one more than the largest ID."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @cached_property
    def _bytes(self) -> list[bytes]:
        """The bytes that each token represents."""
        byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
        own = [b""] * self.vocabulary
        for name, token in self._tokenizer.get_vocab(with_added_tokens=False).items():
            own[token] = bytes(byte_of[character] for character in name if character in byte_of)
        for token, added in self._tokenizer.get_added_tokens_decoder().items():
            own[token] = b"" if token in self._special else added.content.encode()
        return own

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the tokens of a text."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def decode(self, tokens: Sequence[int] | NDArray[Any]) -> str:
        """Return the text of tokens."""
        return b"".join(self._bytes[int(token)] for token in tokens).decode(errors="replace")

    def byte_lengths(self) -> NDArray[np.int64]:
        """Return the number of bytes of each token."""
        return np.array([len(own) for own in self._bytes], np.int64)


def load_tokenizer(info: DatasetInfo, remote: str | None = None) -> Tokenizer:
    """Return the tokenizer of a data set.

    Args:
        info: The data set.
        remote: URL from which a missing file of the tokenizer is downloaded.

    Raises:
        DataError: If the file of the tokenizer is missing or damaged.
    """
    identity = info.schema.metadata["tokenizer"]
    if identity["name"] == BYTES:
        return ByteTokenizer()
    file = info.path / TOKENIZER_FILE
    if remote and not file.exists():
        fetch(remote, info.path, [TOKENIZER_FILE])
    check_hash(file, identity["sha256"], name=str(file))
    return FileTokenizer(file)


def import_tokenizers(purpose: str) -> Any:
    """Return the library ``tokenizers``.

    Raises:
        MissingDependencyError: If it is not installed.
    """
    try:
        import tokenizers
    except ImportError:
        raise MissingDependencyError(
            f"{purpose} needs the library tokenizers; install it with: pip install 'bigincubate[text]'"
        ) from None
    return tokenizers


def train_bpe(texts: Iterable[str], vocabulary: int, file: Path) -> None:
    """Train a byte-level BPE tokenizer and write it to a file. The same texts give the same file.

    Call it in a separate process: the library starts threads, and then warns if its process is forked.

    Args:
        texts: The texts.
        vocabulary: Maximum number of tokens, including 256 bytes and the separator. Short texts may give fewer.
        file: The file to write.
    """
    library = import_tokenizers("training a tokenizer")
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = library.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    temporary = file.with_name(f".tmp-{file.name}-{os.getpid()}")
    try:
        with name_in_errors(temporary), raise_os_errors():
            tokenizer.save(str(temporary))
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ checks


def _find_problem(content: dict[str, Any]) -> str:
    """Return why a tokenizer is not byte-level or not lossless; empty if it is both."""
    model = content["model"]
    if model.get("type") != "BPE":
        return f"its model is {model.get('type')}, but only byte-level BPE is supported"
    if content.get("normalizer") not in (None, {"type": "Sequence", "normalizers": []}):
        return f"its normalizer {content['normalizer'].get('type')} changes text"
    steps = _flatten(content.get("pre_tokenizer"))
    if "ByteLevel" not in [step["type"] for step in steps]:
        found = ", ".join(step["type"] for step in steps) or "none"
        return f"only byte-level BPE is supported, which has the pre-tokenizer ByteLevel; it has {found}"
    for step in steps:
        if step.get("add_prefix_space"):
            return "it adds a space before text (add_prefix_space)"
        if step.get("behavior") == "Removed":
            return f"its pre-tokenizer {step['type']} removes text"
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            return f"its model has {key} = {model[key]!r}"
    if missing := [byte for byte, character in enumerate(_byte_characters()) if character not in model["vocab"]]:
        return f"it has no token for {len(missing)} of the 256 bytes, such as {missing[0]}"
    for token in content["added_tokens"]:
        if not token["special"] and (token["lstrip"] or token["rstrip"]):
            return f"its token {token['content']!r} removes adjacent spaces"
    return ""


def _flatten(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return a pre-tokenizer as the list of its steps."""
    if step is None:
        return []
    return [inner for own in step["pretokenizers"] for inner in _flatten(own)] if step["type"] == "Sequence" else [step]


def _byte_characters() -> list[str]:
    """Return the character that represents each byte in byte-level tokenizers. Printable bytes represent themselves.

    Source: the function ``bytes_to_unicode`` of GPT-2's encoder.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
