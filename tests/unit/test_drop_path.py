"""Stochastic depth from outside: rates, masks as a pure function, ranks."""

from __future__ import annotations

import pytest
import timm
import torch
from small_models import CASES, Case, disturb, each_case
from torch import Tensor, nn

from bigincubate.errors import ConfigError
from bigincubate.models.drop_path import DropPath, apply_masks, draw_masks, find_drop_paths, set_drop_path_rates
from bigincubate.models.partition import Partition, hybrid_depths
from bigincubate.models.vision.build import TimmFamily


def rates_of(model: nn.Module, partition: Partition) -> list[list[float]]:
    return [[d.rate for d in find_drop_paths(model.get_submodule(block.path))] for block in partition.blocks()]


@each_case
def test_hybrid_rates_are_timms(case: Case) -> None:
    target, meta = case.partition(case.target), case.partition(case.meta)
    own = case.partition(hybrid_depths(target.depths, meta.depths, 0))
    model = case.build(own.depths)
    set_drop_path_rates(model, own, "hybrid", 0.3, target.depths, 0)
    assert isinstance(own.family, TimmFamily)
    kwargs = dict(case.args)
    if own.family.depth_argument:
        kwargs[own.family.depth_argument] = own.stage_depths if own.family.stages > 1 else own.stage_depths[0]
    plain = timm.create_model(case.name, drop_path_rate=0.3, **kwargs)
    for block, rates in zip(own.blocks(), rates_of(model, own), strict=True):
        timms = [m for n, m in plain.get_submodule(block.path).named_modules() if "drop_path" in n.rpartition(".")[2]]
        assert rates == [getattr(m, "drop_prob", 0.0) for m in timms]


@each_case
def test_target_rates_are_those_of_the_target(case: Case) -> None:
    target, meta = case.partition(case.target), case.partition(case.meta)
    whole = case.build(case.target)
    set_drop_path_rates(whole, target, "target", 0.3, target.depths, None)
    final = {
        (b.module, b.stage, b.index_in_module): r for b, r in zip(target.blocks(), rates_of(whole, target), strict=True)
    }
    assert max(max(rates) for rates in final.values()) == pytest.approx(0.3)
    for module in range(target.modules):
        own = case.partition(hybrid_depths(target.depths, meta.depths, module))
        model = case.build(own.depths)
        set_drop_path_rates(model, own, "target", 0.3, target.depths, module)
        for block, rates in zip(own.blocks(), rates_of(model, own), strict=True):
            expected = final[block[0], block[1], block[3]] if block.module == module else [0.0] * len(rates)
            assert rates == expected


def test_masks_are_a_pure_function_of_seed_and_step() -> None:
    before = torch.get_rng_state()
    masks = draw_masks(1, 5, 6, 64)
    assert torch.equal(torch.get_rng_state(), before)
    assert masks.shape == (6, 64)
    assert torch.equal(masks, draw_masks(1, 5, 6, 64))
    assert not torch.equal(masks, draw_masks(1, 6, 6, 64))
    assert not torch.equal(masks, draw_masks(2, 5, 6, 64))
    pinned = torch.tensor([0.1241610, 0.8361011, 0.3746647])  # the same in every process
    torch.testing.assert_close(masks[0, :3], pinned, rtol=0, atol=1e-6)


def scale_of(module: nn.Module) -> Tensor:
    assert isinstance(module, DropPath)
    assert module.scale is not None
    return module.scale


def test_masks_drop_whole_branches_of_samples() -> None:
    case = CASES[0]
    partition = case.partition([2, 1])
    model = disturb(case.build([2, 1])).train()
    set_drop_path_rates(model, partition, "target", 0.5, partition.depths, None)
    uniform = torch.ones(6, 2) * 0.1
    uniform[4, 1] = uniform[5, 1] = 0.9  # the last block, rate 0.5: both branches of sample 1 dropped
    apply_masks(model, uniform)
    scales = [scale_of(module) for module in find_drop_paths(model)]
    assert scales[0].tolist() == [1.0, 1.0]  # rate 0, in a ramp
    assert [s.tolist() for s in scales[4:]] == [[2.0, 0.0], [2.0, 0.0]]
    torch.testing.assert_close(scales[2], torch.full((2,), 1 / 0.75))

    seen: list[Tensor] = []
    model.get_submodule("blocks.2").register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0], output]))
    model(case.images())
    assert torch.equal(seen[0][1], seen[1][1])
    assert not torch.equal(seen[0][0], seen[1][0])
    trained = model(case.images())
    evaluated = model.eval()(case.images())
    assert not torch.equal(trained, evaluated)
    apply_masks(model, torch.zeros(6, 2))
    assert torch.equal(model(case.images()), evaluated)  # evaluation never drops


def test_block_of_a_ramp_with_rate_0_computes_what_it_would_without_a_scale() -> None:
    case = CASES[0]
    partition = case.partition([2, 1])
    model = disturb(case.build([2, 1])).train()
    set_drop_path_rates(model, partition, "target", 0.5, partition.depths, None)
    first, x = model.get_submodule("blocks.0"), torch.randn(2, 5, case.args["embed_dim"])
    without = first(x)
    apply_masks(model, draw_masks(0, 0, 6, 2))
    assert scale_of(first.get_submodule("drop_path1")) is not None
    assert torch.equal(first(x), without)


def test_frozen_blocks_have_no_scale_where_the_module_alone_drops() -> None:
    case = CASES[0]
    partition = case.partition([1, 2])
    model = case.build([1, 2]).train()
    set_drop_path_rates(model, partition, "target", 0.5, case.partition([2, 2]).depths, 1)
    apply_masks(model, draw_masks(0, 0, 6, 2))
    assert [path.scale is None for path in find_drop_paths(model)] == [True, True, False, False, False, False]


def test_rank_with_its_columns_computes_what_one_process_computes() -> None:
    case = CASES[1]
    partition = case.partition(case.target)
    model = disturb(case.build(case.target)).train()
    set_drop_path_rates(model, partition, "hybrid", 0.4, partition.depths, 0)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    uniform = draw_masks(0, 3, len(find_drop_paths(model)), 8)
    apply_masks(model, uniform)
    whole = model(images)
    for rank in range(2):
        apply_masks(model, uniform[:, rank::2])
        torch.testing.assert_close(model(images[rank::2]), whole[rank::2], rtol=0, atol=1e-6)


def test_rates_out_of_range_are_refused() -> None:
    case = CASES[0]
    partition = case.partition([1, 1])
    for rate in (-0.1, 1.0):
        with pytest.raises(ConfigError, match=r"drop_path\.rate"):
            set_drop_path_rates(case.build([1, 1]), partition, "target", rate, partition.depths, None)


def test_drop_path_keeps_the_dtype() -> None:
    drop = DropPath()
    drop.rate, drop.scale = 0.5, torch.tensor([0.0, 2.0])
    out = drop(torch.ones(2, 3, 4, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert out[:, 0, 0].tolist() == [0.0, 2.0]
