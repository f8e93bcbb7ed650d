"""Write the files with which transformers loads the tokenizer of an exported language model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from ..errors import ArtifactError, MissingDependencyError
from ..files import hash_file, quote_path, read_json
from ..storage.artifacts import ModelSpec
from ..storage.run_directory import RunDir, find_run

TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
SEPARATOR = "<|endoftext|>"  # name of the separator of the bytes tokenizer
TokenizerSource = Path | Literal["bytes"]


def find_tokenizer(source: Path, spec: ModelSpec) -> TokenizerSource | None:
    """Return the tokenizer of a model's data.

    Args:
        source: A run directory or something in it, or an exported folder.
        spec: Description of the model.

    Returns:
        Its file, or ``"bytes"``; None if the description names no tokenizer.

    Raises:
        ArtifactError: The file is missing or has another content.
    """
    identity = spec.records.get("tokenizer")
    if not isinstance(identity, dict):
        return None
    if identity.get("name") == "bytes":
        return "bytes"
    candidates = [source]
    if (run := find_run(source)) is not None:
        candidates.append(run.data_path(run.load_recipe()))
    files = [folder / TOKENIZER_FILE for folder in candidates]
    for file in files:
        if file.is_file() and hash_file(file) == identity.get("sha256"):
            return file
    raise ArtifactError(
        f"the tokenizer of {quote_path(source)} (SHA-256 {identity.get('sha256')}) is not at"
        f" {' or '.join(quote_path(file) for file in files)}: copy it to one of these places"
    )


def identify_exported_tokenizer(source: Path) -> str | None:
    """Return the SHA-256 of the tokenizer file in an exported folder; None if there is none.

    The file is a rewritten copy of that of the model's data, so it has another hash.

    Args:
        source: An exported folder, or a run directory that contains one.
    """
    files = (source / TOKENIZER_FILE, RunDir(source).exported / TOKENIZER_FILE)
    return next((hash_file(file) for file in files if file.is_file()), None)


def write_tokenizer_files(tokenizer: TokenizerSource, folder: Path, *, separator: int, window: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``.

    The loaded tokenizer produces the same tokens as in training: it adds no tokens, and recognizes no special tokens in
    text.

    Args:
        tokenizer: The file of a tokenizer of the library ``tokenizers``, or ``"bytes"``.
        folder: The folder to write to.
        separator: The token before each document.
        window: Number of tokens that the model reads.

    Raises:
        ArtifactError: The tokenizer does not have the separator.
        MissingDependencyError: The library is not installed.
    """
    file = folder / TOKENIZER_FILE
    if tokenizer == "bytes":
        _write_bytes_tokenizer(file)
    else:
        assert isinstance(tokenizer, Path)
        shutil.copyfile(tokenizer, file)
    content: dict[str, Any] = read_json(file) or {}
    name = next((token["content"] for token in content.get("added_tokens", []) if token["id"] == separator), None)
    if name is None:
        raise ArtifactError(f"{tokenizer} has no special token {separator}, which is the separator of the data")
    content |= dict.fromkeys(("truncation", "padding", "post_processor"))  # these would remove or add tokens
    file.write_text(json.dumps(content, ensure_ascii=False) + "\n")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name,
        "eos_token": name,
        "model_max_length": window,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    (folder / TOKENIZER_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _write_bytes_tokenizer(file: Path) -> None:
    """Write a byte-level BPE tokenizer without merges: its tokens are the 256 bytes, and the separator 256."""
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    except ImportError:
        raise MissingDependencyError(
            "exporting a tokenizer needs the library tokenizers; install it with: pip install 'bigincubate[text]'"
        ) from None
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())} | {SEPARATOR: 256}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(SEPARATOR, special=True, normalized=False)])
    tokenizer.save(str(file))


def _byte_characters() -> list[str]:
    """Return the character that represents each byte in byte-level tokenizers. Printable bytes represent themselves.

    Source: the function ``bytes_to_unicode`` of GPT-2's encoder.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
