"""Write folders of small documents, and read the data that was prepared from them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bigincubate.data.dataset import open_dataset
from bigincubate.data.shards import Shards
from bigincubate.data.text.windows import read_tokens

WORDS = ("tide", "boat", "naïve", "東京", "🙂", "rope", "gull", "<|endoftext|>", "net", "\t", "\r\n", "keel")


def make_text(number: int) -> str:
    """Return a text of several to several hundred bytes, which is different for each number."""
    random = np.random.RandomState(number)
    return f"{number}: " + " ".join(WORDS[n] for n in random.randint(0, len(WORDS), 1 + 7 * (number % 13)))


def write_texts(root: Path, per_domain: int = 20, domains: str = "abc") -> Path:
    """Write SOURCE/<domain>/*.txt."""
    for label, name in enumerate(domains):
        (root / name).mkdir(parents=True)
        for row in range(per_domain):
            text = make_text(label * per_domain + row)
            (root / name / f"{row:04}.txt").write_bytes(text.encode())
    return root


class WindowDecoder:
    """Return the tokens of windows unchanged."""

    def decode(self, record: dict[str, Any]) -> np.ndarray:
        """Return the tokens."""
        return read_tokens(record["tokens"])

    def compact(self, sample: np.ndarray) -> tuple[np.ndarray, int]:
        """Return the tokens and their size."""
        return sample, sample.nbytes


def read_windows(folder: Path, split: str) -> list[list[np.ndarray]]:
    """Return the windows of each shard of a split; small chunks have one shard each."""
    shards = Shards(open_dataset(folder), split, WindowDecoder())
    ids = iter(range(sum(shard.samples for shard in shards.shards)))
    return [[shards.read(next(ids)) for _ in range(shard.samples)] for shard in shards.shards]


def join_windows(windows: list[np.ndarray]) -> np.ndarray:
    """Return the tokens that the windows of a chunk were cut from."""
    for before, after in itertools.pairwise(windows):
        assert before[-1] == after[0]  # they overlap by one token
    return np.concatenate([windows[0][:1], *(window[1:] for window in windows)])


def split_documents(tokens: np.ndarray, separator: int) -> Iterator[list[int]]:
    """Yield the tokens of each document, without the separator before it."""
    assert tokens[0] == separator
    starts = [*np.flatnonzero(tokens == separator).tolist(), len(tokens)]
    for first, last in itertools.pairwise(starts):
        yield tokens[first + 1 : last].tolist()


def read_listed(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of the list of documents."""
    return [json.loads(line) for line in (folder / "documents.jsonl").read_text().splitlines()]
