"""Initial weights of the end-to-end baseline: plain, scaled by depth, mimetic."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import CASES, Case, build_timm, each_case
from torch import Tensor, nn

from bigincubate.config import ModelConfig, ModelInit
from bigincubate.errors import ConfigError
from bigincubate.models.initialization import initialize_model
from bigincubate.models.library import find_family
from bigincubate.models.partition import Partition

WIDTH, HEADS = 192, 3


def build(init: ModelInit, name: str = "vit_tiny_patch16_224", seed: int = 5, **args: Any) -> nn.Module:
    """A ViT of two blocks on 3 by 3 patches, wide enough for statistics."""
    partition = Partition(find_family(ModelConfig(name=name)), ((2,),))
    torch.manual_seed(seed)
    args = {"embed_dim": WIDTH, "num_heads": HEADS, **args}
    model = build_timm(name, partition.depths, num_classes=5, img_size=48, args=args)
    initialize_model(model, partition, init)
    return model


@each_case
def test_scaled_divides_the_output_of_each_branch_by_the_root_of_their_number(case: Case) -> None:
    partition = case.partition(case.target)
    plain, scaled = case.build(case.target), case.build(case.target)
    initialize_model(scaled, partition, "scaled")
    outputs = {
        id(parameter)
        for block in partition.blocks()
        for output in partition.family.residual_outputs(scaled.get_submodule(block.path))
        for parameter in output.parameters()
    }
    layers = len({name.rpartition(".")[0] for name, p in scaled.named_parameters() if id(p) in outputs})
    if type(scaled.get_submodule(next(iter(partition.blocks())).path)).__name__ == "Block":  # a ViT
        assert layers == 2 * sum(partition.stage_depths)
    before = dict(plain.named_parameters())
    for name, parameter in scaled.named_parameters():
        expected = before[name] / math.sqrt(layers) if id(parameter) in outputs else before[name]
        assert torch.equal(parameter, expected), name


def products(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """For each head, the product of queries and keys; for each block, that of values and projection."""
    pairs, outputs = [], []
    for name, layer in model.named_modules():
        if name.endswith("attn"):
            query, key, value = layer.qkv.weight.detach().double().chunk(3)
            for q, k in zip(query.chunk(HEADS), key.chunk(HEADS), strict=True):
                pairs.append(q.T @ k)
                # both factors have the same scales
                torch.testing.assert_close(q @ q.T, k @ k.T, atol=1e-5, rtol=1e-5)
            outputs.append(value.T @ layer.proj.weight.detach().double().T)
    return pairs, outputs


def check_statistics(product: Tensor, noise: float, identity: float) -> None:
    rest = product - identity * torch.eye(WIDTH)
    assert float(product.diagonal().mean()) == pytest.approx(identity, abs=0.03)
    assert float(rest.std()) == pytest.approx(noise / math.sqrt(WIDTH), rel=0.03)
    assert float(rest.mean()) == pytest.approx(0, abs=0.002)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"])
def test_mimetic_attention_has_the_products_of_the_paper(name: str) -> None:
    pairs, outputs = products(build("mimetic", name))
    assert (len(pairs), len(outputs)) == (2 * HEADS, 2)
    for product in outputs:
        check_statistics(product, 0.4, -0.4)
    rank = WIDTH // HEADS
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) / math.sqrt(WIDTH)
    similar = torch.linalg.svdvals(0.7 * noise + 0.7 * torch.eye(WIDTH))
    for product in pairs:
        scales = torch.linalg.svdvals(product)
        assert float(scales[rank:].max()) < 1e-6
        # the largest singular values of a matrix of this distribution
        torch.testing.assert_close(scales[:rank], similar[:rank], atol=0.1, rtol=0.1)
        assert float(product.diagonal().mean()) > 0.3
    assert not torch.allclose(pairs[0], pairs[1])
    assert not torch.allclose(pairs[0], pairs[HEADS])


def test_query_and_key_of_a_single_head_have_the_whole_product() -> None:
    model = build("mimetic", num_heads=1)
    query, key, _ = model.get_parameter("blocks.1.attn.qkv.weight").detach().double().chunk(3)
    check_statistics(query.T @ key, 0.7, 0.7)


def test_mimetic_positions_are_sinusoids_and_nothing_else_changes() -> None:
    plain, mimetic = build("plain"), build("mimetic")
    before, after = dict(plain.named_parameters()), dict(mimetic.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    weights = ("attn.qkv.weight", "attn.proj.weight")
    assert changed == {"pos_embed", *(f"blocks.{block}.{name}" for block in range(2) for name in weights)}
    assert torch.equal(before["pos_embed"][:, 0], after["pos_embed"][:, 0])  # of the class token
    quarter = WIDTH // 4
    rates = 10000 ** (torch.arange(quarter) / quarter)
    for index, position in enumerate(after["pos_embed"][0, 1:]):
        angles = torch.cat([coordinate / rates for coordinate in divmod(index, 3)])  # row, then column
        torch.testing.assert_close(position, torch.cat([angles.sin(), angles.cos()]))


def test_seed_determines_the_weights() -> None:
    first, again, other = (build("mimetic", seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    "name",
    [
        *("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "convnext_atto", "mixer_s32_224"),
        "vit_base_patch16_xp_224",
    ],
)
def test_mimetic_refuses_other_architectures_in_one_line(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    model = case.build(case.target)
    with pytest.raises(
        ConfigError, match=rf"not this {type(model).__name__}; choose \"plain\" or \"scaled\"$"
    ) as caught:
        initialize_model(model, case.partition(case.target), "mimetic")
    assert "\n" not in str(caught.value)


def test_mimetic_refuses_models_without_learned_positions_and_odd_widths() -> None:
    with pytest.raises(ConfigError, match="learned position embeddings"):
        build("mimetic", pos_embed="none")
    with pytest.raises(ConfigError, match="divisible by 4, not 54"):
        build("mimetic", embed_dim=54)


@pytest.mark.parametrize(
    ("model", "init", "reason"),
    [
        ("convnext_atto", "mimetic", "not this ConvNeXt"),
        ("mixer_s32_224", "mimetic", "not this MlpMixer"),
    ],
)
def test_plan_refuses_an_initialization_that_the_model_does_not_support(
    model: str, init: str, reason: str, tmp_path: Path, call: Any
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[model]\nname = "{model}"\n[plan]\nmodules = 2\n[data]\ntrain_samples = 416\n')
    code, _, err = call("plan", recipe, "--set", f"end_to_end.init={init}")
    assert (code, err.count("\n")) == (2, 1)
    assert reason in err


@pytest.mark.parametrize("init", ["plain", "scaled", "mimetic"])
def test_costs_do_not_depend_on_the_initialization(init: str, fast: Path, call: Any) -> None:
    code, out, err = call("plan", fast, "--set", "data.train_samples=416", "--json", "--set", f"end_to_end.init={init}")
    assert code == 0, err
    _, plain, _ = call("plan", fast, "--set", "data.train_samples=416", "--json")
    assert out == plain
