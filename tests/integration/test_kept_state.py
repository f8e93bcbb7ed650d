"""Phases that start with the optimizer state of the phases from which their weights are copied."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from denied import deny

from bigincubate.config import load_recipe
from bigincubate.errors import ArtifactError, ConfigError, SystemResourceError
from bigincubate.planning.phases import make_plan
from bigincubate.storage.sharded_tensors import ShardedTensorReader
from bigincubate.training.kept_state import load_kept_state

Harnesses = Callable[..., Any]
KEPT = ("plan.incubate=none", "finetune.budget=epochs", "expand.optimizer=kept", "pretrain.train.max_steps=5")
INCUBATED = ("incubate.optimizer=kept", "pretrain.train.max_steps=5", "incubate.train.max_steps=3")


def checkpoint(made: Any, phase: str, step: int, module: int | None = None) -> ShardedTensorReader:
    folder = made.run.phase(phase, module).checkpoints / f"step-{step:08d}"
    return ShardedTensorReader(folder.glob("rank-*.safetensors"))


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


@pytest.mark.parametrize("boundary", ["own", "meta"])
@pytest.mark.parametrize("init", ["grow", "stack", "fresh"])
def test_module_goes_on_with_the_state_of_the_meta_model_and_fine_tuning_with_that_of_the_module(
    init: str, boundary: str, harness: Harnesses
) -> None:
    made = harness(*INCUBATED, f"incubate.init={init}", f"incubate.boundary={boundary}", "finetune.train.max_steps=0")
    made.train("pretrain")
    for module in (0, 1):
        made.train("incubate", module)
    made.train("finetune")
    meta, fine = checkpoint(made, "pretrain", 5), checkpoint(made, "finetune", 0)
    first, second = (checkpoint(made, "incubate", 3, module) for module in (0, 1))
    # module 0 of the target is blocks 0 and 1, as in its hybrid; module 1 is blocks 2 and 3, in its hybrid 1 and 2
    steps = {name: int(first[f"optim/step/blocks.{name}.attn.qkv.weight"]) for name in (0, 1)}
    assert steps == {0: 3 if init == "fresh" else 8, 1: 8 if init == "stack" else 3}
    expected = {path: first[path] for path in first if path.startswith("optim/")}
    for path in second:
        if path.startswith("optim/"):
            expected[path.replace("blocks.2.", "blocks.3.").replace("blocks.1.", "blocks.2.")] = second[path]
    if boundary == "meta":  # frozen in every hybrid
        assert "optim/step/head.weight" not in expected
        expected |= {path: meta[path] for path in meta if path.startswith("optim/") and "blocks." not in path}
    found = {path: fine[path] for path in fine if path.startswith("optim/")}
    assert found.keys() == expected.keys()
    assert any(value.count_nonzero() for path, value in expected.items() if "exp_avg/blocks.3." in path)
    assert all(torch.equal(found[path], value) for path, value in expected.items())
    boundary_steps = {int(found[f"optim/step/{name}"]) for name in ("head.weight", "patch_embed.proj.weight")}
    assert boundary_steps == {5 if boundary == "meta" else 3 if init == "fresh" else 8}


def test_state_of_modules_is_fresh_unless_it_is_kept(harness: Harnesses) -> None:
    fresh, kept = harness(), harness("incubate.optimizer=kept")
    assert not [row.key for row in fresh.rows if "incubate.optimizer" in row.identity]
    assert [row.key for row in kept.rows if row.identity.get("incubate.optimizer") == "kept"] == [
        "incubate/0",
        "incubate/1",
        "finetune",
    ]


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
    with pytest.raises(ArtifactError, match=r"needs the checkpoint of step 5 in .*, which is missing; ") as caught:
        load_kept_state(trainer.context, trainer.sharding)
    assert "\n" not in str(caught.value)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [flip_a_bit, lambda file: file.write_bytes(file.read_bytes()[:-1])])
@pytest.mark.parametrize("steps", [(5,), (4, 5)])
def test_damaged_checkpoint_of_the_meta_model_is_one_line(
    steps: tuple[int, ...], damage: Callable[[Path], Any], harness: Harnesses, call: Callable[..., Any]
) -> None:
    """An earlier one has the state of other weights, so it is not used, and the finished phase does not resume."""
    made = harness(*KEPT)
    made.train("pretrain")
    folder = made.run.phase("pretrain")
    assert {path.name for path in folder.checkpoints.iterdir()} == {f"step-{step:08d}" for step in (4, 5)}
    for step in steps:
        damage(folder.checkpoints / f"step-{step:08d}" / "rank-00000.safetensors")
    code, _, err = call(*made.command("finetune"))
    assert code == 4
    file, *_ = (folder.checkpoints / "step-00000005").glob("*.safetensors")
    last = err.splitlines()[-1]
    assert last.startswith(
        f'bigincubate: expand.optimizer = "kept" needs the checkpoint of step 5 in {folder.checkpoints}, which is'
        f" damaged ({file}: "
    )
    assert last.endswith(
        f'); use expand.optimizer = "fresh", or remove {folder.path} and train it with: bigincubate train'
        f" {made.run.recipe_file} --run-dir {made.run.path} --phase pretrain"
    )


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
@pytest.mark.parametrize("denied", ["", "step-00000005", "step-00000005/rank-00000.safetensors"])
def test_checkpoint_of_the_meta_model_that_cannot_be_read_is_not_called_damaged(
    denied: str, number: int, harness: Harnesses, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = harness(*KEPT)
    made.train("pretrain")
    path = made.run.phase("pretrain").checkpoints / denied
    deny(monkeypatch, path, number)
    code, _, err = call(*made.command("finetune"))
    file = path / "COMMITTED" if denied == "step-00000005" else path
    assert code == 3
    assert err.splitlines()[-1] == (
        f"bigincubate: {file}: {os.strerror(number)}; make the checkpoint readable or move it away, then run the same"
        " command again"
    )
    monkeypatch.undo()
    assert made.train("finetune")["steps"]


def test_loop_of_links_in_place_of_checkpoints_is_named(harness: Harnesses) -> None:
    made = harness(*KEPT)
    made.train("pretrain")
    folder = made.run.phase("pretrain").checkpoints
    shutil.rmtree(folder)
    folder.symlink_to(folder)
    trainer = made.trainer("finetune")
    with pytest.raises(SystemResourceError, match=f"^{folder}: Too many levels of symbolic links; make the checkp"):
        load_kept_state(trainer.context, trainer.sharding)


def test_checkpoint_of_a_module_with_other_settings_is_one_line(harness: Harnesses) -> None:
    made, other = harness(*INCUBATED), harness(*INCUBATED, "incubate.train.lr=0.1")
    for phase, module in (("pretrain", None), ("incubate", 0), ("incubate", 1)):
        made.train(phase, module)
        other.train(phase, module)
    folder = made.run.phase("incubate", 1)
    shutil.rmtree(folder.checkpoints)
    shutil.copytree(other.run.phase("incubate", 1).checkpoints, folder.checkpoints)
    trainer = made.trainer("finetune")
    with pytest.raises(ArtifactError, match="which was saved with other settings, data, meta model or mod") as caught:
        load_kept_state(trainer.context, trainer.sharding)
    assert f"or remove {folder.path} and train it with: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_resumed_incubation_and_fine_tuning_compute_the_same_bits(harness: Harnesses, tmp_path: Path) -> None:
    lengths = ("checkpoint.every_steps=2", "incubate.train.max_steps=4", "finetune.train.max_steps=4")
    whole = harness("incubate.optimizer=kept", "incubate.init=stack", *lengths)
    phases = (("pretrain", None), ("incubate", 0), ("incubate", 1), ("finetune", None))
    for phase, module in phases:
        whole.train(phase, module)
    for phase, module in phases[2:]:
        stopped = whole.copy(tmp_path / phase)
        folder = stopped.run.phase(phase, module)
        (folder.path / "DONE").unlink()
        shutil.rmtree(folder.artifact)
        shutil.rmtree(folder.checkpoints / "step-00000004")
        stopped.train(phase, module)
        found, expected = stopped.weights(phase, module), whole.weights(phase, module)
        assert all(torch.equal(found[name], expected[name]) for name in found.keys() | expected.keys())


def test_missing_checkpoint_of_a_module_is_one_line(harness: Harnesses) -> None:
    made = harness(*INCUBATED)
    for phase, module in (("pretrain", None), ("incubate", 0), ("incubate", 1)):
        made.train(phase, module)
    shutil.rmtree(made.run.phase("incubate", 1).checkpoints)
    trainer = made.trainer("finetune")
    with pytest.raises(ArtifactError, match=r'^incubate\.optimizer = "kept" needs the checkpoint of step 3 ') as caught:
        load_kept_state(trainer.context, trainer.sharding)
    assert str(caught.value).endswith("--phase incubate --module 1")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["incubate.optim.name=sgd"], "incubate.optim.name = 'sgd', but pretrain.optim.name = 'adamw'; use the same"),
        (["finetune.optim.name=sgd"], "finetune.optim.name = 'sgd', but incubate.optim.name = 'adamw'; use the same"),
        (["optim.name=lamb"], "lamb counts the steps of all tensors together"),
        (["incubate.sharding.strategy=zero2"], 'use incubate.sharding.strategy = "ddp", "fsdp2" or "oss"'),
        (
            ["incubate.init=fresh", "incubate.boundary=meta", "pretrain.optim.name=sgd"],
            "finetune.optim.name = 'adamw', but pretrain.optim.name = 'sgd'; use the same",
        ),
    ],
)
def test_state_that_a_module_cannot_keep_is_refused_before_any_phase(sets: list[str], says: str, fast: Path) -> None:
    kept = ["incubate.optimizer=kept", "incubate.init=grow", *sets]
    with pytest.raises(ConfigError, match=r'^incubate\.optimizer = "kept": ') as caught:
        make_plan(load_recipe(fast, kept))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    make_plan(load_recipe(fast, [*kept, "plan.incubate=none"]))
    make_plan(load_recipe(fast, [*kept, "finetune.init=finished"]))  # no phase starts with kept state


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["finetune.optim.name=sgd"], "finetune.optim.name = 'sgd', but pretrain.optim.name = 'adamw'; use the same"),
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
    make_plan(load_recipe(fast, [*KEPT, *sets, "expand.init=fresh"]))  # nothing is copied
