"""Deep Incubation's equations, proven against plain timm modules and a forward written by hand.

The hybrid of module k computes M'[K-1] o ... o M'[k+1] o M[k] o M'[k-1] o ... o M'[0], M the target's modules and M'
the meta model's, and trains M[k] alone (Ni et al., Deep Incubation, 2023, section 3). The reference below takes stem,
blocks and head of two plain timm models and calls them one after another; it shares no code with the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from small_models import build_timm
from torch import Tensor, nn

from bigincubate.config import ModelConfig
from bigincubate.models.drop_path import apply_masks, draw_masks, find_drop_paths, set_drop_path_rates
from bigincubate.models.library import find_family
from bigincubate.models.partition import Partition, hybrid_depths, normalize_depths
from bigincubate.models.surgery import extract, freeze_other_modules, insert

Part = Callable[[Tensor], Tensor]


def chain(*parts: Part) -> Part:
    def run(x: Tensor) -> Tensor:
        for part in parts:
            x = part(x)
        return x

    return run


def vit_parts(m: Any, depths: list[int]) -> list[Part]:
    """A plain ViT in three modules."""
    a, b = depths[0], depths[0] + depths[1]
    return [
        chain(m.patch_embed, m._pos_embed, m.norm_pre, *m.blocks[:a]),
        chain(*m.blocks[a:b]),
        chain(*m.blocks[b:], m.norm, m.forward_head),
    ]


def swin_parts(m: Any, depths: list[list[int]]) -> list[Part]:
    """A plain Swin in three modules: the second lies inside stage 2, the third begins there."""
    s0, s1, s2, s3 = m.layers
    a, b = depths[0][2], depths[0][2] + depths[1][2]
    assert len(s2.blocks) == b + depths[2][2]
    return [
        chain(m.patch_embed, s0.downsample, *s0.blocks, s1.downsample, *s1.blocks, s2.downsample, *s2.blocks[:a]),
        chain(*s2.blocks[a:b]),
        chain(*s2.blocks[b:], s3.downsample, *s3.blocks, m.norm, m.forward_head),
    ]


def convnext_parts(m: Any, depths: list[list[int]]) -> list[Part]:
    """A plain ConvNeXt in two modules, cut between stages 1 and 2: the down-sampling belongs to the second."""
    s0, s1, s2, s3 = m.stages
    return [
        chain(m.stem, s0.downsample, *s0.blocks, s1.downsample, *s1.blocks),
        chain(s2.downsample, *s2.blocks, s3.downsample, *s3.blocks, m.norm_pre, m.forward_head),
    ]


def mixer_parts(m: Any, depths: list[int]) -> list[Part]:
    """A plain mixer in two modules."""
    a = depths[0]
    return [chain(m.stem, *m.blocks[:a]), chain(*m.blocks[a:], m.norm, m.forward_head)]


@dataclass(frozen=True)
class Example:
    name: str
    args: dict[str, Any]
    img_size: int
    target: Any
    meta: Any
    parts: Callable[[Any, Any], list[Part]]

    def plain(self, depths: Any, seed: int) -> nn.Module:
        """A plain timm model of these depths, every parameter moved from its initial value."""
        kwargs = {"drop_path_rate": 0.0, **self.args}  # timm's Swin has 0.1 otherwise
        if "vit" in self.name:
            kwargs["depth"] = sum(depths)
        elif "mixer" not in self.name:
            kwargs["depths"] = [sum(column) for column in zip(*depths, strict=True)]
        if "convnext" not in self.name:
            kwargs["img_size"] = self.img_size
        torch.manual_seed(seed)
        model = timm.create_model(self.name, num_classes=5, **kwargs)
        if "mixer" in self.name:  # takes no depth
            model.blocks = model.blocks[: sum(depths)]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    def batch(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(5)
        images = torch.randn(4, 3, self.img_size, self.img_size, generator=generator)
        return images, torch.softmax(torch.randn(4, 5, generator=generator), dim=1)  # soft targets, as mixup gives


EXAMPLES = [
    Example("vit_tiny_patch16_224", {"embed_dim": 24, "num_heads": 3}, 32, [2, 3, 2], [1, 1, 2], vit_parts),
    Example(
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 8, "num_heads": (1, 2, 4, 8), "window_size": 2},
        64,
        [[2, 1, 4, 0], [0, 0, 4, 0], [0, 0, 3, 2]],
        [[1, 1, 2, 0], [0, 0, 2, 0], [0, 0, 1, 1]],
        swin_parts,
    ),
    Example(
        "swinv2_tiny_window8_256",
        {"embed_dim": 8, "num_heads": (1, 2, 4, 8), "window_size": 2},
        64,
        [[2, 1, 3, 0], [0, 0, 4, 0], [0, 0, 1, 2]],
        [[1, 1, 1, 0], [0, 0, 2, 0], [0, 0, 1, 1]],
        swin_parts,
    ),
    Example(
        "convnextv2_atto",
        {"dims": (8, 12, 16, 24)},
        64,
        [[2, 2, 0, 0], [0, 0, 4, 2]],
        [[1, 1, 0, 0], [0, 0, 1, 1]],
        convnext_parts,
    ),
    Example("mixer_s16_224", {}, 32, [3, 2], [1, 2], mixer_parts),
]
MODULES = [(example, module) for example in EXAMPLES for module in range(len(example.target))]
each_hybrid = pytest.mark.parametrize(("example", "module"), MODULES, ids=[f"{e.name}-{k}" for e, k in MODULES])


class Hybrid:
    """Two plain models, and the hybrid that the package makes of their weights."""

    def __init__(self, example: Example, module: int) -> None:
        self.target = example.plain(example.target, seed=1)
        self.meta = example.plain(example.meta, seed=2)
        family = find_family(ModelConfig(name=example.name))
        target, meta = (normalize_depths(d, family.stages) for d in (example.target, example.meta))
        self.partition = Partition(family, hybrid_depths(target, meta, module))
        self.model = build_timm(
            example.name, self.partition.depths, num_classes=5, img_size=example.img_size, args=example.args
        )
        for k in range(len(target)):
            source, depths = (self.target, target) if k == module else (self.meta, meta)
            part = Partition(family, depths)
            insert(self.model, self.partition, extract(source.state_dict(), part, k), part)
        freeze_other_modules(self.model, self.partition, module)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -(targets * F.log_softmax(logits, dim=1)).sum(dim=1).mean()


@each_hybrid
def test_loss_and_gradients_are_the_papers(example: Example, module: int) -> None:
    hybrid = Hybrid(example, module)
    images, targets = example.batch()

    from_target, from_meta = example.parts(hybrid.target, example.target), example.parts(hybrid.meta, example.meta)
    parts = [from_target[k] if k == module else from_meta[k] for k in range(len(from_target))]
    expected = soft_cross_entropy(chain(*parts)(images), targets)
    expected.backward()

    loss = soft_cross_entropy(hybrid.model.train()(images), targets)
    loss.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    # the same tensors in the same order, found without the package's names: those that the forward used and that train
    reference = [p.grad for p in hybrid.target.parameters() if p.grad is not None]
    gradients = [p.grad for p in hybrid.model.parameters() if p.requires_grad]
    assert len(gradients) == len(reference) > 0
    for gradient, other in zip(gradients, reference, strict=True):
        assert gradient is not None
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-5 * max(1.0, other.abs().max().item()))


@each_hybrid
def test_modules_before_the_trained_one_build_no_graph(example: Example, module: int) -> None:
    hybrid = Hybrid(example, module)
    seen: list[tuple[int, bool, int]] = []
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    for block in hybrid.partition.blocks():
        hybrid.model.get_submodule(block.path).register_forward_hook(
            lambda _, inputs, output, k=block.module: seen.append((k, output.requires_grad, len(saved)))
        )
    images, targets = example.batch()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        soft_cross_entropy(hybrid.model.train()(images), targets)
    assert len(seen) == sum(hybrid.partition.stage_depths)
    for k, in_graph, number_saved in seen:
        assert in_graph == (k >= module)
        assert (number_saved > 0) == (k >= module)


@each_hybrid
def test_frozen_tensors_get_no_gradient_and_keep_their_bits(example: Example, module: int) -> None:
    hybrid = Hybrid(example, module)
    model, partition = hybrid.model.train(), hybrid.partition
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5)
    images, targets = example.batch()
    for step in range(2):
        set_drop_path_rates(model, partition, "hybrid", 0.3, partition.depths, module)
        apply_masks(model, draw_masks(0, step, len(find_drop_paths(model)), 4))
        soft_cross_entropy(model(images), targets).backward()
        assert all(p.grad is None for n, p in model.named_parameters() if partition.owner(n) != module)
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (partition.owner(name) != module), name


@pytest.mark.parametrize("module", [0, 1, 2])
def test_frozen_linear_layers_do_not_keep_their_inputs(module: int) -> None:
    """After the module only activation gradients flow: a frozen layer needs its weight for them, not its input."""
    hybrid = Hybrid(EXAMPLES[0], module)
    inputs: list[tuple[int, Tensor]] = []
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    for block in hybrid.partition.blocks():
        child = hybrid.model.get_submodule(block.path)
        for layer in ("attn.qkv", "mlp.fc1", "mlp.fc2"):
            child.get_submodule(layer).register_forward_pre_hook(lambda _, x, k=block.module: inputs.append((k, x[0])))
    images, targets = EXAMPLES[0].batch()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        soft_cross_entropy(hybrid.model.train()(images), targets)
    kept = {tensor.untyped_storage().data_ptr() for tensor in saved}
    assert len(inputs) == 3 * sum(hybrid.partition.stage_depths)
    for owner, tensor in inputs:
        assert (tensor.untyped_storage().data_ptr() in kept) == (owner == module)
