"""Costs: against a flop counter on real tensors, against closed formulas, against published figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bigincubate.config import PHASES, Settings, list_shipped_recipes, load_recipe
from bigincubate.errors import ConfigError
from bigincubate.models.base import Depths
from bigincubate.planning.cost import CostCounter, cost_plan, count_cost, count_costs
from bigincubate.planning.memory import PhaseTensors, estimate_footprints, phase_tensors
from bigincubate.planning.phases import PhasePlan, Plan, make_plan, phase_model
from bigincubate.planning.planned_row import Cost
from bigincubate.planning.walltime import parse_cluster
from bigincubate.planning.ways import compare_ways

# GFLOPs an image of end to end, the meta model, and modules 0 to 3 when nothing is wasted
TABLE = {
    "imagenet-vit-b": (105.2, 35.4, 44.4, 41.2, 38.2, 35.1),
    "imagenet-vit-l": (369.0, 62.0, 123.9, 118.3, 113.0, 107.8),
    "imagenet-vit-h": (1003.4, 126.1, 315.1, 303.9, 293.2, 282.4),
}


@pytest.mark.parametrize("name", sorted(TABLE))
def test_training_flops_of_the_large_models(name: str) -> None:
    recipe = load_recipe(name)
    plan = make_plan(recipe)
    rows = [plan.row("end_to_end"), plan.row("pretrain"), *(plan.row("incubate", k) for k in range(4))]
    for row, expected in zip(rows, TABLE[name], strict=True):
        cost = count_cost(row, recipe.settings(row.phase), plan)
        assert cost.training_flops / 1e9 == pytest.approx(expected, rel=0.005), row.key


def test_flops_of_a_vit_follow_the_closed_formula() -> None:
    """Forward, an image: patch embedding 2·N·3p²·d, a block 2·T·12d² + 4·T²·d, head 2·d·C, with T = N + 1 tokens.
    Weight gradients cost the forward again in products with weights; so do activation gradients, save at the input;
    attention's two products have two gradients each."""
    recipe = load_recipe("imagenet-vit-b")
    plan = make_plan(recipe)
    d, n, c = 768, 196, 1000
    t = n + 1
    linear, attention = 2 * t * 12 * d * d, 4 * t * t * d
    patch, head = 2 * n * 3 * 256 * d, 2 * d * c
    row = plan.row("end_to_end")
    cost = count_cost(row, recipe.settings("end_to_end"), plan)
    assert cost.forward_flops == pytest.approx(patch + 12 * (linear + attention) + head, rel=0.01)
    assert cost.training_flops == pytest.approx(2 * patch + 3 * (12 * (linear + attention) + head), rel=0.01)
    row = plan.row("incubate", 1)
    cost = count_cost(row, recipe.settings("incubate"), plan)
    forward = patch + 6 * (linear + attention) + head
    # blocks 1 to 3 train; 4 and 5 and the head only pass the gradient on; block 0 gets none
    backward = 3 * (2 * linear + 2 * attention) + 2 * (linear + 2 * attention) + head
    assert cost.training_flops == pytest.approx(forward + backward, rel=0.01)


@pytest.mark.parametrize("module", [None, 0, 3])
def test_counted_without_data_equals_counted_on_real_tensors(module: int | None) -> None:
    recipe = load_recipe("digits")
    plan = make_plan(recipe)
    row = plan.row("incubate", module) if module is not None else plan.row("finetune")
    settings = recipe.settings(row.phase)
    cost = count_cost(row, settings, plan)
    model = phase_model(row, settings, plan.family).train()
    # torch 2.11 does not count the fused attention of CPUs
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model(torch.randn(2, 3, 8, 8)).sum()
        forward = counter.get_total_flops()
        loss.backward()
    assert cost.forward_flops == pytest.approx(forward / 2, rel=0.01)
    # a fused attention, as in the cost, computes its scores again in the backward: a fraction of a per cent here
    assert cost.training_flops == pytest.approx(counter.get_total_flops() / 2, rel=0.02)
    assert cost.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_saved_activations_equal_those_of_a_real_forward() -> None:
    recipe = load_recipe("digits")
    plan = make_plan(recipe)
    for row in (plan.row("finetune"), plan.row("incubate", 0), plan.row("incubate", 3)):
        settings = recipe.settings(row.phase)
        model = phase_model(row, settings, plan.family).train()
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        held: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor, held: dict[int, torch.Tensor] = held) -> torch.Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that no address is used twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(torch.randn(1, 3, 8, 8))
        real = sum(tensor.untyped_storage().nbytes() for key, tensor in held.items() if key not in own)
        assert count_cost(row, settings, plan).activation_bytes == real, row.key
        del output


@pytest.mark.parametrize("name", sorted(list_shipped_recipes()))
def test_every_shipped_recipe_is_built(name: str) -> None:
    recipe = load_recipe(name)
    plan = make_plan(recipe)
    # at the incubation's image size: fine-tuning on larger images has more positions
    target = phase_model(plan.row("finetune"), recipe.settings("incubate"), plan.family, device="meta")
    total = sum(p.numel() for p in target.parameters())
    parts = 0
    for module in range(plan.modules):
        hybrid = phase_model(plan.row("incubate", module), recipe.settings("incubate"), plan.family, device="meta")
        parts += sum(p.numel() for p in hybrid.parameters() if p.requires_grad)
    assert parts == total  # the modules are the model: nothing twice, nothing left out


def test_baseline_has_the_flops_of_the_incubation() -> None:
    recipe = load_recipe("digits")
    rows = cost_plan(recipe, make_plan(recipe), samples=1437)
    *incubation, baseline = rows
    budget = sum(row.total_flops for row in incubation)
    one_step = baseline.cost.training_flops * baseline.batch_size
    assert budget - one_step < baseline.total_flops <= budget


@pytest.mark.parametrize("expanded", [{0, 1, 2, 3}, {0, 2}])
def test_fine_tuning_gets_the_flops_of_modules_that_are_not_incubated(expanded: set[int]) -> None:
    recipe = load_recipe("digits")
    plan = make_plan(recipe)
    *rows, baseline = cost_plan(recipe, replace(plan, expanded=frozenset(expanded)), samples=50000)
    budget = sum(row.total_flops for row in cost_plan(recipe, plan, samples=50000)[:-1])
    for total, last in ((sum(row.total_flops for row in rows), rows[-1]), (baseline.total_flops, baseline)):
        assert last.unused_flops is not None
        assert total + last.unused_flops == budget
        assert last.unused_flops < min(last.cost.training_flops * last.batch_size, 0.005 * budget)


def test_ways_have_equal_flops_and_different_paths() -> None:
    recipe = load_recipe("digits")
    plan = make_plan(recipe)
    costs = count_costs(recipe, plan)
    rows = {row.key: row for row in cost_plan(recipe, plan, 1437, costs)}
    flops = {key: row.total_flops for key, row in rows.items()}
    cluster = parse_cluster("gpus=4,tflops=1")
    ways = {way.key: way for way in compare_ways(recipe, plan, 1437, costs, cluster)}
    assert list(ways) == ["incubate", "expand", "end_to_end", "meta"]
    whole = sum(flops.values()) - flops["end_to_end"]
    assert ways["incubate"].flops == whole
    for key in ("expand", "end_to_end", "meta"):
        assert 0.995 * whole < ways[key].flops == ways[key].separate_path_flops <= whole
        assert ways[key].connected_path_flops == ways[key].flops / 4
    own = flops["pretrain"] + flops["finetune"]
    assert ways["incubate"].separate_path_flops == own + flops["incubate/0"]
    assert ways["incubate"].connected_path_flops == own / 4 + flops["incubate/0"]
    assert ways["incubate"].seconds == pytest.approx((own / 4 + flops["incubate/0"]) / 1e12)
    # all gradients of the model are sent in each step of the meta model and of the last phase, none by modules
    sent = {key: rows[key].steps * rows[key].cost.allreduce_bytes for key in ("pretrain", "finetune")}
    assert ways["incubate"].sent_before == ways["expand"].sent_before == sent["pretrain"]
    assert ways["incubate"].sent_last == sent["finetune"]
    assert ways["incubate"].memory_last == ways["end_to_end"].memory_last > ways["incubate"].memory_before > 0


def test_ways_include_the_modules_that_the_recipe_lists() -> None:
    recipe = load_recipe("digits", ["plan.incubate=[1, 3]", "finetune.train.batch_size=126"])
    plan = make_plan(recipe)
    ways = {way.key: way for way in compare_ways(recipe, plan, 1437, count_costs(recipe, plan))}
    assert ways["recipe"].title == "incubation of 1, 3"
    path = [ways[key].separate_path_flops for key in ("incubate", "recipe", "expand")]
    assert path == sorted(path)
    assert {(way.connected_path_flops, way.sent_last, way.seconds) for way in ways.values()} == {(None, None, None)}


def test_length_of_fine_tuning_can_be_set_in_epochs() -> None:
    sets = ["plan.incubate=none", "finetune.train.epochs=7", "finetune.budget=epochs"]
    recipe = load_recipe("digits", sets)
    row = cost_plan(recipe, make_plan(recipe), samples=1437)[1]
    assert (row.key, row.epochs, row.unused_flops) == ("finetune", 7.0, None)


def test_budget_changes_nothing_if_all_modules_are_incubated() -> None:
    recipe, other = load_recipe("digits"), load_recipe("digits", ["finetune.budget=epochs"])
    rows, others = (cost_plan(each, make_plan(each), samples=1437) for each in (recipe, other))
    assert [row.steps for row in rows] == [row.steps for row in others]


def test_balanced_cut_takes_the_models_own_depth() -> None:
    recipe = load_recipe("imagenet-vit-b")
    free = recipe.model_copy(update={"plan": type(recipe.plan)(modules=4)})
    plan = make_plan(free)
    assert (plan.target, plan.meta) == (((3,),) * 4, ((1,),) * 4)


class Recorded(TorchDispatchMode):
    """Notes the names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


def test_plan_is_made_without_initializing_models() -> None:
    """Every phase of a run makes the plan again."""
    with Recorded() as ran:  # a model that no other test has planned in this process
        make_plan(load_recipe("digits", ["model.name=deit_tiny_patch16_224.fb_in1k"]))
    assert "empty" in ran.names
    assert not ran.names & {"erfinv_", "clamp_"}  # timm draws most weights with these, which are slow without a device


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["plan.target_depths=[3,3,3]", "plan.meta_depths=[1,1]"], "meta"),
        (["plan.target_depths=[[1,1],[2,2]]", "plan.meta_depths=[1,1]"], "target_depths"),
        (["model.name=resnet50"], "not supported"),
        (["model.name=vit_bse_patch16_224"], "vit_base"),
        (["model.args.embed_dim=7"], "embed_dim|divisible|num_heads|built"),
        (["finetune.model.name=vit_large_patch16_224"], "cannot change it"),
    ],
)
def test_cut_that_cannot_be_is_refused(sets: list[str], says: str) -> None:
    recipe = load_recipe("imagenet-vit-b", sets)
    with pytest.raises(ConfigError, match=says):
        make_plan(recipe)


def test_gradients_of_a_depthwise_convolution_cost_what_its_forward_does(tmp_path: Path) -> None:
    file = tmp_path / "convnext.toml"
    file.write_text('[model]\nname = "convnext_atto"\nimg_size = 64\n[plan]\nmodules = 2\n')
    recipe = load_recipe(str(file))
    plan = make_plan(recipe)
    row = plan.row("finetune")
    cost = count_cost(row, recipe.settings("finetune"), plan)
    model = phase_model(row, recipe.settings("finetune"), plan.family)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.get_submodule("stem")(torch.randn(1, 3, 64, 64))
    # every product has two gradients of its own price, save that the image gets none
    assert cost.training_flops == pytest.approx(3 * cost.forward_flops - counter.get_total_flops(), rel=0.01)


DEEP = """
[model]
name = "{model}"
num_classes = 10
[plan]
target_depths = {target}
meta_depths = {meta}
"""


@pytest.mark.parametrize(
    ("model", "target", "meta", "sets"),
    [
        ("vit_tiny_patch16_224", [3] * 10, [1] * 10, ["train.subset_drop_path=true", "train.last_block_cls_only=true"]),
        ("vit_tiny_patch16_224", [30, 1], [2, 1], ["optim.name=lamb", "optim.layer_decay=0.7"]),
        ("vit_tiny_patch16_224", [8, 4, 1, 5], [1] * 4, ["model.img_size=32"]),
        (
            "swin_tiny_patch4_window7_224",
            [[2, 2, 8, 0], [0, 0, 7, 0], [0, 0, 5, 2]],
            [[2, 2, 2, 0], [0, 0, 1, 0], [0, 0, 1, 1]],
            [],
        ),
    ],
)
def test_extrapolated_costs_equal_counted_costs(
    model: str, target: list[Any], meta: list[Any], sets: list[str], tmp_path: Path
) -> None:
    (tmp_path / "deep.toml").write_text(DEEP.format(model=model, target=target, meta=meta))
    recipe = load_recipe(tmp_path / "deep.toml", sets)
    plan = make_plan(recipe)
    counters: dict[str, CostCounter] = {}
    for row in plan.rows():
        settings = recipe.settings(row.phase)
        counter = counters.setdefault(row.phase, CostCounter(settings, plan))
        if row.phase == "finetune" or row.module in (0, 1, plan.modules - 1):
            assert counter.count(row) == count_cost(row, settings, plan), row.key


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Depths]:
    """The depths of the models that are counted."""
    counted: list[Depths] = []

    def count_and_note(row: PhasePlan, settings: Settings, plan: Plan) -> Cost:
        counted.append(row.depths)
        return count_cost(row, settings, plan)

    monkeypatch.setattr("bigincubate.planning.cost.count_cost", count_and_note)
    return counted


def test_modules_share_the_cost_of_a_further_block(counted: list[Depths]) -> None:
    recipe = load_recipe("digits")
    counters = {phase: CostCounter(recipe.settings(phase), make_plan(recipe)) for phase in PHASES}
    blocks = {}
    for row in make_plan(recipe).rows():
        counters[row.phase].count(row)
        blocks[row.key] = sum(sum(map(sum, depths)) for depths in counted)
        counted.clear()
    # of 4, 11 and 32 blocks; the longer ones are counted with 2 and 3 blocks in the run that is trained
    modules = {"incubate/0": 5 + 6, "incubate/1": 5, "incubate/2": 5, "incubate/3": 5}
    assert blocks == {"pretrain": 4, **modules, "finetune": 2 + 3, "end_to_end": 2 + 3}


def test_number_of_counted_models_does_not_grow_with_the_modules(tmp_path: Path, counted: list[Depths]) -> None:
    numbers = []
    for modules in (30, 60):
        model = DEEP.format(model="vit_tiny_patch16_224", target=[2] * modules, meta=[1] * modules)
        (tmp_path / "deep.toml").write_text(model)
        recipe = load_recipe(tmp_path / "deep.toml")
        counted.clear()
        assert len(cost_plan(recipe, make_plan(recipe), samples=50_000)) == modules + 3
        assert max(sum(map(sum, depths)) for depths in counted) <= 8
        numbers.append(len(counted))
    assert numbers[0] == numbers[1] <= 20


def test_block_that_depends_on_its_index_is_refused_at_any_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Costs of deep models are counted on shallow ones, which do not have this block."""
    (tmp_path / "deep.toml").write_text(DEEP.format(model="vit_tiny_patch16_224", target=[20, 20], meta=[1, 1]))
    recipe = load_recipe(tmp_path / "deep.toml")
    plan = make_plan(recipe)
    build = type(plan.family).build

    def build_with_another_block(*arguments: Any, **options: Any) -> Any:
        model: Any = build(*arguments, **options)
        if len(model.blocks) > 30:
            model.blocks[30].mlp = torch.nn.Identity()
        return model

    monkeypatch.setattr(type(plan.family), "build", build_with_another_block)
    with pytest.raises(ConfigError, match=r"blocks blocks\.0 and blocks\.30 differ"):
        cost_plan(recipe, plan, samples=50_000)


def test_memory_of_modules_of_equal_shape_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("digits")
    plan = make_plan(recipe)
    rows = [row for row in cost_plan(recipe, plan, samples=1437) if row.phase == "incubate"]
    alone = {row.key: estimate_footprints(recipe, plan, [row], [1, 2])[row.key] for row in rows}
    counted: list[PhasePlan] = []

    def compute_and_note(row: PhasePlan, settings: Settings, plan: Plan) -> PhaseTensors:
        counted.append(row)
        return phase_tensors(row, settings, plan)

    monkeypatch.setattr("bigincubate.planning.memory.phase_tensors", compute_and_note)
    assert estimate_footprints(recipe, plan, rows, [1, 2]) == alone
    assert [row.module for row in counted] == [0, 1, 3]
