"""Cutting a model: who owns which tensor, which depths fit each other, what a balanced cut is."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import timm
import torch
from small_models import CASES, EVEN_STAGES, NAMED, ODD_STAGES, Case, disturb, each_case, hybrid, tensors_of

from bigincubate.config import ModelConfig
from bigincubate.errors import ArtifactError, ConfigError
from bigincubate.models.library import find_family
from bigincubate.models.partition import (
    Partition,
    check_depths,
    default_meta_depths,
    find_balanced_cut,
    hybrid_depths,
    normalize_depths,
)
from bigincubate.models.surgery import assemble, extract, insert, rename_tensors

# ------------------------------------------------------------------------------------------------ ownership


@pytest.mark.parametrize("name", NAMED)
def test_every_tensor_of_a_named_model_has_one_owner(name: str) -> None:
    model = timm.create_model(name, device="meta")
    family = find_family(ModelConfig(name=name))
    partition = Partition(family, normalize_depths(NAMED[name], family.stages))
    assert family.default_depths(ModelConfig(name=name)) == partition.stage_depths

    names = list(tensors_of(model))
    owned = [{n for n in names if partition.owner(n) == module} for module in range(partition.modules)]
    assert sum(map(len, owned)) == len(names)
    assert set.union(*owned) == set(names)
    blocks = [{(b.stage, b.index_in_stage) for n in part if (b := partition.block_of(n))} for part in owned]
    for module, found in enumerate(blocks):
        counts = [sum(stage == s for s, _ in found) for stage in range(family.stages)]
        assert tuple(counts) == partition.depths[module]
    for n in names:
        module, local = partition.to_local_name(n)
        assert partition.to_global_name(module, local) == n


@each_case
def test_owners_follow_the_order_of_execution(case: Case) -> None:
    """The modules that hold tensors, in the order in which the model calls them, have owners 0, 0, ..., K-1."""
    model, partition = case.build(case.target).eval(), case.partition(case.target)
    called: list[str] = []
    for path, child in model.named_modules():
        child.register_forward_hook(lambda *_, path=path: called.append(path))
    model(case.images())
    holders = {name.rpartition(".")[0]: name for name in tensors_of(model)}
    owners = [partition.owner(holders[path]) for path in called if path and path in holders]
    assert owners == sorted(owners)
    assert set(owners) == set(range(partition.modules))
    assert all(partition.owner(name) == 0 for name in tensors_of(model) if "." not in name)  # tokens, positions
    paths = [block.path for block in partition.blocks()]
    assert [path for path in called if path in paths] == paths


@each_case
def test_assembling_what_was_extracted_gives_the_same_bits_and_logits(case: Case) -> None:
    model, partition = disturb(case.build(case.target)), case.partition(case.target)
    state = model.state_dict()
    parts = [extract(state, partition, module) for module in range(partition.modules)]
    whole = assemble(parts, state)
    assert whole.keys() == state.keys()
    assert all(torch.equal(whole[name], state[name]) for name in state)
    other = case.build(case.target, seed=1).eval()
    assert not torch.equal(other(case.images()), model(case.images()))
    other.load_state_dict(whole)
    assert torch.equal(other(case.images()), model(case.images()))


@each_case
def test_modules_go_from_hybrids_to_the_target(case: Case) -> None:
    """Cut the target in modules, put each in its own hybrid, take them out again: the same target."""
    target, meta = case.partition(case.target), case.partition(case.meta)
    model = disturb(case.build(case.target))
    parts = []
    for module in range(target.modules):
        own = case.partition(hybrid_depths(target.depths, meta.depths, module))
        part = case.build(own.depths, seed=2)
        insert(part, own, extract(model.state_dict(), target, module), target)
        parts.append(rename_tensors(extract(part.state_dict(), own, module), own, target))
    whole = assemble(parts, model.state_dict())
    assert all(torch.equal(whole[name], tensor) for name, tensor in model.state_dict().items())


def test_foreign_tensor_has_no_owner() -> None:
    flat = Case("vit_tiny_patch16_224", [2, 2], [1, 1]).partition([2, 2])
    staged = Case("swin_tiny_patch4_window7_224", *ODD_STAGES).partition(ODD_STAGES[0])
    for partition, name in [
        (flat, "blocks.4.norm1.weight"),
        (flat, "layer1.conv.weight"),
        (staged, "layers.2.blocks.6.norm1.weight"),
        (staged, "layers.4.downsample.norm.weight"),
        (staged, "layers.4.blocks.0.norm1.weight"),
    ]:
        with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
            partition.owner(name)
    with pytest.raises(ArtifactError):
        flat.to_global_name(0, "blocks.2.norm1.weight")  # a block of module 1
    with pytest.raises(ArtifactError):
        flat.to_global_name(0, "head.weight")


# ------------------------------------------------------------------------------------------------ depths


def test_depths_have_one_normal_form() -> None:
    assert normalize_depths([3, 4], 1) == normalize_depths([[3], [4]], 1) == ((3,), (4,))
    assert normalize_depths(EVEN_STAGES[0], 4) == ((2, 2, 2, 0), (0, 0, 4, 0), (0, 0, 2, 2))


@pytest.mark.parametrize(
    ("value", "stages", "message"),
    [
        ([], 1, "empty"),
        ([3, -1], 1, "module 1"),
        ([3, True], 1, "module 1"),
        ([3, 2.0], 1, "module 1"),
        ([3, [1, 2]], 1, "one depth"),
        ([3, 3], 4, "list of 4"),
        ([[1, 1, 1]], 4, "list of 4"),
    ],
)
def test_wrong_depths_are_named(value: Any, stages: int, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"target_depths.*{message}"):
        normalize_depths(value, stages, "target_depths")


@pytest.mark.parametrize(
    ("name", "target", "meta", "message"),
    [
        ("vit_tiny_patch16_224", [2, 2], [1, 1, 1], "2 modules, but meta_depths has 3"),
        ("vit_tiny_patch16_224", [2, 2], [3, 1], "module 0: meta depth 3"),
        ("vit_tiny_patch16_224", [2, 0], [1, 0], "target_depths: module 1 has no blocks"),
        ("vit_tiny_patch16_224", [2, 2], [1, 0], "meta_depths: module 1 has no blocks"),
        ("convnext_tiny", [[2, 2, 2, 0], [0, 0, 0, 2]], [[1, 1, 0, 0], [0, 0, 0, 1]], "meta_depths: stage 2 has no"),
        (
            "convnext_tiny",
            [[2, 0, 2, 0], [0, 2, 0, 2]],
            [[1, 0, 1, 0], [0, 1, 0, 1]],
            "target_depths: module 1 starts in stage 1",
        ),
        ("convnext_tiny", [[2, 2, 2, 0], [0, 0, 2, 2]], [[1, 1, 1, 0], [0, 0, 0, 1]], "module 1, stage 2: target"),
        (
            "swin_tiny_patch4_window7_224",
            [[2, 2, 4, 0], [0, 0, 2, 2]],
            [[1, 1, 1, 0], [0, 0, 1, 1]],
            "module 1 starts stage 2 at block 4 .* block 1",
        ),
        (
            "swinv2_tiny_window8_256",
            [[2, 2, 3, 0], [0, 0, 3, 2]],
            [[1, 1, 2, 0], [0, 0, 1, 1]],
            "module 0 in stage 2 by one",
        ),
    ],
)
def test_meta_model_that_does_not_fit_is_refused(name: str, target: Any, meta: Any, message: str) -> None:
    family = find_family(ModelConfig(name=name))
    with pytest.raises(ConfigError, match=message):
        check_depths(family, normalize_depths(target, family.stages), normalize_depths(meta, family.stages))


@each_case
def test_cases_are_legal_and_shifted_windows_stay_in_place(case: Case) -> None:
    target, meta = case.partition(case.target), case.partition(case.meta)
    check_depths(target.family, target.depths, meta.depths)
    for module in range(target.modules):
        own = case.partition(hybrid_depths(target.depths, meta.depths, module))
        for block in own.blocks():
            source = target if block.module == module else meta
            start = source.start(block.module, block.stage)
            assert (block.index_in_stage - start - block.index_in_module) % target.family.parity == 0


def test_block_of_the_other_parity_computes_something_else() -> None:
    """Why Swin is held to parity: the refused hybrid would not compute what the meta model computes."""
    case = next(case for case in CASES if case.name == "swin_tiny_patch4_window7_224")
    meta = [[1, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1]]  # module 1 starts stage 2 at 1, in the hybrid at 2
    refused = Case(case.name, case.target, meta, case.args, case.img_size)
    model = disturb(refused.build(meta))
    grown = hybrid(refused, 0, "grow", model)
    assert not torch.allclose(grown(case.images()), model(case.images()), atol=1e-4)


@pytest.mark.parametrize("parity", [1, 2])
def test_balanced_cut_is_the_best_of_all_cuts(parity: int) -> None:
    chance = random.Random(0)
    for _ in range(60):
        costs = [[chance.randint(1, 9)] * chance.randint(1, 4) for _ in range(chance.randint(1, 3))]
        blocks = [(stage, index, cost) for stage, row in enumerate(costs) for index, cost in enumerate(row)]
        places = [at for at, (_, index, _) in enumerate(blocks) if at and index % parity == 0]
        modules = chance.randint(1, len(places) + 1)
        largest = min(
            max(sum(cost for *_, cost in blocks[a:b]) for a, b in itertools.pairwise([0, *cut, len(blocks)]))
            for cut in itertools.combinations(places, modules - 1)
        )
        depths = find_balanced_cut(costs, modules, parity)
        assert max(sum(n * row[0] for n, row in zip(module, costs, strict=True)) for module in depths) == largest
        starts = itertools.accumulate(depths, lambda a, b: tuple(map(sum, zip(a, b, strict=True))))
        assert all(n == len(row) or n % parity == 0 for start in starts for n, row in zip(start, costs, strict=True))


def test_balanced_cuts_of_known_models() -> None:
    assert find_balanced_cut([[1] * 12], 4) == ((3,), (3,), (3,), (3,))
    assert find_balanced_cut([[1] * 13], 4) == ((3,), (3,), (3,), (4,))
    with pytest.raises(ConfigError, match="1 to 3 modules"):
        find_balanced_cut([[1, 1, 1]], 4)
    with pytest.raises(ConfigError, match="1 to 2 modules"):
        find_balanced_cut([[1, 1, 1]], 3, parity=2)


def test_default_meta_model_is_small_and_fits() -> None:
    assert default_meta_depths(((3,), (3,)), 1) == ((1,), (1,))
    swin = ((2, 2, 6, 0), (0, 0, 6, 0), (0, 0, 6, 0), (0, 0, 0, 2))
    assert default_meta_depths(swin, 2) == ((1, 1, 2, 0), (0, 0, 2, 0), (0, 0, 1, 0), (0, 0, 0, 1))
    for case in CASES:
        target = case.partition(case.target)
        check_depths(target.family, target.depths, default_meta_depths(target.depths, target.family.parity))


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto", "mixer_b16_224"]
)
def test_block_flops_are_counted_for_each_block(name: str) -> None:
    model = ModelConfig(name=name, img_size=224)
    family = find_family(model)
    depths = family.default_depths(model)
    costs = family.count_block_flops(model, depths)
    assert tuple(map(len, costs)) == depths
    assert all(len(set(row)) == 1 for row in costs)
    if name == "vit_base_patch16_224":  # 12 blocks of 197 tokens: 24 T d^2 + 4 T^2 d
        assert costs[0][0] == 24 * 197 * 768**2 + 4 * 197**2 * 768
