"""A meta model made of a pretrained one: from a hub by timm's own loading, from files, and which blocks it takes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small_models import build_timm
from test_export import artifact
from test_official import save, stages
from torch import Tensor

from bigincubate.config import MetaConfig, ModelConfig, load_recipe
from bigincubate.errors import ArtifactError, ConfigError, DataError
from bigincubate.interchange.export import export
from bigincubate.interchange.official_format import join_stages
from bigincubate.interchange.pretrained import choose_blocks, pretrained_meta
from bigincubate.models.library import find_family
from bigincubate.models.partition import Partition

Harnesses = Callable[..., Any]
VIT = "vit_tiny_patch16_224"
ARGS = {"patch_size": 2, "embed_dim": 24, "num_heads": 3}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub that is off the network: what it would have downloaded is in its cache, where a test puts it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def publish(hub: Path, name: str, *files: Path) -> None:
    """Put files into the cache as if they had been downloaded from this repository of the hub."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    for file in files:
        shutil.copy(file, repository / "snapshots" / ("0" * 40))


def meta_of(init: str, select: Any = None, depths: Any = ((1,), (1,)), **model: Any) -> tuple[dict[str, Tensor], Any]:
    """What the meta model starts from, and the fresh one."""
    settings = ModelConfig(**{"name": VIT, "args": ARGS, "img_size": 8, "num_classes": 10, **model})
    torch.manual_seed(7)
    family = find_family(settings)
    fresh = family.build(settings, depths).state_dict()
    partition = Partition(family, depths)
    return pretrained_meta(MetaConfig(init=init, select=select), settings, partition, fresh), fresh


def test_hub_model_is_loaded_by_timm_and_fine_tuned(harness: Harnesses, hub: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = timm.create_model(VIT, embed_dim=24, num_heads=3).state_dict()  # 12 blocks, 224 pixels, 1000 classes
    save_file(theirs, tmp_path / "model.safetensors")
    publish(hub, "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", tmp_path / "model.safetensors")
    small = ("train.max_steps=2", "pretrain.train.max_steps=1", "pretrain.train.lr=0.0")
    made = harness(*small, f"meta.init=timm:{VIT}", "meta.select=[3, 8]")
    made.train("pretrain")
    tuned = made.weights("pretrain")
    assert torch.equal(tuned["blocks.0.attn.qkv.weight"], theirs["blocks.3.attn.qkv.weight"])
    assert torch.equal(tuned["blocks.1.mlp.fc2.bias"], theirs["blocks.8.mlp.fc2.bias"])
    assert torch.equal(tuned["norm.weight"], theirs["norm.weight"])
    assert (tuned["pos_embed"].shape, theirs["pos_embed"].shape) == ((1, 17, 24), (1, 197, 24))
    assert tuned["head.weight"].shape == (10, 24)
    made.train("incubate", 0)


def test_missing_weights_are_refused_in_one_line(hub: Path) -> None:
    with pytest.raises(DataError, match="cannot be downloaded") as caught:
        meta_of(f"timm:{VIT}", args={})
    assert "\n" not in str(caught.value)
    for name, says in (("timm:vit_tinny", "Unknown model"), ("timm:vit_tiny_patch16_18x2", "cannot be loaded")):
        with pytest.raises(ConfigError, match=says):
            meta_of(name, args={})


def test_file_formats_hold_the_same_model(hub: Path, tmp_path: Path) -> None:
    spec = artifact(VIT, tmp_path / "artifact")
    sizes: dict[str, Any] = spec.model.model_dump(include={"img_size", "args", "num_classes"})
    export(tmp_path / "artifact", tmp_path / "folder")
    file = tmp_path / "folder" / "model.safetensors"
    state = load_file(file)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "wrapped.pth")
    torch.save(state, tmp_path / "plain.pth")
    publish(hub, "me/vit", file, tmp_path / "folder" / "config.json")
    inits = [tmp_path / "artifact", tmp_path / "folder", file, tmp_path / "wrapped.pth", tmp_path / "plain.pth"]
    for init in [*map(str, inits), f"timm:local-dir:{tmp_path / 'folder'}", "timm:hf-hub:me/vit"]:
        found, fresh = meta_of(init, [0, 2], **sizes)
        assert found.keys() == fresh.keys(), init
        assert torch.equal(found["blocks.1.norm1.bias"], state["blocks.2.norm1.bias"]), init
        assert torch.equal(found["head.weight"], state["head.weight"]), init


def test_classifier_of_other_classes_is_initialized_again(tmp_path: Path) -> None:
    file = save(tmp_path / "vit.pth", stages([2, 2], seed=0))  # of the official implementation
    same, _ = meta_of(str(file))
    assert torch.equal(same["head.weight"], stages([2, 2], seed=0)[1]["head.weight"])
    assert torch.equal(same["blocks.1.mlp.fc1.weight"], stages([2, 2], seed=0)[1]["blocks.1.mlp.fc1.weight"])
    other, fresh = meta_of(str(file), num_classes=3)
    assert torch.equal(other["head.weight"], fresh["head.weight"])
    whole = join_stages(stages([2, 2], seed=0), find_family(ModelConfig(name=VIT)))
    torch.save({"model": {name: t for name, t in whole.items() if "head" not in name}}, tmp_path / "headless.pth")
    none, fresh = meta_of(str(tmp_path / "headless.pth"))
    assert torch.equal(none["head.bias"], fresh["head.bias"])
    assert torch.equal(none["norm.weight"], whole["norm.weight"])


def test_stages_give_their_own_blocks(tmp_path: Path) -> None:
    name = "swin_tiny_patch4_window7_224"
    args = {"patch_size": 2, "window_size": 2, "embed_dim": 12, "num_heads": [1, 1, 2, 2]}
    torch.manual_seed(0)
    state = build_timm(name, ((2, 2, 6, 2),), num_classes=10, img_size=32, args=args).state_dict()
    save_file(state, tmp_path / "swin.safetensors")
    shape: dict[str, Any] = {"name": name, "args": args, "img_size": 32, "depths": ((2, 2, 2, 0), (0, 0, 0, 1))}
    found, fresh = meta_of(str(tmp_path / "swin.safetensors"), **shape)
    assert {key: tensor.shape for key, tensor in found.items()} == {key: tensor.shape for key, tensor in fresh.items()}
    assert torch.equal(found["layers.2.blocks.1.attn.proj.weight"], state["layers.2.blocks.5.attn.proj.weight"])
    assert torch.equal(found["layers.2.downsample.norm.bias"], state["layers.2.downsample.norm.bias"])
    with pytest.raises(ConfigError, match=r"block 2 in stage 2 would be block 1 .* even or both odd"):
        meta_of(str(tmp_path / "swin.safetensors"), [[0, 1], [0, 1], [0, 2], [0]], **shape)


@pytest.mark.parametrize("parity", [1, 2])
def test_even_keeps_order_parity_and_both_ends(parity: int) -> None:
    for have in range(1, 30):
        for need in range(1, have + 1):
            [row] = choose_blocks("even", (have,), (need,), parity)
            assert row == sorted(set(row))
            assert (len(row), row[0]) == (need, 0)
            assert row[-1] < have
            assert need == 1 or row[-1] > have - 1 - parity
            assert all(index % parity == place % parity for place, index in enumerate(row))
    assert choose_blocks(None, (12,), (4,), 1) == [[0, 3, 7, 11]]


@pytest.mark.parametrize(
    ("select", "says"),
    [
        ([0, 12], "no block 12; meta.init has blocks 0 to 11"),
        ([0, 1, 2], "lists 3 blocks"),
        ([[0, 1], [2, 3]], "has 1 stage"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(select: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        choose_blocks(select, (12,), (2,), 1)


def test_pretrained_model_that_is_too_shallow_is_refused() -> None:
    with pytest.raises(ConfigError, match="has 1 blocks, fewer than the meta model's 2"):
        choose_blocks(None, (1,), (2,), 1)


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["meta.select=[1, 3]"], "set init too"),
        (["meta.init=x", "meta.select=[3, 1]"], "strictly ascending"),
        (["meta.init=x", "meta.select=[]"], "strictly ascending"),
        (["meta.init=x", "meta.select=[-1, 1]"], "strictly ascending"),
        (["meta.init=x", "meta.select=[[0], [2, 2]]"], "strictly ascending"),
        (["meta.init=x", "meta.select=odd"], 'select is "even", or'),
        (["meta.init=timm:"], r"meta\.init: expected a path, or"),
    ],
)
def test_contradictory_init_settings_are_refused(sets: list[str], says: str, fast: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        load_recipe(str(fast), sets)


def test_files_that_do_not_fit_are_named_in_one_line(tmp_path: Path) -> None:
    def refused(file: Path, says: str, error: type[Exception] = ConfigError) -> None:
        with pytest.raises(error, match=says) as caught:
            meta_of(str(file))
        assert "\n" not in str(caught.value)

    refused(tmp_path / "nowhere.safetensors", "nowhere", ArtifactError)
    refused(tmp_path / "nowhere", "No such file", ArtifactError)
    (tmp_path / "junk.safetensors").write_text("x")
    refused(tmp_path / "junk.safetensors", "junk", ArtifactError)
    torch.save([1], tmp_path / "list.pth")
    refused(tmp_path / "list.pth", "holds no state dict", ArtifactError)
    for name in (VIT, "convnext_atto"):
        artifact(name, tmp_path / name)
        export(tmp_path / name, tmp_path / f"{name}-out")
    refused(tmp_path / "convnext_atto-out" / "model.safetensors", "has no blocks of a vit model")
    state = load_file(tmp_path / f"{VIT}-out" / "model.safetensors")
    save_file({name: torch.cat([tensor, tensor], -1) for name, tensor in state.items()}, tmp_path / "wide.safetensors")
    refused(tmp_path / "wide.safetensors", "size mismatch")
