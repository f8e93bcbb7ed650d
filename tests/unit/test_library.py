"""`import bigincubate`: what it offers, what it loads, and hybrids of models that a user built."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_models import CASES, Case, disturb, each_case
from small_models import hybrid as trainer_hybrid
from torch import Tensor, nn

import bigincubate as bi
from bigincubate.models.drop_path import find_drop_paths
from bigincubate.models.partition import hybrid_depths
from bigincubate.models.surgery import freeze_other_modules

SOURCE = Path(bi.__file__).read_text()


# ------------------------------------------------------------------------------------------------ the package


def new_process(code: str) -> str:
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return ended.stdout


def test_import_loads_no_dependency() -> None:
    """Counted in a new process: modules of this package and of other packages, beyond those of Python itself."""
    code = """
import sys
before = set(sys.modules)
import bigincubate as bi
names = dir(bi)
added = {name for name in sys.modules.keys() - before if name.partition(".")[0] not in sys.stdlib_module_names}
print(*sorted(added))
assert set(bi.__all__) <= set(names)
"""
    assert new_process(code).split() == ["bigincubate"]


def test_recipe_is_read_without_torch() -> None:
    code = "import sys, bigincubate as bi; bi.load_recipe('digits'); print('torch' in sys.modules)"
    assert new_process(code).strip() == "False"


def test_every_public_name_is_loaded_documented_and_typed() -> None:
    for name in bi.__all__:
        found = getattr(bi, name)
        assert inspect.getdoc(found), name
        if not inspect.isfunction(found):
            continue
        signature, doc = inspect.signature(found), inspect.getdoc(found) or ""
        assert signature.return_annotation is not inspect.Signature.empty, name
        assert all(one.annotation is not one.empty for one in signature.parameters.values()), name
        sections = ["Args:", "Raises:", "Example:"] + (["Returns:"] if signature.return_annotation != "None" else [])
        assert [section for section in sections if section not in doc] == [], name
        assert [one for one in signature.parameters if f"    {one}: " not in doc] == [], name


def test_type_checkers_see_the_names_that_are_loaded_lazily() -> None:
    """The imports under TYPE_CHECKING are exactly the lazy names, from the modules that they are loaded from."""
    tree = ast.parse(SOURCE)
    guard = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in guard.body if isinstance(node, ast.ImportFrom)]
    seen = {
        node.module: tuple(alias.name for alias in node.names)
        for node in imports
        if node.level == 1 and node.module is not None
    }
    assert seen == bi._MODULES
    assert sorted(["errors", *(name for names in seen.values() for name in names)]) == sorted(bi.__all__)


def test_page_lists_every_public_name() -> None:
    """`docs/library.md` has one row for each name, and uses no other."""
    page = (Path(bi.__file__).parents[1] / "docs" / "library.md").read_text()
    rows = re.findall(r"^\| `(\w+)[^|]*` \|", page, flags=re.MULTILINE)
    assert sorted(rows) == sorted(bi.__all__)
    assert set(re.findall(r"\bbi\.(\w+)", page)) <= set(bi.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'bigincubate' has no attribute 'build_hybird'"):
        bi.build_hybird  # noqa: B018


# ------------------------------------------------------------------------------------------------ hybrids


def cut(case: Case) -> tuple[nn.Module, nn.Module, bi.Partition, bi.Partition]:
    """Return target, meta model and their partitions, found from the models alone."""
    target, meta = disturb(case.build(case.target, seed=1), seed=2), disturb(case.build(case.meta, seed=3), seed=4)
    one, other = (
        bi.Partition.from_model(model, depths=depths) for model, depths in ((target, case.target), (meta, case.meta))
    )
    return target, meta, one, other


@each_case
def test_hybrid_has_the_tensors_of_the_trainers(case: Case) -> None:
    """Same names, shapes and trainable parameters; module k from the target, all others from the meta model."""
    target, meta, partition, meta_partition = cut(case)
    assert partition == case.partition(case.target)
    assert meta_partition == case.partition(case.meta)
    before = {name: tensor.clone() for model in (target, meta) for name, tensor in model.state_dict().items()}
    for module in range(partition.modules):
        ours = bi.build_hybrid(target, meta, module, partition, meta_partition)
        own = bi.Partition(partition.family, hybrid_depths(partition.depths, meta_partition.depths, module))
        theirs = trainer_hybrid(case, module, "fresh", meta)
        theirs.load_state_dict(ours.state_dict())  # strict: the same names and shapes
        images = case.images()
        # one unit in the last place for gMLP, whose 4 x 4 products depend on where the allocator puts them
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), atol=1e-6, rtol=1e-6)
        for name, parameter in ours.named_parameters():
            assert parameter.requires_grad == (own.owner(name) == module), name
            owner, local = own.to_local_name(name)
            source, names = (target, partition) if owner == module else (meta, meta_partition)
            assert torch.equal(parameter, source.state_dict()[names.to_global_name(owner, local)]), name
    assert all(torch.equal(before[name], tensor) for name, tensor in meta.state_dict().items())


@each_case
def test_modules_of_hybrids_assemble_to_the_target(case: Case) -> None:
    """Nothing was trained, so the assembled tensors are the target's, and copies of them."""
    target, meta, partition, meta_partition = cut(case)
    parts = [
        bi.extract_module(bi.build_hybrid(target, meta, module, partition, meta_partition))
        for module in range(partition.modules)
    ]
    assembled, expected = bi.assemble(parts, target), target.state_dict()
    assert assembled.keys() == expected.keys()
    assert all(torch.equal(assembled[name], tensor) for name, tensor in expected.items())
    assert not {t.data_ptr() for t in assembled.values()} & {t.data_ptr() for t in expected.values()}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto"])
def test_grown_target_computes_what_the_meta_model_computes(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    target, meta, partition, meta_partition = cut(case)
    images = case.images()
    expected = meta(images)
    assert not torch.allclose(target(images), expected, atol=1e-3)
    bi.grow(target, meta, partition, meta_partition)
    torch.testing.assert_close(target.eval()(images), expected, atol=1e-5, rtol=1e-4)
    for module in range(partition.modules):
        hybrid = bi.build_hybrid(target, meta, module, partition, meta_partition).eval()
        torch.testing.assert_close(hybrid(images), expected, atol=1e-5, rtol=1e-4)


def vit(depth: int, **more: Any) -> nn.Module:
    torch.manual_seed(depth)
    settings = {"img_size": 8, "patch_size": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 10, **more}
    return timm.create_model("vit_tiny_patch16_224", depth=depth, **settings)


def test_three_arguments_cut_a_vit_evenly() -> None:
    """The meta model has one block per module, as in the paper."""
    target, meta = vit(7), vit(3)
    hybrids = [bi.build_hybrid(target, meta, module) for module in range(3)]
    assert [len(hybrid.blocks) for hybrid in hybrids] == [4, 4, 5]  # type: ignore[arg-type]
    with pytest.raises(bi.errors.ConfigError, match="modules 0 to 2"):
        bi.build_hybrid(target, meta, 3)


def graph_nodes(loss: Tensor) -> int:
    """Return the number of nodes of an autograd graph."""
    seen, todo = set(), [loss.grad_fn]
    while todo:
        if (node := todo.pop()) is not None and node not in seen:
            seen.add(node)
            todo += [inner for inner, _ in node.next_functions]
    return len(seen)


def test_frozen_modules_are_not_differentiated() -> None:
    """No graph before the module; no gradient outside of it; the same graph as the trainer's hybrid."""
    case = Case("vit_tiny_patch16_224", [3, 3, 3], [1, 1, 1], {"embed_dim": 24, "num_heads": 3})
    target, meta, partition, _ = cut(case)
    for module in range(3):
        ours, theirs = bi.build_hybrid(target, meta, module, partition), trainer_hybrid(case, module, "fresh", meta)
        own = bi.Partition(partition.family, hybrid_depths(partition.depths, ((1,), (1,), (1,)), module))
        freeze_other_modules(theirs, own, module)
        recorded: list[bool] = []
        for block in own.blocks():
            record = partial(lambda to, _block, _inputs, out: to.append(out.requires_grad), recorded)
            ours.get_submodule(block.path).register_forward_hook(record)
        loss = ours(case.images()).square().mean()
        assert recorded == [block.module >= module for block in own.blocks()]
        assert graph_nodes(loss) == graph_nodes(theirs.train()(case.images()).square().mean())
        loss.backward()
        with_gradient = {name for name, parameter in ours.named_parameters() if parameter.grad is not None}
        assert with_gradient == {name for name, _ in ours.named_parameters() if own.owner(name) == module}


def test_drop_path_rates_are_those_of_the_target() -> None:
    """timm's layers stay in the module that trains; what the meta model drops in its own training is off."""
    target, meta = vit(6, drop_path_rate=0.5), vit(3, drop_path_rate=0.5)
    for module in range(3):
        hybrid = bi.build_hybrid(target, meta, module)
        assert all(child.training for child in hybrid.modules())
        rates = {
            path: child.drop_prob for path, child in hybrid.named_modules() if isinstance(child, timm.layers.DropPath)
        }
        expected = {
            f"blocks.{module + index}.drop_path{branch}": target.blocks[2 * module + index].drop_path1.drop_prob  # type: ignore
            for index in range(2)
            for branch in (1, 2)
            if module + index  # the target's first block drops nothing
        }
        assert rates == expected
        assert len(find_drop_paths(hybrid)) == 4  # of two frozen blocks, never active
        assert not any(path.active for path in find_drop_paths(hybrid))


@pytest.mark.parametrize(
    ("target", "meta", "arguments", "message"),
    [
        (lambda: vit(6), lambda: vit(3, embed_dim=48), {}, "width, input size"),
        (lambda: vit(6), lambda: vit(3, img_size=16), {}, "width, input size"),
        (lambda: vit(2), lambda: vit(3), {}, "1 to 2 modules"),
        (lambda: vit(6), lambda: vit(6), {"modules": 3}, "has 6 blocks, .* 3: .*meta_partition = "),
        (lambda: timm.create_model("resnet18"), lambda: vit(3), {}, "ResNet"),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224", device="meta"), lambda: vit(3), {}, "4 stages"),
    ],
)
def test_models_that_do_not_fit_are_refused(target: Any, meta: Any, arguments: dict[str, Any], message: str) -> None:
    model, shallow = target(), meta()
    partition = bi.Partition.from_model(model, **arguments) if arguments else None
    with pytest.raises(bi.errors.ConfigError, match=message):
        bi.build_hybrid(model, shallow, 0, partition)


def test_depths_of_another_model_are_refused() -> None:
    with pytest.raises(bi.errors.ConfigError, match="depths = "):
        bi.Partition.from_model(vit(6), depths=[3, 4])
    with pytest.raises(bi.errors.ConfigError, match="4 stages"):
        bi.Partition.from_model(timm.create_model("swin_tiny_patch4_window7_224", device="meta"), modules=2)


def test_module_of_another_model_is_not_extracted() -> None:
    hybrid = bi.build_hybrid(vit(4), vit(2), 0)
    for other in (vit(4), nn.DataParallel(hybrid)):
        with pytest.raises(bi.errors.ConfigError, match="extract_module"):
            bi.extract_module(other)


# ------------------------------------------------------------------------------------------------ wrong arguments


api: Any = bi  # for calls that a type checker refuses


def vits() -> tuple[nn.Module, nn.Module]:
    sizes = {"embed_dim": 12, "num_heads": 1, "num_classes": 5, "img_size": 32}
    return tuple(timm.create_model("vit_tiny_patch16_224", depth=depth, **sizes) for depth in (4, 2))


def test_assemble_names_what_is_missing() -> None:
    target, meta = vits()
    parts = [bi.extract_module(bi.build_hybrid(target, meta, module)) for module in range(2)]
    assert bi.assemble(parts, target).keys() == target.state_dict().keys()
    with pytest.raises(TypeError, match="expected"):
        api.assemble(parts)
    for expected in (target, target.state_dict(), list(target.state_dict())):
        for missing in (0, 1):
            with pytest.raises(bi.errors.ArtifactError, match="missing: " + ("blocks.2" if missing else "blocks.0")):
                bi.assemble([part for module, part in enumerate(parts) if module != missing], expected)
        with pytest.raises(bi.errors.ArtifactError, match="missing"):
            bi.assemble([], expected)
    with pytest.raises(bi.errors.ArtifactError, match="tensors of an earlier module"):
        bi.assemble([parts[0], parts[0]], target)
    parts[1]["head.bias"] = torch.ones(6)
    with pytest.raises(bi.errors.ArtifactError, match=r"head.bias' has shape \(6,\), but the target needs \(5,\)"):
        bi.assemble(parts, target)


@pytest.mark.parametrize("parts", [{}, "modules", nn.Linear(1, 1), [nn.Linear(1, 1)], [{"a": 3}], [None]])
def test_assemble_refuses_what_is_not_modules(parts: Any) -> None:
    with pytest.raises(bi.errors.ConfigError, match=r"list with the tensors|what extract_module returns"):
        bi.assemble(parts, ["a"])


@pytest.mark.parametrize("module", [True, 1.0, "1", None, -1, 2])
def test_hybrid_of_no_module_is_refused(module: Any) -> None:
    with pytest.raises(bi.errors.ConfigError, match="module = "):
        bi.build_hybrid(*vits(), module)


@pytest.mark.parametrize(
    "call",
    [
        lambda target, meta: api.build_hybrid("target", meta, 0),
        lambda target, meta: api.build_hybrid(target, None, 0),
        lambda target, meta: api.build_hybrid(meta, target, 0),
        lambda target, meta: api.grow(meta, target),
        lambda target, meta: api.grow(target, {}),
        lambda target, meta: api.extract_module(target),
        lambda target, meta: api.extract_module({}),
        lambda target, meta: api.Partition.from_model("vit_tiny_patch16_224"),
        lambda target, meta: api.Partition.from_model(target, modules=0),
        lambda target, meta: api.Partition.from_model(target, modules=-1),
        lambda target, meta: api.Partition.from_model(target, modules=2.0),
        lambda target, meta: api.Partition.from_model(target, modules=True),
        lambda target, meta: api.Partition.from_model(target, modules=5),
        lambda target, meta: api.Partition.from_model(target, modules=4, depths=[2, 2]),
        lambda target, meta: api.Partition.from_model(target, depths=[]),
        lambda target, meta: api.Partition.from_model(target, depths=[4, 0]),
        lambda target, meta: api.load_recipe("digits", "train.lr=1"),
        lambda target, meta: api.load_recipe(None),
        lambda target, meta: api.load_recipe(bi.load_recipe("digits")),
        lambda target, meta: api.plan("digits"),
        lambda target, meta: api.plan(api.load_recipe("digits"), world_sizes=[0]),
        lambda target, meta: api.plan(api.load_recipe("digits"), world_sizes=[2.0]),
        lambda target, meta: api.plan(api.load_recipe("digits"), world_sizes="12"),
        lambda target, meta: api.run("digits", "nowhere"),
        lambda target, meta: api.run(bi.load_recipe("digits"), "nowhere", jobs=0),
        lambda target, meta: api.run(bi.load_recipe("digits"), "nowhere", ranks=-1),
        lambda target, meta: api.run(bi.load_recipe("digits"), "nowhere", ranks="2"),
        lambda target, meta: api.train_phase("digits", "nowhere", "pretrain"),
        lambda target, meta: api.train_phase(bi.load_recipe("digits"), "nowhere", None),
        lambda target, meta: api.train_phase(bi.load_recipe("digits"), "nowhere", "incubate", True),
        lambda target, meta: api.train_phase(bi.load_recipe("digits"), "nowhere", "incubate", 1.0),
        lambda target, meta: api.train_phase(bi.load_recipe("digits"), "nowhere", "incubate", "1"),
        lambda target, meta: api.prepare_dataset("digits", "nowhere", jobs=0),
        lambda target, meta: api.prepare_dataset("digits", "nowhere", val_fraction=float("nan")),
        lambda target, meta: api.prepare_dataset("digits", "nowhere", val_fraction=1),
        lambda target, meta: api.prepare_dataset("digits", "nowhere", val_fraction=-0.1),
    ],
)
def test_wrong_argument_is_refused_in_one_line(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(bi.errors.ConfigError) as caught:
        call(*vits())
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
