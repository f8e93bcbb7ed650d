"""The scripts in `examples/`, each run on real parts at smoke size; `test_separate_machines.py` has one more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

import bigincubate as bi
from bigincubate.models.surgery import extract, rename_tensors
from bigincubate.training.builder import build_model

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = "model.args={patch_size=2,embed_dim=24,num_heads=3}"
SMALL = ("train.max_steps=2", "train.batch_size=16", "train.precision=fp32", MODEL)


@pytest.fixture(autouse=True)
def _examples_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_own_loop_incubates_a_vit(capsys: pytest.CaptureFixture[str]) -> None:
    import own_loop

    assert own_loop.main(steps=15) > 20  # percent; chance is 10
    assert capsys.readouterr().out.count("module") == 4


def test_own_loop_has_the_losses_of_the_command(harness: Callable[..., Any]) -> None:
    """The loop of the example and `bigincubate train`, from equal weights and batches: ten losses of each module."""
    import own_loop

    made = harness("drop_path.rate=0.0", "log.every_steps=1", "train.max_steps=10")
    made.train("pretrain")
    meta = small_vit(2)
    meta.load_state_dict(made.weights("pretrain"))
    for module in range(2):
        context = made.context("incubate", module)
        target = small_vit(4)
        initial = extract(build_model(context)[0].state_dict(), context.partition, module)
        target.load_state_dict(rename_tensors(initial, context.partition, context.target_partition), strict=False)
        hybrid = bi.build_hybrid(target, meta, module)

        made.train("incubate", module)
        losses = [row["train/loss"] for row in made.log("incubate", module) if "train/loss" in row]
        assert own_loop.train(hybrid, batches_of(context), steps=10) == losses
        expected = made.weights("incubate", module)
        tensors = bi.extract_module(hybrid)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def small_vit(depth: int) -> nn.Module:
    """Build the model of the smoke recipe with timm alone."""
    settings = {"img_size": 8, "patch_size": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", depth=depth, **settings)


def batches_of(context: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the inputs and targets of a phase, in the order of the command."""
    stream = context.task.train_stream(context.data, rank=0, world=1)
    for step, batch in enumerate(stream.batches(0)):
        yield context.task.prepare(batch, step)


def test_own_images_become_a_timm_model(tmp_path: Path) -> None:
    import own_images

    pixels, labels = load_digits(return_X_y=True)
    for index, (row, label) in enumerate(zip(pixels[:120], labels[:120] % 2, strict=True)):
        folder = tmp_path / "images" / ("odd" if label else "even")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((row.reshape(8, 8) * 15).astype("uint8")).save(folder / f"{index}.png")
    sets = [*SMALL, "model.name=vit_tiny_patch16_224", "model.img_size=8", "plan.modules=2"]
    sets += ["plan.target_depths=[2,2]", "augment.eval_crop=1.0"]
    model = own_images.main(tmp_path / "images", tmp_path / "work", *sets)
    ours = bi.load_model(tmp_path / "work" / "run")
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(images), ours(images))
    assert model(images).shape == (2, 2)
    assert bi.evaluate(tmp_path / "work" / "run", tmp_path / "work" / "data")["samples"] == 24


def test_run_of_two_ranks_resumes_on_one(tmp_path: Path) -> None:
    import resume_on_other_ranks

    sets = (MODEL, "plan.target_depths=[2,2]", "plan.meta_depths=[1,1]", "pretrain.train.max_steps=150")
    attempts = resume_on_other_ranks.main(tmp_path, *sets)
    assert [(attempt["world"], attempt["state"]) for attempt in attempts] == [(2, "preempted"), (1, "done")]
