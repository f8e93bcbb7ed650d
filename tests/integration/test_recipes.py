"""The shipped recipes: each loads, plans and would be submitted, has the published sizes, and runs when small."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import SMOKE, TrainingHarness
from small_models import build_timm
from timm.layers import resample_abs_pos_embed

from bigincubate import cli
from bigincubate.config import PHASES, Recipe, list_shipped_recipes, load_recipe, reading
from bigincubate.data.batch import Batch
from bigincubate.errors import ConfigError
from bigincubate.models.vision.families import find_timm_family
from bigincubate.planning.cost import count_cost
from bigincubate.planning.phases import make_plan, phase_model
from bigincubate.planning.smoke import smoke
from bigincubate.tasks.image_classification.mixup import blend

NAMES = sorted(list_shipped_recipes())
# millions of parameters and GFLOPs (multiply-adds) of a forward, at the size that is fine-tuned
FIGURES = {
    "imagenet-vit-b": (87, 17.6),  # Deep Incubation, table 1
    "imagenet-swin-b": (88, 15.4),
    "imagenet-vit-l": (304, 61.6),
    "imagenet-vit-h": (632, 167.3),  # counted; DeiT III's table has 167.4
    "imagenet-vit-b-384": (87, 55.5),  # DeiT III, README_revenge.md
    "imagenet-vit-l-384": (305, 191.1),  # counted; there 191.2
    "imagenet-vit-b-deit3": (87, 17.6),
    "cifar100-deit-t32": (14, 1.0),  # counted: 32 blocks of 12 x 192^2 weights, 65 tokens
    "cifar100-deit-t128": (57, 3.9),
}


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_sizes_are_those_that_were_published(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(name)
    cut = make_plan(recipe)
    # counting saved activations takes longest, and has tests of its own
    monkeypatch.setattr("bigincubate.planning.cost.saved_bytes", lambda *_: 0)
    monkeypatch.setattr("bigincubate.planning.cost.trainable_param_info", lambda *_: [])
    cost = count_cost(cut.row("finetune"), recipe.settings("finetune"), cut)
    assert (round(cost.parameters / 1e6), round(cost.forward_flops / 2e9, 1)) == FIGURES[name]


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_plans_and_would_be_submitted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert list_shipped_recipes()[name].read_text().startswith("# ")  # where it comes from
    for phase in PHASES:  # each batch is one that eight ranks can share, mixing partners together
        assert recipe.settings(phase).train.batch_size % 16 == 0
    cut = make_plan(recipe)
    rows = cut.rows()
    assert len(rows) == cut.modules + 3
    for row in (cut.row("pretrain"), cut.row("incubate", cut.modules - 1)):
        phase_model(row, recipe.settings(row.phase), cut.family, device="meta")
    monkeypatch.setattr(sys, "argv", ["bigincubate", "submit", name, "--run-dir", str(tmp_path / "run"), "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().out
    assert not ended.value.code
    assert f"--array=0-{cut.modules - 1}" in said or f"--array={','.join(map(str, range(cut.modules)))}" in said
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ base


def test_recipe_with_a_base_differs_only_in_its_own_keys() -> None:
    base, derived = load_recipe("imagenet-vit-b").flat(), load_recipe("imagenet-vit-l").flat()
    assert {key for key in base.keys() | derived.keys() if base.get(key) != derived.get(key)} == {
        *("name", "description", "model.name", "plan.target_depths"),
        *("finetune.drop_path.rate", "end_to_end.drop_path.rate"),
    }
    assert load_recipe("cifar100-deit-t128-dmt").plan.target_depths == [32, 32, 32, 32]  # through a chain


def test_users_recipe_may_have_a_base_whose_arguments_stay_with_its_model(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('base = "digits"\n[train]\nbatch_size = 32\n[model.args]\nembed_dim = 24\n')
    mine, digits = load_recipe(str(file)), load_recipe("digits")
    assert (mine.name, mine.train.batch_size, mine.optim) == ("mine", 32, digits.optim)
    assert mine.model.args == {**digits.model.args, "embed_dim": 24}
    file.write_text('base = "digits"\n[model]\nname = "mixer_s16_224"\nargs = { patch_size = 4 }\n')
    assert load_recipe(str(file)).model.args == {"patch_size": 4}


def test_missing_or_circular_base_gives_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.toml"
    for base in ('"nothing"', "3", f'"{file}"'):
        file.write_text(f"base = {base}\n")
        with pytest.raises(ConfigError, match=r"mine\.toml: base = .*not a shipped recipe.*digits"):
            load_recipe(str(file))
    monkeypatch.setattr(reading, "list_shipped_recipes", lambda: {name: tmp_path / f"{name}.toml" for name in "ab"})
    (tmp_path / "a.toml").write_text('base = "b"\n')
    (tmp_path / "b.toml").write_text('base = "a"\n')
    with pytest.raises(ConfigError, match=r"b\.toml: base = 'a' is circular") as caught:
        load_recipe("a")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ what recipes ask for


def test_position_embeddings_are_resampled_and_nothing_else_changes() -> None:
    args = {"embed_dim": 8, "num_heads": 2, "patch_size": 4}
    for name, prefix in (("vit_tiny_patch16_224", 1), ("deit3_small_patch16_224", 0)):
        small, large = (build_timm(name, ((1,),), num_classes=3, img_size=size, args=args) for size in (16, 24))
        before = {key: torch.randn_like(tensor) for key, tensor in small.state_dict().items()}
        after = find_timm_family(name).adapt_state(before, large)
        large.load_state_dict(after)
        assert after["pos_embed"].shape == (1, 36 + prefix, 8)
        expected = resample_abs_pos_embed(before["pos_embed"], new_size=[6, 6], num_prefix_tokens=prefix)
        assert torch.equal(after["pos_embed"], expected)
        assert torch.equal(after["pos_embed"][:, :prefix], before["pos_embed"][:, :prefix])
        assert all(after[key] is before[key] for key in before.keys() - {"pos_embed"})
        assert find_timm_family(name).adapt_state(before, small) == before


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_is_torchs_on_both_classes_of_a_mixed_image(
    harness: Callable[..., Any], smoothing: float
) -> None:
    made = harness("loss.name=bce", f"loss.label_smoothing={smoothing}", "mixup.mixup=0.8")
    task = made.trainer("pretrain").task
    labels, rows = torch.tensor([1, 2, 3, 3]), torch.arange(4)
    images, logits = torch.rand(4, 3, 8, 8), torch.randn(4, 10)
    batch = Batch({"images": images, "labels": labels}, rows, rows, rows)
    _, targets = task.prepare(batch, 5)
    two_hot = torch.zeros(4, 10)
    for row, partner in enumerate((2, 3, 0, 1)):
        two_hot[row, labels[row]] = two_hot[row, labels[partner]] = 1
    assert two_hot.sum(1).tolist() == [2, 2, 2, 2]
    expected = two_hot * (1 - smoothing) + smoothing / 10
    torch.testing.assert_close(targets, expected)
    loss = task.loss(lambda _: logits, batch, 5)
    torch.testing.assert_close(loss, torch.nn.BCEWithLogitsLoss()(logits, expected))
    # and off, it is cross entropy on shares
    task.settings = task.settings.model_copy(update={"loss": load_recipe("digits").loss})
    _, shares = task.prepare(batch, 5)
    own = blend(images, labels, mixup=task.settings.mixup, seed=0, step=5)[1].dense(10, smoothing=0.0)
    assert torch.equal(shares, own)
    torch.testing.assert_close(task.loss(lambda _: logits, batch, 5), F.cross_entropy(logits, own))


def test_deit3_has_everything_but_binary_cross_entropy() -> None:
    for name in ("imagenet-vit-b-deit3", "imagenet-swin-b-deit3"):
        recipe = load_recipe(name)
        meta, e2e = recipe.settings("pretrain"), recipe.settings("end_to_end")
        assert (meta.optim.name, meta.augment.three_augment, meta.loss.name) == ("lamb", True, "cross_entropy")
        assert (meta.train.epochs, e2e.train.epochs, meta.drop_path.rate) == (800, 800, 0)
        assert e2e.drop_path.rate == (0.2 if "vit" in name else 0.5)
        assert recipe.settings("finetune").model.img_size == 224
        assert load_recipe(name, ["loss.name=bce"]).identity != recipe.identity
    model = phase_model(
        make_plan(load_recipe("imagenet-vit-b-deit3")).row("finetune"),
        load_recipe("imagenet-vit-b-deit3").settings("finetune"),
        make_plan(load_recipe("imagenet-vit-b-deit3")).family,
    )
    assert float(model.blocks[0].ls1.gamma.detach().mean()) == pytest.approx(1e-4)  # type: ignore[union-attr, index]


# ------------------------------------------------------------------------------------------------ smoke


def kept(recipe: Recipe) -> dict[str, Any]:
    """What a smoke size must not change."""
    own = {key: value for key, value in recipe.flat().items() if key.split(".")[0] not in PHASES}
    same = ("plan.", "optim.", "augment.", "mixup.", "drop_path.", "loss.", "ema.", "train.lr", "train.precision")
    own = {key: value for key, value in own.items() if key.startswith(same)}
    phases = {
        f"{phase}.{key}": getattr(recipe.settings(phase), key)
        for phase in PHASES
        for key in ("optim", "augment", "mixup", "drop_path", "loss")
    }
    return {**own, **phases, "model": recipe.model.name, "decentralized": recipe.data.decentralized}


@pytest.mark.parametrize("name", NAMES)
def test_smoke_size_is_the_same_experiment_and_each_phase_of_it_can_be_built(name: str) -> None:
    recipe, small = load_recipe(name), load_recipe(name, overlay=smoke)
    # a partition of the small data has fewer samples than an epoch with repeats needs
    repeats = ["augment.repeated_aug=1"] if recipe.data.decentralized else []
    assert kept(small) == kept(load_recipe(name, repeats))
    cut = make_plan(small)
    assert cut.target == make_plan(recipe).target
    larger = recipe.settings("finetune").model.img_size > recipe.settings("pretrain").model.img_size
    assert (small.settings("finetune").model.img_size > small.settings("pretrain").model.img_size) == larger
    for phase in ("pretrain", "finetune"):
        settings = small.settings(phase)
        assert settings.train.max_steps == 6
        model = phase_model(cut.row(phase), settings, cut.family, device="meta")
        outputs = model(cut.family.example_inputs(settings.model, 2, "meta"))
        assert outputs.shape == ((2, 10) if settings.model.library == "timm" else (2, 32, 257))
        assert sum(p.numel() for p in model.parameters()) < 3e6


def test_smoke_leaves_a_users_own_settings_and_touches_no_data_of_theirs(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(SMOKE.replace('source = "digits-dev"', f'path = "{tmp_path}"\nlocal_cache = "/disk"'))
    small = load_recipe(str(file), ["train.max_steps=50", "pretrain.train.max_steps=3"], smoke)
    assert (small.data.source, small.data.path, small.data.local_cache) == ("made-up", None, None)
    assert (small.settings("pretrain").train.max_steps, small.train.max_steps) == (3, 50)


def test_large_recipe_runs_end_to_end_when_small(tmp_path: Path, counted: None) -> None:
    """Every phase of ViT-B on decentralized data with DeiT III's loss, fine-tuned on larger images."""
    file = tmp_path / "recipe.toml"
    sets = ["data.decentralized=true", "loss.name=bce", "train.precision=fp32"]
    file.write_text(load_recipe("imagenet-vit-b-384", sets, smoke).toml())
    harness = TrainingHarness(file, tmp_path / "run")
    harness.train("pretrain")
    for module in range(4):
        harness.train("incubate", module)
    assert harness.weights("incubate", 0)["pos_embed"].shape[1] == 1 + 2 * 2
    result = harness.train("finetune")
    assert harness.weights("finetune")["pos_embed"].shape[1] == 1 + 3 * 3
    assert (result["steps"], result["samples"]) == (6, 64)
    assembled = harness.run.assembled.result
    assert assembled is not None
    assert assembled["samples"] == 64


@pytest.mark.parametrize(
    "model",
    ["mixer_b16_224", "resmlp_12_224", "vit_small_r26_s32_224", "deit3_small_patch16_224", "swinv2_tiny_window8_256"],
)
def test_smoke_run_of_any_family_is_small(model: str, tmp_path: Path) -> None:
    """Names of timm models say the patch size in different ways, or not at all."""
    file = tmp_path / "any.toml"
    modules = "target_depths = [[1,1,1,1]]\nmeta_depths = [[1,1,1,1]]" if "swin" in model else "modules = 2"
    file.write_text(f'[model]\nname = "{model}"\nimg_size = 256\n[plan]\n{modules}\n')
    recipe = load_recipe(file)
    small = load_recipe(file, overlay=smoke)
    assert small.model.img_size <= 96
    plan = make_plan(small)
    for row in plan.rows():
        built = phase_model(row, small.settings(row.phase), plan.family)
        assert built(plan.family.example_inputs(small.model, 2, "cpu")).shape == (2, 10)
    assert recipe.model.img_size == 256
