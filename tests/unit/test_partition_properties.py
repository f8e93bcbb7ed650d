"""Properties of cuts: taking a model apart and assembling it is the identity, and a balanced cut is the best one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bigincubate.config import ModelConfig
from bigincubate.models.base import Depths, ModelFamily
from bigincubate.models.library import find_family
from bigincubate.models.partition import Partition, find_balanced_cut, hybrid_depths
from bigincubate.models.surgery import assemble, extract, rename_tensors

FAMILIES = {
    name: find_family(ModelConfig(name=name))
    for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto")
}


@st.composite
def cuts(draw: st.DrawFn) -> tuple[ModelFamily, Depths]:
    """Draw a family, a number of blocks for each stage and a cut into modules."""
    family = FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))]
    blocks = [stage for stage in range(family.stages) for _ in range(draw(st.integers(1, 5)))]
    cut_after = draw(st.lists(st.booleans(), min_size=len(blocks) - 1, max_size=len(blocks) - 1))
    ends = [at for at, cut in enumerate(cut_after, 1) if cut]
    depths = []
    for begin, end in itertools.pairwise([0, *ends, len(blocks)]):
        depths.append(tuple(blocks[begin:end].count(stage) for stage in range(family.stages)))
    return family, tuple(depths)


@st.composite
def shallower(draw: st.DrawFn, target: Depths) -> Depths:
    """Draw depths of a meta model that has blocks exactly where the target has."""
    return tuple(tuple(draw(st.integers(1, depth)) if depth else 0 for depth in row) for row in target)


def state_of(partition: Partition) -> dict[str, Tensor]:
    """Return made-up tensors of everything that a model of this partition has, each with a number of its own."""
    family = partition.family
    names = [f"{prefix}.weight" for prefix in (*family.stem, *family.tail)]
    names += [f"{block.path}.{rest}" for block in partition.blocks() for rest in ("norm.weight", "mlp.fc1.bias")]
    head, staged, _ = family.block.partition("{stage}")
    if staged:
        names += [f"{head}{stage}.downsample.weight" for stage in range(family.stages)]
    return {name: torch.tensor(number) for number, name in enumerate(names)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Return whether two states hold the same tensors under the same names."""
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a)


@given(cuts())
def test_cut_and_assembled_model_is_the_same(cut: tuple[ModelFamily, Depths]) -> None:
    partition = Partition(*cut)
    state = state_of(partition)
    parts = [extract(state, partition, module) for module in range(partition.modules)]
    assert sum(map(len, parts)) == len(state)
    assert same(assemble(parts, state), state)
    assert all(partition.to_global_name(*partition.to_local_name(name)) == name for name in state)


@given(st.data())
def test_module_keeps_its_tensors_through_a_hybrid_model(data: st.DataObject) -> None:
    family, target = data.draw(cuts())
    meta = data.draw(shallower(target))
    whole = Partition(family, target)
    state = state_of(whole)
    for module in range(whole.modules):
        hybrid = Partition(family, hybrid_depths(target, meta, module))
        part = extract(state, whole, module)
        moved = rename_tensors(part, whole, hybrid)
        assert moved.keys() == extract(state_of(hybrid), hybrid, module).keys()
        assert same(rename_tensors(moved, hybrid, whole), part)


def best_by_trying_all(costs: Sequence[Sequence[int]], modules: int, parity: int) -> list[Any]:
    """Return the rank of the best cut: largest module, sum of squares, and the places of the cuts."""
    blocks = [(index, cost) for row in costs for index, cost in enumerate(row)]
    places = [at for at, (index, _) in enumerate(blocks) if at and index % parity == 0]
    found = []
    for chosen in itertools.combinations(places, modules - 1):
        sums = [
            sum(cost for _, cost in blocks[begin:end]) for begin, end in itertools.pairwise([0, *chosen, len(blocks)])
        ]
        found.append([max(sums), sum(value**2 for value in sums), list(chosen)])
    return min(found)


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=3),
    st.sampled_from([1, 2]),
    st.data(),
)
def test_balanced_cut_is_the_best_of_all(costs: list[list[int]], parity: int, data: st.DataObject) -> None:
    most = sum(-(-len(row) // parity) for row in costs)
    modules = data.draw(st.integers(1, most))
    depths = find_balanced_cut(costs, modules, parity)
    assert [sum(column) for column in zip(*depths, strict=True)] == [len(row) for row in costs]
    ends = list(itertools.accumulate(sum(row) for row in depths))
    flat = [cost for row in costs for cost in row]
    sums = [sum(flat[begin:end]) for begin, end in itertools.pairwise([0, *ends])]
    assert [max(sums), sum(value**2 for value in sums), ends[:-1]] == best_by_trying_all(costs, modules, parity)
