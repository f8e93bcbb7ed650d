"""A small recipe of a language model, and data sets of tokens, which the package's own functions write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bigincubate.data.chunks import write_chunk, write_description
from bigincubate.data.dataset import RecordSchema
from bigincubate.data.text.windows import TOKENS

WINDOW, SEPARATOR = 16, 256
RECIPE = """
name = "tokens"
[task]
name = "causal_lm"
[model]
library = "transformers"
name = "llama"
context_length = 16
[model.args]
vocab_size = 257
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 4
num_attention_heads = 2
num_key_value_heads = 2
[data]
source = "made-up-text"
[plan]
target_depths = [2, 2]
meta_depths = [1, 1]
[text]
prompt = "a"
example_tokens = 4
[train]
batch_size = 16
max_steps = 12
lr = 3e-3
[log]
every_steps = 1
[checkpoint]
every_steps = 4
"""


def write_recipe(folder: Path, *, name: str = "tokens.toml", changes: Sequence[tuple[str, str]] = ()) -> Path:
    """Write the recipe with the given replacements in its text."""
    text = RECIPE
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    file = folder / name
    file.write_text(text)
    return file


def write_windows(folder: Path, train: Iterable[Any], val: Iterable[Any], *, equal: bool = False) -> Path:
    """Write windows (lists of at most `WINDOW` + 1 tokens) as a data set that looks prepared from bytes."""
    metadata = {"window": WINDOW, "tokenizer": {"name": "bytes"}, "vocabulary": 257, "separator": SEPARATOR}
    schema = RecordSchema(TOKENS, {"tokens": "ndarray:uint16"}, metadata | {"domains": ["all"], "equal_windows": equal})
    for split, windows in (("train", train), ("val", val)):
        (folder / split).mkdir(parents=True)
        records = ({"tokens": np.array(window, np.uint16)} for window in windows)
        write_chunk(folder / split / "00000", schema.columns, records)
    chunks = {split: [folder / split / "00000"] for split in ("train", "val")}
    write_description(folder, schema, chunks, {"kind": "windows of a test"}, {})
    return folder
