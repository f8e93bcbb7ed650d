"""Fine-tuning that starts with the optimizer state of the meta model, where tensors are copied from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bigincubate.config import load_recipe
from bigincubate.errors import ArtifactError, ConfigError
from bigincubate.planning.phases import make_plan
from bigincubate.storage.sharded_tensors import ShardedTensorReader
from bigincubate.training.kept_state import load_kept_state

Harnesses = Callable[..., Any]
KEPT = ("plan.incubate=none", "finetune.budget=epochs", "expand.optimizer=kept", "pretrain.train.max_steps=5")


def checkpoint(made: Any, phase: str, step: int) -> ShardedTensorReader:
    return ShardedTensorReader((made.run.phase(phase).checkpoints / f"step-{step:08d}").glob("rank-*.safetensors"))


def block(name: str) -> int | None:
    """The number of the block that a tensor belongs to."""
    return int(name.split(".")[1]) if name.startswith("blocks.") else None


@pytest.mark.parametrize(
    ("init", "sources"),
    [("grow", [0, None, 1, None]), ("stack", [0, 0, 1, 1]), ("g_stack", [0, 1, 0, 1]), ("boundary", [None] * 4)],
)
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_copied_tensors_keep_their_state_and_new_ones_have_none(
    init: str, sources: list[int | None], optimizer: str, harness: Harnesses
) -> None:
    made = harness(*KEPT, f"expand.init={init}", f"optim.name={optimizer}", "finetune.train.max_steps=0")
    made.train("pretrain")
    made.train("finetune")
    meta, fine = checkpoint(made, "pretrain", 5), checkpoint(made, "finetune", 0)
    expected: dict[str, torch.Tensor] = {}
    for path in meta:
        if "optim/" not in path:
            continue
        name = path.split("/")[-1]
        copies = [name]
        if block(name) is not None:
            copies = [
                f"blocks.{k}.{name.split('.', 2)[2]}" for k, source in enumerate(sources) if source == block(name)
            ]
        expected |= {path.removesuffix(name) + copy: meta[path] for copy in copies}
    assert expected
    assert any(value.count_nonzero() for path, value in expected.items() if "exp_avg" in path)
    found = {path: fine[path] for path in fine if "optim/" in path}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[path], value) for path, value in expected.items())


def test_state_is_fresh_unless_it_is_kept(harness: Harnesses) -> None:
    made = harness(*KEPT, "expand.optimizer=fresh", "finetune.train.max_steps=0")
    made.train("pretrain")
    made.train("finetune")
    assert not [path for path in checkpoint(made, "finetune", 0) if "optim/" in path]
    assert "expand.optimizer" not in made.rows[1].identity
    assert harness(*KEPT).rows[1].identity["expand.optimizer"] == "kept"


def test_new_tensors_start_at_step_0_and_copied_ones_go_on(harness: Harnesses) -> None:
    made = harness(*KEPT, "finetune.train.max_steps=3")
    made.train("pretrain")
    made.train("finetune")
    steps = {path: int(value) for path, value in checkpoint(made, "finetune", 3).items() if "optim/step/" in path}
    assert steps["optim/step/blocks.0.attn.qkv.weight"] == steps["optim/step/head.weight"] == 5 + 3
    assert steps["optim/step/blocks.1.attn.qkv.weight"] == 3


def test_module_that_is_incubated_starts_without_state(harness: Harnesses) -> None:
    made = harness(*KEPT, "plan.incubate=[0]", "incubate.train.max_steps=2", "finetune.train.max_steps=0")
    for phase, module in (("pretrain", None), ("incubate", 0), ("finetune", None)):
        made.train(phase, module)
    found = {path.split("/")[-1] for path in checkpoint(made, "finetune", 0) if "optim/" in path}
    assert {block(name) for name in found} == {2, None}
    assert "head.weight" in found
    assert "patch_embed.proj.weight" not in found


def test_tensor_of_another_shape_starts_without_state(harness: Harnesses) -> None:
    """Fine-tuning on larger images resamples the position embedding."""
    made = harness(*KEPT, "finetune.model.img_size=10", "finetune.train.max_steps=0")
    made.train("pretrain")
    made.train("finetune")
    found = {path.split("/")[-1] for path in checkpoint(made, "finetune", 0) if "optim/exp_avg/" in path}
    assert "pos_embed" not in found
    assert "patch_embed.proj.weight" in found


def test_resumed_fine_tuning_computes_the_same_bits(harness: Harnesses, tmp_path: Path) -> None:
    """With one schedule over both phases, from the checkpoint of step 4 of 8, and once more from the start."""
    whole = harness(*KEPT, "finetune.train.max_steps=8", "expand.schedule=continue")
    whole.train("pretrain")
    whole.train("finetune")
    for removed in (["step-00000008"], ["step-00000004", "step-00000008"]):
        stopped = whole.copy(tmp_path / str(len(removed)))
        folder = stopped.run.phase("finetune")
        (folder.path / "DONE").unlink()
        shutil.rmtree(folder.artifact)
        for name in removed:
            shutil.rmtree(folder.checkpoints / name)
        stopped.train("finetune")
        found, expected = stopped.weights("finetune"), whole.weights("finetune")
        assert all(torch.equal(found[name], expected[name]) for name in found.keys() | expected.keys())


@pytest.mark.parametrize("kept", [0, 4])
def test_missing_checkpoint_of_the_meta_model_is_one_line(kept: int, harness: Harnesses) -> None:
    made = harness(*KEPT)
    made.train("pretrain")
    for folder in made.run.phase("pretrain").checkpoints.iterdir():
        if folder.name != f"step-{kept:08d}":
            shutil.rmtree(folder)
    trainer = made.trainer("finetune")
    with pytest.raises(
        ArtifactError, match=r"needs the checkpoint of step 5 in .*, which is missing or damaged; "
    ) as caught:
        load_kept_state(trainer.context, trainer.sharding)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (
            ["finetune.optim.name=sgd"],
            "finetune.optim.name = 'sgd', but that of the meta model is 'adamw'; use the same",
        ),
        (["optim.name=lamb"], "lamb counts the steps of all tensors together"),
        (["finetune.sharding.strategy=zero1"], 'use finetune.sharding.strategy = "ddp", "fsdp2" or "oss"'),
    ],
)
def test_state_that_cannot_be_kept_is_refused_before_any_phase(sets: list[str], says: str, fast: Path) -> None:
    with pytest.raises(ConfigError, match=r'^expand\.optimizer = "kept": ') as caught:
        make_plan(load_recipe(fast, [*KEPT, *sets]))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    make_plan(load_recipe(fast, [*KEPT, *sets, "plan.incubate=all"]))
