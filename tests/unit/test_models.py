"""Models of the package: timm's own, of another depth; hybrids, and what moves into them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from small_models import CASES, Case, build_timm, disturb, drawn, each_case, hybrid
from torch import Tensor

from bigincubate.config import ModelConfig, load_recipe
from bigincubate.errors import ArtifactError, ConfigError
from bigincubate.models.base import Depths
from bigincubate.models.library import find_family
from bigincubate.models.partition import Partition, hybrid_depths
from bigincubate.models.surgery import Init, assemble, extract, freeze_other_modules, initialize, insert, rename_tensors
from bigincubate.models.vision.build import TimmFamily
from bigincubate.planning.phases import make_plan

# ------------------------------------------------------------------------------------------------ build


@each_case
def test_model_is_timms_own(case: Case) -> None:
    partition = case.partition(case.target)
    model = case.build(case.target).eval()
    assert isinstance(partition.family, TimmFamily)
    kwargs = dict(case.args)
    if partition.family.depth_argument == "depth":
        kwargs["depth"] = partition.stage_depths[0]
    elif partition.family.depth_argument == "depths":
        kwargs["depths"] = partition.stage_depths
    if "convnext" not in case.name:
        kwargs["img_size"] = case.img_size
    torch.manual_seed(0)
    plain = timm.create_model(case.name, num_classes=5, **kwargs).eval()
    if not partition.family.depth_argument:
        plain.blocks = plain.blocks[: partition.stage_depths[0]]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(model(case.images()), plain(case.images()))


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("resnet50", {}, "not supported.*ViT, DeiT.*Swin.*ConvNeXt.*MLP-Mixer"),
        ("vit_relpos_base_patch16_224", {}, "VisionTransformerRelPos"),
        ("vit_tny_patch16_224", {}, "did you mean vit_tiny_patch16_224"),
        ("mixer_s32_224", {}, "8 blocks"),
        ("vit_tiny_patch16_224", {"num_heads": 5}, "divisible by num_heads"),
        ("vit_tiny_patch16_224", {"bogus": 1}, "unexpected keyword argument 'bogus'"),
        ("mixer_s32_224", {"embed_dim": 8}, "embed_dim"),
        ("vit_tiny_patch16_224.no_such_tag", {}, "no_such_tag"),
        ("vit_tiny_patch16_224", {"depth": 3}, "model.args.depth"),
        ("vit_tiny_patch16_224", {"pretrained": True}, "model.args.pretrained"),
        ("vit_base_resnet50d_224", {}, "running statistics"),
        ("vit_dpwee_patch16_reg1_gap_256", {}, "attention depends on the index"),
    ],
)
def test_model_that_cannot_be_built_gives_one_line(name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        build_timm(name, ((10,),), num_classes=2, img_size=224, args=args, device="meta")
    assert "\n" not in str(raised.value)


SIZES: list[tuple[str, dict[str, Any], int, str | None]] = [
    ("vit_tiny_patch16_224", {"patch_size": 8}, 32, None),
    ("vit_tiny_patch16_224", {"patch_size": 8}, 33, "patch_embed.proj reads whole patches only; use 32 or 40"),
    ("vit_tiny_patch16_224", {"patch_size": 8, "dynamic_img_pad": True, "dynamic_img_size": True}, 33, None),
    ("vit_small_r26_s32_224", {"embed_dim": 32, "num_heads": 2}, 64, None),  # convolutions that pad what they need
    ("mixer_s16_224", {}, 40, "stem.proj reads whole patches only; use 32 or 48"),
    ("swin_tiny_patch4_window7_224", {"embed_dim": 12}, 100, None),  # timm pads windows and odd sides
    ("swin_tiny_patch4_window7_224", {"embed_dim": 12}, 102, "patch_embed.proj reads whole patches only; use 100 or"),
    ("convnext_atto", {}, 96, None),
    ("convnext_atto", {}, 97, "stem.0 reads whole patches only; use 96 or 128"),
    ("convnext_atto", {}, 100, "stages.1.downsample.1 reads whole patches only; use 96 or 128"),
    ("convnext_atto_ols", {}, 96, None),  # an overlapping stem, which pads
]


@pytest.mark.parametrize(("name", "args", "img_size", "message"), SIZES)
def test_image_size_whose_last_pixels_are_ignored_is_refused(
    name: str, args: dict[str, Any], img_size: int, message: str | None
) -> None:
    model = ModelConfig(name=name, args=args, img_size=img_size, num_classes=10)
    family = find_family(model)
    if message is None:
        family.check_input_size(model)
        return
    with pytest.raises(ConfigError, match=f"model.img_size = {img_size}: .* ignore pixels.*{message}"):
        family.check_input_size(model)


@pytest.mark.parametrize("phase", ["", "finetune."])
def test_image_size_of_every_phase_is_checked(phase: str) -> None:
    recipe = load_recipe("digits", [f"{phase}model.img_size=9"])
    with pytest.raises(ConfigError, match=r"model.img_size = 9: .* use 8 or 10"):
        make_plan(recipe)


# ------------------------------------------------------------------------------------------------ hybrids


@each_case
def test_grow_starts_as_the_meta_model(case: Case) -> None:
    meta = disturb(case.build(case.meta))
    images = case.images()
    expected = meta(images)
    assert expected.std() > 1e-3
    for module in range(case.partition(case.meta).modules):
        model = hybrid(case, module, "grow", meta)
        assert torch.equal(model(images), expected)
        fresh = hybrid(case, module, "fresh", meta)
        assert not torch.allclose(fresh(images), expected, atol=1e-4)


@each_case
def test_boundary_and_fresh_start_where_they_say(case: Case) -> None:
    meta, target, shallow = disturb(case.build(case.meta)), case.partition(case.target), case.partition(case.meta)
    for module in range(target.modules):
        own = case.partition(hybrid_depths(target.depths, shallow.depths, module))
        fresh = drawn(case, own).state_dict()
        copied = rename_tensors(
            {n: t for n, t in meta.state_dict().items() if not (shallow.owner(n) == module and shallow.block_of(n))},
            shallow,
            own,
        )
        inits: tuple[Init, ...] = ("boundary", "fresh")
        for init in inits:
            state = hybrid(case, module, init, meta).state_dict()
            for name, tensor in state.items():
                from_meta = own.owner(name) != module or (init == "boundary" and own.block_of(name) is None)
                assert torch.equal(tensor, copied[name] if from_meta else fresh[name]), name


def copied_blocks(state: Mapping[str, Tensor], meta: Mapping[str, Tensor], case: Case, depths: Depths) -> list[int]:
    """For each block in ``state``, the index in its stage of the meta model's block that it is a copy of."""
    own, shallow = case.partition(depths), case.partition(case.meta)

    def blocks(tensors: Mapping[str, Tensor], partition: Partition) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {block.path: {} for block in partition.blocks()}
        for name, tensor in tensors.items():
            if block := partition.block_of(name):
                found[block.path][name.removeprefix(block.path)] = tensor
        return found

    theirs, sources = blocks(meta, shallow), {block.path: block.index_in_stage for block in shallow.blocks()}
    copies = []
    for tensors in blocks(state, own).values():
        equal = [
            sources[path]
            for path, other in theirs.items()
            if other.keys() == tensors.keys() and all(torch.equal(other[name], tensors[name]) for name in tensors)
        ]
        copies.append(equal[0])
    return copies


@pytest.mark.parametrize(
    ("name", "target", "meta", "stack", "whole"),
    [
        ("vit_tiny_patch16_224", [3, 2, 1], [1, 1, 1], [0, 0, 0, 1, 1, 2], [0, 1, 2, 0, 1, 2]),
        ("vit_tiny_patch16_224", [5, 4], [2, 3], [0, 0, 0, 1, 1, 2, 2, 3, 4], [0, 1, 2, 3, 4, 0, 1, 2, 3]),
        # a copy has the parity of its source: every second block of Swin shifts its windows
        (
            "swin_tiny_patch4_window7_224",
            [[2, 2, 4, 0], [0, 0, 6, 2]],
            [[2, 2, 2, 0], [0, 0, 4, 1]],
            [*[0, 1], *[0, 1], *[0, 1, 0, 1, 2, 3, 2, 3, 4, 5], *[0, 0]],
            [*[0, 1], *[0, 1], *[0, 1, 2, 3, 4, 5, 0, 1, 2, 3], *[0, 0]],
        ),
        (
            "convnext_atto",
            [[1, 2, 3, 0], [0, 0, 2, 2]],
            [[1, 1, 1, 0], [0, 0, 1, 1]],
            [*[0], *[0, 0], *[0, 0, 0, 1, 1], *[0, 0]],
            [*[0], *[0, 0], *[0, 1, 0, 1, 0], *[0, 0]],
        ),
    ],
)
def test_stack_repeats_blocks_in_a_row_and_g_stack_the_whole_model(
    name: str, target: Any, meta: Any, stack: list[int], whole: list[int]
) -> None:
    known = next(case for case in CASES if case.name == name)
    case = replace(known, target=target, meta=meta)
    source, shallow, deep = disturb(case.build(meta)), case.partition(meta), case.partition(target)
    inits: tuple[tuple[Init, list[int]], ...] = (("stack", stack), ("g_stack", whole))
    for init, expected in inits:
        model = drawn(case, deep)
        initialize(model, deep, range(deep.modules), source.state_dict(), shallow, init)
        assert copied_blocks(model.state_dict(), source.state_dict(), case, deep.depths) == expected
        others = {n: tensor for n, tensor in model.state_dict().items() if deep.block_of(n) is None}
        assert others
        assert all(torch.equal(tensor, source.state_dict()[n]) for n, tensor in others.items())


@each_case
def test_stack_of_equal_depth_starts_as_the_meta_model(case: Case) -> None:
    meta, shallow = disturb(case.build(case.meta)), case.partition(case.meta)
    inits: tuple[Init, ...] = ("stack", "g_stack", "grow")
    for init in inits:
        model = drawn(case, shallow)
        initialize(model, shallow, range(shallow.modules), meta.state_dict(), shallow, init)
        assert torch.equal(model(case.images()), meta(case.images()))


def test_grow_refuses_a_block_it_does_not_know() -> None:
    case = CASES[0]
    meta, shallow = case.build(case.meta), case.partition(case.meta)
    own = case.partition(hybrid_depths(case.partition(case.target).depths, shallow.depths, 1))
    model = case.build(own.depths)
    block = model.get_submodule("blocks.2")
    block.__class__ = type("StrangeBlock", (type(block),), {})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"StrangeBlock.*'boundary' or 'fresh'"):
        initialize(model, own, [1], meta.state_dict(), shallow, "grow")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_trainable_parameters_are_those_of_the_module() -> None:
    case = CASES[1]
    model, partition = case.build(case.target), case.partition(case.target)
    for module in (0, 1, 2, None):
        freeze_other_modules(model, partition, module)
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (module is None or partition.owner(name) == module)


# ------------------------------------------------------------------------------------------------ surgery


def test_tensors_that_do_not_fit_are_named() -> None:
    case = CASES[0]
    model, partition = case.build([2, 2]), case.partition([2, 2])
    part = extract(case.build([2, 2], seed=1).state_dict(), partition, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    broken = {name: tensor for name, tensor in part.items() if name != "blocks.3.norm1.weight"}
    for tensors, message in [
        (broken, r"missing: blocks\.3\.norm1\.weight"),
        (part | {"blocks.3.ls1.gamma": torch.ones(24)}, r"does not have: blocks\.3\.ls1\.gamma"),
        (part | {"head.weight": torch.ones(7, 24)}, r"'head\.weight' has the shape \(7, 24\)"),
        (part | {"blocks.9.norm1.weight": torch.ones(24)}, r"blocks\.9"),
        ({}, "no tensors to insert"),
    ]:
        with pytest.raises(ArtifactError, match=message):
            insert(model, partition, tensors, partition)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_assembly_refuses_overlaps_and_gaps() -> None:
    case = CASES[0]
    model, partition = case.build([1, 1, 1]), case.partition([1, 1, 1])
    parts = [extract(model.state_dict(), partition, module) for module in range(3)]
    with pytest.raises(ArtifactError, match=r"module 2 .*blocks\.0"):
        assemble([parts[0], parts[1], parts[0]], model.state_dict())
    with pytest.raises(ArtifactError, match=r"missing: blocks\.1"):
        assemble([parts[0], parts[2]], model.state_dict())
    with pytest.raises(ArtifactError, match=r"does not have: extra"):
        assemble([*parts, {"extra": torch.ones(1)}], model.state_dict())
