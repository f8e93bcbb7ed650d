"""Optimizers and schedules: who decays, who trains, what the learning rate is, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import build_timm
from timm.optim import list_optimizers
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from bigincubate.config import ModelConfig, OptimConfig, ScheduleConfig, Settings, TrainConfig
from bigincubate.distributed.process_group import DistributedContext
from bigincubate.errors import ConfigError
from bigincubate.models.library import find_family
from bigincubate.models.partition import Partition
from bigincubate.models.surgery import freeze_other_modules
from bigincubate.optim.ema import Ema
from bigincubate.optim.optimizer import make_optimizer
from bigincubate.optim.schedule import Schedule, make_schedule, scaled_lr
from bigincubate.optim.state_size import trainable_param_info
from bigincubate.sharding.ddp import Replicated
from bigincubate.storage.sharded_tensors import (
    ShardedTensorReader,
    TensorShard,
    copy_to_cpu,
    full_tensor,
    write_sharded_tensors,
)

EMBEDDINGS = {"pos_embed", "cls_token", "reg_token", "dist_token"}


def settings(lr: float = 1e-3, batch_size: int = 256, **optim: Any) -> Settings:
    schedule = optim.pop("schedule", {})
    return Settings(
        train=TrainConfig(lr=lr, batch_size=batch_size),
        optim=OptimConfig(**optim),
        schedule=ScheduleConfig.model_validate(schedule),
    )


def vit(name: str = "vit_tiny_patch16_224", module: int | None = None, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    args = {"patch_size": 2, "embed_dim": 12, "num_heads": 3, "init_values": 0.1}
    depths = ((1,), (1,))
    model = build_timm(name, depths, num_classes=4, img_size=8, args=args)
    freeze_other_modules(model, Partition(find_family(ModelConfig(name=name)), depths), module)
    return model


def by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Parameter name -> its group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: group for group in optimizer.param_groups for parameter in group["params"]}


def gradients(model: nn.Module, scale: float = 1.0, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


# ------------------------------------------------------------------------------------------------ who decays


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "sgd"])
@pytest.mark.parametrize("layer_decay", [None, 0.75])
def test_norms_biases_position_and_class_tokens_do_not_decay(
    name: str, optimizer: str, layer_decay: float | None
) -> None:
    model = vit(name)
    groups = by_name(model, make_optimizer(model, settings(name=optimizer, weight_decay=0.3, layer_decay=layer_decay)))
    assert groups.keys() == dict(model.named_parameters()).keys()
    spared = set()
    for parameter, group in groups.items():
        flat = model.get_parameter(parameter).dim() <= 1
        embedding = parameter in EMBEDDINGS
        assert group["weight_decay"] == (0.0 if flat or embedding else 0.3), parameter
        spared |= {parameter} if embedding else set()
    assert {"pos_embed", "cls_token"} <= spared
    assert ("dist_token" in spared) == ("distilled" in name)


def test_decay_moves_what_decays_and_nothing_else() -> None:
    model = vit()
    optimizer = make_optimizer(model, settings(lr=0.1, weight_decay=0.5))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        shrunk = before[name] * (1 - 0.1 * 0.5)
        decays = parameter.dim() > 1 and name not in EMBEDDINGS
        assert torch.allclose(parameter, shrunk if decays else before[name]), name


@pytest.mark.parametrize("module", [0, 1])
@pytest.mark.parametrize("layer_decay", [None, 0.75])
def test_optimizer_has_trainable_parameters_only(module: int, layer_decay: float | None) -> None:
    model = vit(module=module)
    groups = by_name(model, make_optimizer(model, settings(layer_decay=layer_decay)))
    assert groups.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert 0 < len(groups) < len(list(model.parameters()))


# ------------------------------------------------------------------------------------------------ learning rates


def test_layer_decay_scales_the_rate_by_depth() -> None:
    model = vit()
    config = settings(lr=0.1, layer_decay=0.5)
    optimizer = make_optimizer(model, config)
    make_schedule(config, total=10, steps_per_epoch=5).set_rates(optimizer, 0)
    rates = {name: group["lr"] for name, group in by_name(model, optimizer).items()}
    assert rates["head.weight"] == pytest.approx(0.1)
    assert rates["blocks.1.attn.qkv.weight"] == pytest.approx(0.05)
    assert rates["blocks.0.attn.qkv.weight"] == pytest.approx(0.025)
    assert rates["patch_embed.proj.weight"] == pytest.approx(0.0125)
    assert rates["pos_embed"] == pytest.approx(0.0125)


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1.0), ("linear", 4.0), ("sqrt", 2.0)])
def test_rate_scales_with_the_batch(scaling: str, factor: float) -> None:
    config = settings(lr=5e-4, batch_size=2048, lr_scaling=scaling, lr_base_batch=512)
    assert scaled_lr(config) == pytest.approx(5e-4 * factor)
    optimizer = make_optimizer(vit(), config)
    make_schedule(config, total=100, steps_per_epoch=10).set_rates(optimizer, 0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-4 * factor] * 2)


def rate(step: int, *, total: int = 100, steps_per_epoch: int = 10, **schedule: Any) -> float:
    return make_schedule(settings(lr=0.1, schedule=schedule), total, steps_per_epoch).learning_rate(step)


def test_warm_up_is_a_line_and_then_comes_a_cosine() -> None:
    options: dict[str, Any] = {"warmup_epochs": 2, "warmup_lr": 1e-4, "min_lr": 1e-3}
    for step in range(20):
        assert rate(step, **options) == pytest.approx(1e-4 + (0.1 - 1e-4) * step / 20), step
    for step in range(20, 100):
        cosine = 1e-3 + 0.5 * (0.1 - 1e-3) * (1 + math.cos(math.pi * step / 100))
        assert rate(step, **options) == pytest.approx(cosine), step


def test_schedule_without_warm_up_starts_at_the_peak() -> None:
    assert rate(0) == pytest.approx(0.1)
    assert rate(50, min_lr=0.0) == pytest.approx(0.05)
    assert rate(99, min_lr=1e-3) == pytest.approx(1e-3, rel=0.05)


def test_constant_schedule_is_constant_after_its_warm_up() -> None:
    options: dict[str, Any] = {"name": "constant", "warmup_epochs": 1, "warmup_lr": 0.0}
    assert rate(5, **options) == pytest.approx(0.05)
    assert [rate(step, **options) for step in range(10, 100, 10)] == pytest.approx([0.1] * 9)


@pytest.mark.parametrize("name", ["cosine", "constant"])
@pytest.mark.parametrize("warmup_epochs", [0, 0.7])
@pytest.mark.parametrize("layer_decay", [None, 0.75])
def test_cosine_and_constant_are_the_same_bits_as_those_of_timm(
    name: str, warmup_epochs: float, layer_decay: float | None
) -> None:
    options = {"name": name, "warmup_epochs": warmup_epochs, "warmup_lr": 1e-6, "min_lr": 3e-6}
    config = settings(lr=1.7e-3, layer_decay=layer_decay, schedule=options)
    own, theirs = (make_optimizer(vit(), config) for _ in range(2))
    schedule = make_schedule(config, total=97, steps_per_epoch=13)
    timm_schedule = CosineLRScheduler(
        theirs,
        t_initial=97,
        lr_min=1.7e-3 if name == "constant" else 3e-6,
        warmup_t=schedule.warmup,
        warmup_lr_init=1e-6,
        t_in_epochs=False,
    )
    for step in range(97):
        schedule.set_rates(own, step)
        timm_schedule.step_update(step)
        assert [group["lr"] for group in own.param_groups] == [group["lr"] for group in theirs.param_groups], step


def test_linear_schedule_is_a_line_from_the_end_of_the_warm_up() -> None:
    options: dict[str, Any] = {"name": "linear", "warmup_epochs": 2, "min_lr": 1e-3}
    for step in range(20, 100):
        assert rate(step, **options) == pytest.approx(1e-3 + (0.1 - 1e-3) * (100 - step) / 80), step


@pytest.mark.parametrize(("decay", "shape"), [("linear", lambda x: 1 - x), ("sqrt", lambda x: 1 - math.sqrt(x))])
def test_wsd_is_stable_and_then_decays(decay: str, shape: Callable[[float], float]) -> None:
    options: dict[str, Any] = {"name": "wsd", "decay": decay, "warmup_epochs": 1, "min_lr": 1e-3, "decay_share": 0.3}
    assert rate(5, **options) == pytest.approx(0.05, rel=1e-3)
    assert {rate(step, **options) for step in range(10, 70)} == {0.1}
    for step in range(70, 100):
        assert rate(step, **options) == pytest.approx(1e-3 + (0.1 - 1e-3) * shape((step - 70) / 30)), step


@pytest.mark.parametrize(("share", "start"), [(0.0, 100), (0.2, 80), (0.95, 10), (1.0, 10)])
def test_wsd_decays_after_the_warm_up_at_the_earliest(share: float, start: int) -> None:
    config = settings(lr=0.1, schedule={"name": "wsd", "warmup_epochs": 1, "decay_share": share})
    schedule = Schedule.of(config, 100, 10)
    assert (schedule.decay_start, schedule.stable_steps) == (start, start)
    assert Schedule.of(config, 100, 10, start=30).stable_steps == max(0, start - 30)


@pytest.mark.parametrize("warmup_epochs", [10, 11])
def test_warm_up_as_long_as_the_phase_is_refused(warmup_epochs: int) -> None:
    with pytest.raises(ConfigError, match=rf"warmup_epochs is {warmup_epochs}0 steps, but the phase has only 100"):
        rate(0, warmup_epochs=warmup_epochs)


def test_phase_of_no_steps_needs_no_warm_up() -> None:
    assert rate(0, total=0, warmup_epochs=3) > 0


# ------------------------------------------------------------------------------------------------ timm's optimizers


@pytest.mark.parametrize("name", ["lamb", "lambc", "lambw", "clamb"])
def test_lamb_does_not_clip_by_itself(name: str) -> None:
    """LAMB is invariant to the scale of all gradients of a run, so it is the ratio of two steps that shows clipping."""

    def weights(clip: float | None) -> list[Tensor]:
        model = vit()
        optimizer = make_optimizer(model, settings(lr=0.01, name=name))
        for seed, scale in enumerate((1000.0, 1.0)):
            gradients(model, scale, seed)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    free, clipped = weights(None), weights(1.0)
    assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in zip(free, clipped, strict=True))
    reference = vit()
    from timm.optim import create_optimizer_v2

    optimizer = create_optimizer_v2(
        reference, name, lr=0.01, weight_decay=0.05, eps=1e-8, betas=(0.9, 0.999), max_grad_norm=None
    )
    for seed, scale in enumerate((1000.0, 1.0)):
        gradients(reference, scale, seed)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(free, reference.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("adamx", "adamx not found"),
        ("adahessian", "second derivatives"),
        ("kron", "random numbers"),
        ("adan", "takes 3 betas, but optim.betas has 2"),
        ("", "optim.name = ''"),
    ],
)
def test_optimizer_that_cannot_be_is_refused_in_one_line(name: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_optimizer(vit(), settings(name=name))
    assert says in str(caught.value)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


def usable() -> list[str]:
    names = list_optimizers(exclude_filters=["bnb*", "fused*", "kron*", "adahessian", "*muon"])
    return [name for name in names if not name.startswith("c") or name == "cadamw"]  # "cautious" forms of the others


@pytest.mark.parametrize("name", usable())
def test_optimizer_state_survives_a_checkpoint(name: str, tmp_path: Path) -> None:
    """Three steps, then two more; or the two more from what was saved: the same bits."""
    betas = [0.9, 0.99, 0.999] if "adan" in name else [0.9, 0.999]

    def prepared() -> tuple[nn.Module, Replicated]:
        model, sharding = vit(), Replicated(DistributedContext())
        sharding.prepare(model, [], lambda m: make_optimizer(m, settings(name=name, betas=betas)))
        return model, sharding

    def train(model: nn.Module, sharding: Replicated, steps: range) -> None:
        for step in steps:
            gradients(model, seed=step)
            sharding.step(1.0)

    model, sharding = prepared()
    train(model, sharding, range(3))
    write_sharded_tensors(tmp_path / "kept.safetensors", copy_to_cpu(sharding.save()))
    start = [parameter.detach().clone() for parameter in model.parameters()]
    other, resumed = prepared()
    resumed.load(ShardedTensorReader([tmp_path / "kept.safetensors"]))
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), start, strict=True))
    for each in ((model, sharding), (other, resumed)):
        train(*each, range(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), start, strict=True))


@pytest.mark.parametrize("name", usable())
def test_state_is_as_large_as_planned(name: str) -> None:
    model, chosen = vit(), settings(name=name, betas=[0.9, 0.99, 0.999] if "adan" in name else [0.9, 0.999])
    planned = {each.name: each for each in trainable_param_info(model, chosen)}
    optimizer = make_optimizer(model, chosen)
    gradients(model, seed=0)
    optimizer.step()
    for key, parameter in model.named_parameters():
        size = sum(value.nbytes for value in optimizer.state[parameter].values() if isinstance(value, Tensor))
        assert size == planned[key].state_bytes_per_element * parameter.numel() + planned[key].extra_state_bytes, key


# ------------------------------------------------------------------------------------------------ a step


def prepared(name: str = "adamw", **optim: Any) -> tuple[nn.Module, Replicated]:
    model, sharding = vit(), Replicated(DistributedContext())
    sharding.prepare(model, [], lambda m: make_optimizer(m, settings(name=name, **optim)))
    return model, sharding


def test_clipping_scales_the_whole_gradient() -> None:
    """Plain SGD moves a parameter by lr times its gradient."""
    model, sharding = prepared("momentum", weight_decay=0.0, lr=1.0)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    gradients(model, scale=3.0)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()
    norm, skipped = sharding.step(0.5)
    moved = before - nn.utils.parameters_to_vector(model.parameters()).detach()
    assert norm.item() == pytest.approx(gradient.norm().item(), rel=1e-5)  # as it was before clipping
    assert not skipped
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)
    assert torch.allclose(moved / moved.norm(), gradient / gradient.norm(), atol=1e-5)


@pytest.mark.parametrize("max_norm", [0.0, 1e6])
def test_small_gradient_or_no_limit_is_left_alone(max_norm: float) -> None:
    model, sharding = prepared("momentum", weight_decay=0.0, lr=1.0)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    gradients(model, scale=3.0)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()
    sharding.step(max_norm)
    moved = before - nn.utils.parameters_to_vector(model.parameters()).detach()
    assert torch.allclose(moved, gradient, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd", "adam", "lion"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("first", [True, False])
def test_gradient_that_is_not_finite_changes_nothing(name: str, poison: float, first: bool) -> None:
    model, sharding = prepared(name)
    if not first:
        gradients(model)
        _, skipped = sharding.step(1.0)
        assert not skipped
    before = saved(sharding)
    gradients(model)
    next(model.parameters()).grad.view(-1)[3] = poison  # type: ignore[union-attr]
    norm, skipped = sharding.step(1.0)
    assert skipped
    assert not torch.isfinite(norm)
    after = saved(sharding)
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
    assert all(not after[key].any() for key in after.keys() - before.keys())  # state that began empty
    gradients(model)
    _, skipped = sharding.step(1.0)  # and it goes on
    assert not skipped
    assert not torch.equal(before["model/pos_embed"], saved(sharding)["model/pos_embed"])


def saved(sharding: Any) -> dict[str, torch.Tensor]:
    """Copy what a checkpoint would hold."""
    tensors = {key: getattr(value, "tensor", value) for key, value in sharding.save().items()}
    return {key: tensor.clone() for key, tensor in tensors.items()}


# ------------------------------------------------------------------------------------------------ averages


def shards(model: nn.Module) -> dict[str, TensorShard]:
    """What a single process has of the parameters that train."""
    return {name: full_tensor(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_ema_follows_its_formula() -> None:
    model = vit(module=1)
    ema = Ema(shards(model), 0.9)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert ema.average.keys() == set(trainable)
    expected = {name: parameter.detach().clone().double() for name, parameter in model.named_parameters()}
    for step in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(step + 1)
        ema.update()
        for name in trainable:
            expected[name] = 0.9 * expected[name] + 0.1 * model.get_parameter(name).double()
    for name in trainable:
        assert torch.allclose(ema.average[name].double(), expected[name], atol=1e-5)


def test_ema_is_applied_inside_the_context_only() -> None:
    model = vit()
    ema = Ema(shards(model), 0.5)
    with torch.no_grad():
        model.get_parameter("head.bias").add_(1)
    ema.update()
    own = model.get_parameter("head.bias").detach().clone()
    synced = []
    with ema.applied(lambda: synced.append(model.get_parameter("head.bias").detach().clone())):
        assert torch.equal(model.get_parameter("head.bias"), own - 0.5)
    assert torch.equal(model.get_parameter("head.bias"), own)
    assert [torch.equal(value, own) for value in synced] == [False, True]


def test_ema_without_a_decay_is_none() -> None:
    ema = Ema(shards(vit()), 0.0)
    ema.update()
    assert ema.average == {}
    assert ema.save() == {}
