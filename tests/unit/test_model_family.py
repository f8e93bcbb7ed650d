"""Model families outside of timm: a tiny one with dotted names, and what is refused of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_family
import torch
from small_models import disturb
from tiny_family import FAMILY, INPUTS, OUTPUTS

from bigincubate.config import MetaConfig, ModelConfig, Recipe, TaskConfig, load_recipe
from bigincubate.errors import ArtifactError, ConfigError
from bigincubate.interchange.export import SPEC, load_model
from bigincubate.interchange.pretrained import pretrained_meta
from bigincubate.models.checks import check_model
from bigincubate.models.drop_path import find_drop_paths, set_drop_path_rates
from bigincubate.models.library import find_family
from bigincubate.models.partition import Partition
from bigincubate.models.surgery import assemble, extract, initialize, insert, rename_tensors
from bigincubate.planning.cost import count_cost
from bigincubate.planning.phases import make_plan, phase_model
from bigincubate.planning.smoke import smoke
from bigincubate.storage.artifacts import ModelSpec

SETTINGS = ModelConfig(library=FAMILY.library, name="tiny")
TARGET, META = ((2,), (3,)), ((1,), (1,))
RECIPE = f"""
[model]
library = "{FAMILY.library}"
name = "tiny"
[plan]
target_depths = [2, 3]
meta_depths = [1, 1]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    file = tmp_path / "tiny.toml"
    file.write_text(RECIPE)
    return load_recipe(str(file))


def build(depths: tuple[tuple[int, ...], ...], seed: int = 0, **args: object) -> tiny_family.TinyModel:
    torch.manual_seed(seed)
    model = FAMILY.build(SETTINGS.model_copy(update={"args": args}), depths)
    assert isinstance(model, tiny_family.TinyModel)
    return model


def test_longest_prefix_owns_a_tensor() -> None:
    partition = Partition(FAMILY, TARGET)
    owners = {name: partition.owner(name) for name in build(TARGET).state_dict()}
    assert {owners["model.embed.weight"], owners["model.layers.1.up.bias"]} == {0}
    assert {owners["model.norm.weight"], owners["head.weight"], owners["model.layers.2.up.bias"]} == {1}
    assert partition.to_local_name("model.layers.4.up.bias") == (1, "model.layers.2.up.bias")
    assert partition.to_global_name(1, "model.layers.2.up.bias") == "model.layers.4.up.bias"
    assert FAMILY.count_blocks(owners) == (5,)
    for name in ("model.layers.5.up.bias", "models.embed.weight", "head2.weight", "scale"):
        with pytest.raises(ArtifactError, match=name):
            partition.owner(name)


def test_modules_move_between_depths_and_grow_starts_as_the_meta_model() -> None:
    meta, target = disturb(build(META)), disturb(build(TARGET, seed=1))
    shallow, deep = Partition(FAMILY, META), Partition(FAMILY, TARGET)
    inputs, parts = torch.randn(4, INPUTS), []
    for module in range(2):
        depths = tuple((TARGET if k == module else META)[k] for k in range(2))
        own, hybrid = Partition(FAMILY, depths), disturb(build(depths, seed=2))
        insert(hybrid, own, extract(meta.state_dict(), shallow, 1 - module), shallow)
        initialize(hybrid, own, [module], meta.state_dict(), shallow, "grow")
        assert torch.equal(hybrid(inputs), meta(inputs))
        insert(hybrid, own, extract(target.state_dict(), deep, module), deep)
        parts.append(rename_tensors(extract(hybrid.state_dict(), own, module), own, deep))
    other = build(TARGET, seed=3).eval()
    other.load_state_dict(assemble(parts, other.state_dict()))
    assert torch.equal(other(inputs), target(inputs))


def test_plan_and_costs_need_nothing_but_the_family(recipe: Recipe) -> None:
    plan = make_plan(recipe)
    assert (plan.family, plan.target, plan.meta) == (FAMILY, TARGET, META)
    cost = count_cost(plan.row("finetune"), recipe.settings("finetune"), plan)
    assert cost.forward_flops == 2 * 4 * (INPUTS + OUTPUTS + 5 * 2 * 8)
    assert cost.activation_bytes > 0
    cut = recipe.model_copy(update={"plan": type(recipe.plan)(modules=3)})
    assert make_plan(cut).target == ((2,), (2,), (2,))
    model = phase_model(plan.row("incubate", 0), recipe.settings("incubate"), FAMILY)
    assert [name for name, p in model.named_parameters() if p.requires_grad][:2] == [
        "model.embed.weight",
        "model.embed.bias",
    ]
    set_drop_path_rates(model, Partition(FAMILY, ((2,), (1,))), "hybrid", 0.2, TARGET, 0)
    assert [path.rate for path in find_drop_paths(model)] == pytest.approx([0, 0.1, 0.2])
    assert smoke(recipe)["finetune"]["model"] == {}


def test_library_of_a_model_is_loaded_by_its_name() -> None:
    assert find_family(SETTINGS) is FAMILY
    assert find_family(ModelConfig()).name == "vit"
    with pytest.raises(ConfigError, match=r"model\.library = 'tiny_family:not_a_family'.*str, not a ModelFamily"):
        find_family(ModelConfig(library="tiny_family:not_a_family"))
    with pytest.raises(ConfigError, match=r"model\.library = 'tim'"):
        find_family(ModelConfig(library="tim"))


def test_tied_weights_across_modules_are_refused_by_name() -> None:
    for depths in (TARGET, META):
        with pytest.raises(ConfigError, match=r"model\.embed\.weight \(module 0\) and head\.weight \(module 1\).*tied"):
            check_model(build(depths, tied=True), Partition(FAMILY, depths))
    whole = ((5,),)
    check_model(build(whole, tied=True), Partition(FAMILY, whole))  # one module owns both


def test_blocks_that_depend_on_their_index_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"model\.layers\.0 and model\.layers\.1 differ"):
        check_model(build(TARGET, wider=2), Partition(FAMILY, TARGET))
    check_model(build(TARGET), Partition(FAMILY, TARGET))


def test_library_named_by_an_exported_file_only_is_never_loaded(tmp_path: Path) -> None:
    spec = ModelSpec(task=TaskConfig(), model=SETTINGS, depths=[[2], [3]], metadata={})
    (tmp_path / "config.json").write_text(json.dumps({SPEC: spec.model_dump()}))
    with pytest.raises(ArtifactError, match=r"needs code outside this package \(tiny_family:find_family\)"):
        load_model(tmp_path)


def test_features_that_need_timm_are_refused(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match=r"meta\.init .*model\.library"):
        pretrained_meta(MetaConfig(init="timm:vit_tiny_patch16_224"), SETTINGS, Partition(FAMILY, META), {})
    plan = make_plan(recipe)
    for key in ("subset_drop_path", "last_block_cls_only"):
        train = recipe.train.model_copy(update={key: True})
        settings = recipe.settings("finetune").model_copy(update={"train": train})
        with pytest.raises(ConfigError, match=rf"train\.{key}: not supported for tiny models"):
            phase_model(plan.row("finetune"), settings, FAMILY)


def test_phase_cannot_change_the_library(tmp_path: Path) -> None:
    file = tmp_path / "tiny.toml"
    file.write_text(RECIPE + '[finetune.model]\nlibrary = "timm"\n')
    with pytest.raises(ConfigError, match=r"finetune\.model\.library differs from model\.library"):
        make_plan(load_recipe(str(file)))
