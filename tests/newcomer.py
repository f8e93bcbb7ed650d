"""The first hour of a newcomer, with an installed package: own photographs, a mistake, Ctrl-C, a fork, plain timm.

Run by `tests/integration/test_newcomer.py` in a directory of its own. Commands are forked from a process that has
everything imported, because an import of torch takes seconds.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from forked import Command, fork_ranks

RECIPE = """
[model]
name = "vit_tiny_patch16_224"
img_size = 32
num_classes = 2
args = { patch_size = 8, embed_dim = 24, num_heads = 3 }
[plan]
target_depths = [2, 2]
meta_depths = [1, 1]
[train]
batch_size = 16
epochs = 200
lr = 1e-3
[incubate.train]
epochs = 5
[finetune.train]
epochs = 5
"""


def shell() -> None:
    """A shell gives a command a process group of its own."""
    os.setpgrp()
    fork_ranks()


def start(line: str) -> Command:
    """Start a command line without its first word."""
    return Command(*shlex.split(line)[1:], before=shell)


def finish(line: str, code: int = 0) -> Command:
    """Run a command line to its end, and check its exit code."""
    command = start(line)
    assert command.wait(300) == code, f"{line}\n{command.out}{command.err}"
    return command


def write_photographs(folder: Path) -> None:
    """Cut the two photographs of scikit-learn into small JPEG files, one folder per photograph."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images()
    for file, pixels in zip(photographs.filenames, photographs.images, strict=True):
        (out := folder / Path(file).stem).mkdir(parents=True)
        for number in range(40):
            top, left = 40 * (number // 8), 70 * (number % 8)
            Image.fromarray(pixels[top : top + 64, left : left + 64]).save(out / f"{number}.jpg", quality=90)


def main() -> None:
    """Follow the README, in the current directory."""
    write_photographs(Path("photographs"))
    prepared = finish("bigincubate data prepare photographs --out data --jobs 1")
    assert "64 train, 16 val images of 2 classes" in prepared.out, prepared.out
    Path("mine.toml").write_text(RECIPE.replace("lr =", "learning_rate ="))
    line = "bigincubate run mine.toml --run-dir runs/mine --jobs 2 --set data.path=data"

    # a mistake is one line, and leaves nothing that is in the way
    words = [sys.executable, "-m", *shlex.split(line)]
    wrong = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1), wrong.stderr
    assert "learning_rate" in wrong.stderr
    Path("mine.toml").write_text(RECIPE.replace("num_classes = 2", "num_classes = 3"))
    wrong_classes = finish(line, 2)
    assert wrong_classes.err.count("\n") == 1, wrong_classes.err
    Path("mine.toml").write_text(RECIPE)

    # Ctrl-C in the middle of the meta model, then the same command
    command = start(line)
    metrics = Path("runs/mine/meta/metrics.jsonl")
    assert command.until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, pause=0.01), command.out
    os.killpg(command.pid, signal.SIGINT)
    assert command.wait() == 75, command.out + command.err
    assert "nothing has been trained here yet; replaced the older recipe (model.num_classes: 3 -> 2)" in command.out
    assert "mine: 4 phases, 860 steps, " in command.out
    assert line in command.out  # how to resume
    assert not Path("runs/mine/meta/DONE").exists()
    again = finish(line)
    assert "fine-tuned" in again.out
    attempts = sorted(Path("runs/mine/meta/attempts").iterdir())
    assert [json.loads(file.read_text())["state"] for file in attempts] == ["preempted", "done"]

    # another fine-tuning of the same modules
    forked = finish("bigincubate fork runs/mine runs/long --set finetune.train.epochs=8")
    assert forked.out.count("taken over: finished") == 3, forked.out
    assert "fine-tuning  to be trained: finetune.train.epochs: 5.0 -> 8.0" in forked.out
    finish("bigincubate run runs/long/recipe.toml --run-dir runs/long --jobs 2")
    assert json.loads(Path("runs/long/summary.json").read_text())["finetune"]["steps"] == 32
    assert finish("bigincubate verify runs/long").out.count("good") > 10
    exported = finish("bigincubate export runs/long --out model")
    assert "timm.create_model(" in exported.out
    evaluated = json.loads(finish("bigincubate evaluate runs/long --data data --json").out)

    # plain timm, on the photographs that were held out
    import timm
    import torch
    from PIL import Image

    model = timm.create_model("local-dir:model", pretrained=True).eval()
    assert "bigincubate" not in sys.modules, "timm needs bigincubate"
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    images = torch.stack([transform(Image.open(file)) for file in sorted(Path("photographs").glob("*/*.jpg"))])
    with torch.no_grad():
        right = (model(images).argmax(1) == torch.arange(80) // 40).float().mean().item()
    assert evaluated["samples"] == 16
    print(f"top-1 {evaluated['top1']:.1f}% on the held-out photographs, {100 * right:.1f}% of all with plain timm")
    assert right > 0.7


if __name__ == "__main__":
    main()
