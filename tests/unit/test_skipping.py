"""Skipping computation whose result is unused gives the results of computing everything."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partialmethod
from typing import Any

import pytest
import torch
from small_models import build_timm
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from bigincubate.config import ModelConfig, load_recipe
from bigincubate.errors import ConfigError
from bigincubate.models.compilation import compile_blocks
from bigincubate.models.drop_path import apply_masks, draw_masks, find_drop_paths, set_drop_path_rates
from bigincubate.models.library import find_family
from bigincubate.models.partition import Partition
from bigincubate.models.surgery import freeze_other_modules
from bigincubate.models.vision.subset_drop_path import reads_only_cls_token
from bigincubate.planning.cost import count_cost
from bigincubate.planning.phases import make_plan

VIT = {"embed_dim": 48, "num_heads": 3, "patch_size": 8}
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("vit_tiny_patch16_224", VIT, 32),
    "layer scale": ("vit_tiny_patch16_224", {**VIT, "init_values": 0.1}, 32),
    "no bias": ("vit_tiny_patch16_224", {**VIT, "qkv_bias": False}, 32),
    "query norm": ("vit_tiny_patch16_224", {**VIT, "qk_norm": True, "qkv_bias": False}, 32),
    "norms and biases": ("vit_tiny_patch16_224", {**VIT, "qk_norm": True, "scale_attn_norm": True}, 32),
    "mean of tokens": ("vit_tiny_patch16_224", {**VIT, "global_pool": "avg"}, 32),
    "distilled": ("deit_tiny_distilled_patch16_224", VIT, 32),
    "deit3": ("deit3_small_patch16_224", VIT, 32),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 12, "num_heads": (1, 2, 2, 4), "window_size": 4}, 64),
}
BATCH = 12


def made(kind: str, rate: float = 0.6) -> tuple[nn.Module, Partition, Tensor]:
    name, args, size = MODELS[kind]
    family = find_family(ModelConfig(name=name))
    depths = ((4,),) if family.stages == 1 else ((2, 2, 2, 2),)
    torch.manual_seed(0)
    model = build_timm(name, depths, num_classes=7, img_size=size, args=args).train()
    partition = Partition(family, depths)
    set_drop_path_rates(model, partition, "target", rate, depths, None)
    return model, partition, torch.randn(BATCH, 3, size, size)


def skip(model: nn.Module, partition: Partition, *, drop_path: bool = True, class_token: bool = True) -> None:
    """Switch on everything that the model supports."""
    if drop_path:
        partition.family.use_subset_drop_path(model, partition)
    if class_token and reads_only_cls_token(model):
        partition.family.compute_last_block_for_cls_token_only(model, partition)


def masks(model: nn.Module, step: int = 0) -> Tensor:
    return draw_masks(0, step, len(find_drop_paths(model)), BATCH)


def gradients(model: nn.Module, images: Tensor) -> Iterator[tuple[str, Tensor]]:
    model.zero_grad()
    output = model(images)
    output.square().sum().backward()
    yield "output", output.detach()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        yield name, parameter.grad.clone()


@pytest.mark.parametrize(("drop_path", "class_token"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("kind", MODELS)
def test_outputs_and_gradients_equal_computing_everything(kind: str, drop_path: bool, class_token: bool) -> None:
    model, partition, images = made(kind)
    apply_masks(model, masks(model))
    plain = dict(gradients(model, images))
    skip(model, partition, drop_path=drop_path, class_token=class_token)
    apply_masks(model, masks(model))
    assert (
        any(path.kept_samples is not None and len(path.kept_samples) < BATCH // 2 for path in find_drop_paths(model))
        is drop_path
    )
    largest = max(tensor.abs().max().item() for tensor in plain.values())
    for name, found in gradients(model, images):
        torch.testing.assert_close(found, plain[name], rtol=1e-4, atol=1e-6 * largest, msg=name)


@pytest.mark.parametrize("kind", ["layer scale", "swin"])
def test_evaluation_drops_nothing(kind: str) -> None:
    model, partition, images = made(kind)
    plain = model.eval()(images)
    skip(model, partition)
    apply_masks(model, masks(model))
    torch.testing.assert_close(model(images), plain)


def test_gradients_are_zeros_if_everything_is_dropped() -> None:
    model, partition, images = made("layer scale")
    skip(model, partition)
    apply_masks(model, torch.full((len(find_drop_paths(model)), BATCH), 0.99))
    grads = dict(gradients(model, images))
    assert not grads["blocks.3.mlp.fc1.weight"].any()
    assert grads["blocks.0.mlp.fc1.weight"].any()  # its rate is 0


def test_dropped_branches_cost_no_flops() -> None:
    model, partition, images = made("mean of tokens", rate=0.5)
    skip(model, partition)
    uniform = torch.ones(len(find_drop_paths(model)), BATCH)
    uniform[:, : BATCH // 3] = 0.0

    def flops(uniform: Tensor) -> int:
        apply_masks(model, uniform)
        with FlopCounterMode(display=False) as counter:
            model(images).sum().backward()
        blocks = counter.get_flop_counts()["VisionTransformer.blocks.3"]
        return sum(blocks.values())

    assert flops(uniform) == flops(torch.zeros_like(uniform)) / 3


def test_last_block_of_a_vit_serves_the_class_token_alone() -> None:
    """Its products with weights, 12 d² multiplications a token, are for one; beside them, each head reads the tokens
    twice: for its scores, and weighed by them."""
    recipe = load_recipe("imagenet-vit-b")
    skipping = load_recipe("imagenet-vit-b", ["train.last_block_cls_only=true"])
    plan = make_plan(recipe)
    d, t, heads = 768, 197, 12
    block = 2 * t * 12 * d * d + 4 * t * t * d
    last = 2 * 12 * d * d + 4 * t * heads * d
    for row, passes in [(plan.row("incubate", 0), 2), (plan.row("incubate", 3), 3), (plan.row("end_to_end"), 3)]:
        whole, less = (count_cost(row, one.settings(row.phase), plan) for one in (recipe, skipping))
        assert whole.forward_flops - less.forward_flops == pytest.approx(block - last, rel=1e-3)
        # activation gradients cost what the forward does, and weight gradients too, where there are any; attention's
        # products have two gradients each in either case
        attention = 4 * t * t * d - 4 * t * heads * d
        saved = passes * (block - last) + (3 - passes) * attention
        assert whole.training_flops - less.training_flops == pytest.approx(saved, rel=1e-3), row.key


def test_saved_activations_of_the_first_module_are_far_fewer() -> None:
    recipe = load_recipe("imagenet-vit-b", ["train.last_block_cls_only=true"])
    plan = make_plan(recipe)
    row = plan.row("incubate", 0)
    cost = count_cost(row, recipe.settings("incubate"), plan)
    # the reference keeps 543 MiB for a batch of eight (benchmarks/vs_reference.py)
    assert 543 * 2**20 / 8 / cost.activation_bytes > 1.45


GRAPHS = [(None, 1), (0, 2), (1, 4), (2, 4), (3, 3)]


@pytest.mark.parametrize(
    ("skipping", "module", "graphs"),
    # without the last block, nothing follows module 2
    [(False, *row) for row in GRAPHS] + [(True, *row) if row[0] != 2 else (True, 2, 3) for row in GRAPHS],
)
def test_one_family_of_compiled_graphs_whatever_the_depth_and_what_is_dropped(
    skipping: bool, module: int | None, graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph each for: blocks before the module, which need no gradient; its first block, which hands none on; its
    other blocks, and the first too where it follows a stem that is trained; those after it. Skipping adds none, as many
    samples as may be kept, and the block of the class token, the last, has none."""
    for depth in (3, 6):
        target = ((depth,),) * 4
        depths = target if module is None else tuple((depth if k == module else 1,) for k in range(4))
        family = find_family(ModelConfig(name="vit_tiny_patch16_224"))
        torch.manual_seed(0)
        model = build_timm("vit_tiny_patch16_224", depths, num_classes=7, img_size=16, args={**VIT, "init_values": 0.1})
        partition = Partition(family, depths)
        set_drop_path_rates(model, partition, "hybrid", 0.5, target, module)
        freeze_other_modules(model, partition, module)
        if skipping:
            skip(model, partition)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=counter, fullgraph=True))
        compile_blocks(model, [block.path for block in partition.blocks()])
        found = []
        for step in range(4):
            apply_masks(model.train(), masks(model, step))
            model(torch.randn(BATCH, 3, 16, 16)).square().sum().backward()
            found.append(counter.frame_count)
        assert found[0] == found[-1] == graphs
        used = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
        operators = sum(target.startswith("bigincubate.add_branch") for target in used)
        assert operators == 2 * graphs * skipping  # two branches a block


@pytest.mark.parametrize(
    ("name", "key", "words"),
    [
        ("cifar100-mini", "subset_drop_path", ".*ConvNeXtBlock"),
        ("cifar100-mini", "last_block_cls_only", ".*ConvNeXt"),
        ("imagenet-swin-b", "last_block_cls_only", ".*SwinTransformer"),
    ],
)
def test_unsupported_models_are_refused(name: str, key: str, words: str) -> None:
    recipe = load_recipe(name, [f"train.{key}=true"])
    plan = make_plan(recipe)
    with pytest.raises(ConfigError, match=rf"train\.{key}: {words}.*set it to false"):
        count_cost(plan.row("pretrain"), recipe.settings("pretrain"), plan)
