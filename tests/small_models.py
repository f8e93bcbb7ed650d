"""Named timm models made small, with a partition and a meta model, for tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigincubate.config import ModelConfig
from bigincubate.models.base import Depths
from bigincubate.models.library import find_family
from bigincubate.models.partition import Partition, hybrid_depths, normalize_depths
from bigincubate.models.surgery import Init, extract, initialize, insert


def build_timm(
    name: str, depths: Depths, *, num_classes: int, img_size: int, args: dict[str, Any], device: str = "cpu"
) -> nn.Module:
    """Build a timm model as a phase does."""
    settings = ModelConfig(name=name, args=args, img_size=img_size, num_classes=num_classes)
    return find_family(settings).build(settings, depths, device=device)


@dataclass(frozen=True)
class Case:
    """A named timm model made small, a cut of it and a meta model."""

    name: str
    target: Any
    meta: Any
    args: dict[str, Any] = field(default_factory=dict)
    img_size: int = 32

    def __str__(self) -> str:
        return self.name

    def partition(self, depths: Any) -> Partition:
        family = find_family(ModelConfig(name=self.name))
        return Partition(family, normalize_depths(depths, family.stages))

    def build(self, depths: Any, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        partition = self.partition(depths)
        return build_timm(self.name, partition.depths, num_classes=5, img_size=self.img_size, args=self.args)

    def images(self) -> Tensor:
        return torch.randn(2, 3, self.img_size, self.img_size, generator=torch.Generator().manual_seed(7))


VIT = {"embed_dim": 24, "num_heads": 3}
# Windows of 2 on 16, 8, 4 and 2 patches a side: all stages but the last shift.
SWIN = {"embed_dim": 8, "num_heads": (1, 2, 4, 8), "window_size": 2}
CONVNEXT = {"dims": (8, 12, 16, 24)}
EVEN_STAGES = [[2, 2, 2, 0], [0, 0, 4, 0], [0, 0, 2, 2]], [[1, 1, 2, 0], [0, 0, 2, 0], [0, 0, 1, 1]]
ODD_STAGES = [[1, 3, 3, 0], [0, 0, 3, 2]], [[1, 2, 1, 0], [0, 0, 2, 1]]
ONE_STAGE_EACH = (
    [[3, 0, 0, 0], [0, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 2]],
    [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]],
)

CASES = [
    Case("vit_tiny_patch16_224", [3, 3, 3, 3], [1, 1, 1, 1], VIT),
    Case("vit_small_patch16_224", [1, 4, 2], [1, 2, 1], VIT),
    Case("vit_base_patch16_clip_224", [2, 2], [1, 1], VIT),  # a norm before the blocks
    Case("vit_base_patch16_siglip_224", [3, 1, 2], [2, 1, 1], VIT),  # attention pooling
    Case("vit_medium_patch16_reg4_gap_256", [2, 2], [1, 1], VIT),  # register tokens, norm after pooling
    Case("vit_base_patch16_rpn_224", [2, 3], [1, 1], VIT),  # norms after the branches
    Case("vit_base_patch16_xp_224", [2, 3], [1, 1], VIT),  # attention beside the MLP
    Case("vit_small_patch16_18x2_224", [2, 3], [1, 1], VIT),  # two of each in a block
    Case("deit_tiny_patch16_224", [3, 3, 3, 3], [1, 1, 1, 1], VIT),
    Case("deit_tiny_distilled_patch16_224", [2, 1, 3], [1, 1, 2], VIT),
    Case("deit_small_patch16_224", [5, 1], [2, 1], VIT),
    Case("deit3_small_patch16_224", [2, 2], [1, 1], VIT),
    Case("deit3_base_patch16_224", [1, 3, 2], [1, 1, 1], VIT),
    Case("deit3_large_patch16_224", [4, 3], [1, 2], VIT),
    Case("swin_tiny_patch4_window7_224", *EVEN_STAGES, SWIN, 64),
    Case("swin_small_patch4_window7_224", *ODD_STAGES, SWIN, 64),
    Case("swin_s3_tiny_224", *ONE_STAGE_EACH, SWIN | {"window_size": (2, 2, 4, 1)}, 64),
    Case("swinv2_tiny_window8_256", *EVEN_STAGES, SWIN, 64),
    Case("swinv2_small_window8_256", *ODD_STAGES, SWIN, 64),
    Case("swinv2_base_window8_256", *ONE_STAGE_EACH, SWIN, 64),
    Case("convnext_atto", *EVEN_STAGES, CONVNEXT),
    Case("convnext_tiny", *ODD_STAGES, CONVNEXT),
    Case("convnext_tiny_hnf", *ONE_STAGE_EACH, CONVNEXT),  # a norm after the stages, before pooling
    Case("convnextv2_atto", *EVEN_STAGES, CONVNEXT),
    Case("convnextv2_tiny", *ODD_STAGES, CONVNEXT),
    Case("convnextv2_nano", [[1, 1, 0, 0], [0, 0, 5, 2]], [[1, 1, 0, 0], [0, 0, 2, 1]], CONVNEXT),
    Case("mixer_s32_224", [2, 2], [1, 1], img_size=64),
    Case("mixer_s16_224", [3, 1, 2], [1, 1, 1]),
    Case("gmixer_12_224", [1, 2], [1, 1]),
    Case("resmlp_12_224", [2, 3], [1, 1]),
    Case("gmlp_ti16_224", [2, 1], [1, 1]),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)

# As timm ships them, on the meta device: the depths are the models' own.
NAMED: dict[str, list[Any]] = {
    "vit_base_patch16_224": [3, 3, 3, 3],
    "vit_large_patch16_224": [7, 9, 8],
    "vit_huge_patch14_224": [8, 8, 8, 8],
    "deit_base_patch16_224": [5, 7],
    "deit_base_distilled_patch16_224": [4, 4, 4],
    "deit_small_patch16_224": [1, 2, 3, 6],
    "deit3_base_patch16_224": [3, 3, 3, 3],
    "deit3_large_patch16_384": [11, 13],
    "deit3_huge_patch14_224": [8, 8, 8, 8],
    "swin_tiny_patch4_window7_224": [[2, 2, 2, 0], [0, 0, 4, 2]],
    "swin_base_patch4_window7_224": [[2, 2, 6, 0], [0, 0, 6, 0], [0, 0, 6, 0], [0, 0, 0, 2]],
    "swin_large_patch4_window12_384": [[2, 2, 18, 0], [0, 0, 0, 2]],
    "swinv2_tiny_window16_256": [[2, 2, 2, 0], [0, 0, 4, 2]],
    "swinv2_small_window8_256": [[2, 2, 6, 0], [0, 0, 6, 0], [0, 0, 6, 0], [0, 0, 0, 2]],
    "swinv2_base_window8_256": [[2, 0, 0, 0], [0, 2, 18, 2]],
    "convnext_tiny": [[3, 3, 3, 0], [0, 0, 6, 3]],
    "convnext_large": [[3, 3, 9, 0], [0, 0, 9, 0], [0, 0, 9, 0], [0, 0, 0, 3]],
    "convnextv2_base": [[3, 3, 20, 0], [0, 0, 7, 3]],
    "mixer_b16_224": [3, 3, 3, 3],
    "mixer_l16_224": [20, 4],
    "mixer_s32_224": [1, 2, 5],
}


def disturb(model: nn.Module, seed: int = 3) -> nn.Module:
    """Move every parameter, so that zero biases, unit norms and tiny layer scales cannot hide an exchange."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def drawn(case: Case, partition: Partition) -> nn.Module:
    """Fresh weights, disturbed: some families start at the identity by themselves, which would hide one not made."""
    return disturb(case.build(partition.depths, seed=11), seed=12)


def hybrid(case: Case, module: int, init: Init, meta: nn.Module) -> nn.Module:
    """The meta model with one module at its target depth and initialized, all others inserted."""
    target, shallow = case.partition(case.target), case.partition(case.meta)
    own = case.partition(hybrid_depths(target.depths, shallow.depths, module))
    model = drawn(case, own)
    for other in set(range(shallow.modules)) - {module}:
        insert(model, own, extract(meta.state_dict(), shallow, other), shallow)
    initialize(model, own, [module], meta.state_dict(), shallow, init)
    return model


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())
