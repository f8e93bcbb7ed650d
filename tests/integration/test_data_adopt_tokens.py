"""`data adopt` of windows of tokens, as arrays and as bytes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mds_files import write_mds
from test_data_adopt import Called
from token_data import WINDOW, write_recipe


@pytest.mark.parametrize("encoding", ["ndarray", "bytes"])
def test_tokens_are_adopted(tmp_path: Path, call: Called, encoding: str) -> None:
    random = np.random.default_rng(0)
    texts = [random.integers(0, 257, WINDOW + 1) for _ in range(60)]

    def describe(number: int, image: bytes, label: int) -> dict[str, Any]:
        return {"ids": texts[label].astype(np.int64).tobytes() if encoding == "bytes" else texts[label]}

    write_mds(tmp_path / "mds" / "train", [(b"", n) for n in range(50)], columns={"ids": encoding}, describe=describe)
    write_mds(
        tmp_path / "mds" / "val", [(b"", 50 + n) for n in range(10)], columns={"ids": encoding}, describe=describe
    )
    words = ["data", "adopt", tmp_path / "mds", "--columns", "tokens=ids", "--jobs", 1]
    code, _, err = call(*words)
    assert (code, "--tokenizer FILE" in err) == (2, True)
    code, out, err = call(*words, "--tokenizer", "bytes")
    assert (code, err) == (0, "")
    assert "50 train, 10 val windows of 16 tokens" in out
    sets = ["--set", f"data.path={tmp_path / 'mds' / 'adopted'}", "--set", "train.max_steps=2"]
    recipe = write_recipe(tmp_path, changes=[('source = "made-up-text"', "")])
    code, _, err = call("train", recipe, "--run-dir", tmp_path / "run", "--phase", "pretrain", *sets)
    assert code == 0, err
    texts[7] = texts[7] + 257
    shutil.rmtree(tmp_path / "mds")
    for split in ("train", "val"):
        write_mds(tmp_path / "mds" / split, [(b"", n) for n in (1, 7)], columns={"ids": encoding}, describe=describe)
    code, _, err = call(*words, "--tokenizer", "bytes")
    assert code == 3
    assert f"shard.00000.mds.zstd, row 1: token {texts[7].max()} is not in 0 to 256" in err
