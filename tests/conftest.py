"""What many tests share: a smoke-size recipe, and its data prepared once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

SMOKE = """
name = "smoke"
[model]
name = "vit_tiny_patch16_224"
img_size = 8
num_classes = 10
args = { patch_size = 2, embed_dim = 24, num_heads = 3 }
[data]
source = "digits-dev"
[plan]
target_depths = [2, 2]
meta_depths = [1, 1]
[train]
batch_size = 32
epochs = 100
max_steps = 12
lr = 2e-3
[augment]
crop = "pad"
pad = 1
flip = 0.0
eval_crop = 1.0
[mixup]
mixup = 0.2
[drop_path]
rate = 0.1
[ema]
decay = 0.9
[log]
every_steps = 2
[checkpoint]
every_steps = 4
[incubate]
init = "boundary"
"""


@pytest.fixture
def smoke(tmp_path: Path) -> Path:
    """A recipe of two modules and twelve steps a phase."""
    file = tmp_path / "smoke.toml"
    file.write_text(SMOKE)
    return file


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits' training part as MDS shards, prepared once a session."""
    from bigincubate.data.prepare import prepare

    out = tmp_path_factory.mktemp("digits") / "data"
    prepare("digits-dev", out)
    return out


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def bigincubate() -> Command:
    """Run the command line as a user does: ``bigincubate("plan", "digits")``."""

    def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "bigincubate", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}  # type: ignore[dict-item]
        return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, **options)  # type: ignore[call-overload,no-any-return]

    return run
