"""Augmentation on the device: the operator against double precision, and its images against the host's."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from triton_interpreter import run_interpreted

from bigincubate.config import AugmentConfig, MixupConfig, load_recipe
from bigincubate.data.rng import seeded_rng
from bigincubate.errors import ConfigError
from bigincubate.experimental.device_augment import DeviceAugment
from bigincubate.experimental.device_augment.operator import AMOUNT, BOX, COLUMNS, JITTER, NOISE, blur
from bigincubate.experimental.device_augment.operator import augment as operator
from bigincubate.planning.phases import make_plan
from bigincubate.tasks.image_classification.augment import train_transform
from bigincubate.tasks.image_classification.mixup import blend, draw

Harnesses = Callable[..., Any]
DEVICE_AUGMENT = "bigincubate.experimental.device_augment:DeviceAugment"
SIZE, VIEWS = 32, 24
POLICIES: dict[str, dict[str, Any]] = {
    "flip and random resized crop": {},
    "squeezed": {"crop": "none"},
    "black border": {"crop": "pad", "pad": 5},
    "mirrored border": {"crop": "simple", "pad": 31},
    "no border": {"crop": "simple", "pad": 0},
    "three-augment": {"crop": "simple", "three_augment": True},
    "jitter": {"color_jitter": 0.4},
    "three-augment and jitter": {"crop": "pad", "pad": 4, "three_augment": True, "color_jitter": 0.3},
}
LEVELS = 6.0  # of 255: Pillow cuts to whole levels after each operation, and factors multiply what was cut off


def picture(index: int, width: int = 43, height: int = 36) -> Image.Image:
    """Smooth, with edges and noise, so that every operation shows."""
    random = np.random.default_rng(index)
    coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height))
    pixels = np.asarray(coarse).astype(float) + random.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def both_ways(policy: dict[str, Any], size: int = SIZE) -> tuple[Tensor, Tensor, Tensor, AugmentConfig]:
    """Finished by the host; and by halves: uint8 images and their parameters."""
    augment = AugmentConfig(**policy)
    whole, half = train_transform(augment, size), DeviceAugment(augment, size)
    finished, halves = [], []
    for view in range(VIEWS):
        with seeded_rng(view):
            finished.append(whole(picture(view)))
        with seeded_rng(view):
            halves.append(half(picture(view)))
    images, parameters = (torch.stack(column) for column in zip(*halves, strict=True))
    return torch.stack(finished), images, parameters, augment


def levels(a: Tensor, b: Tensor, augment: AugmentConfig) -> Tensor:
    """How many grey levels apart."""
    return (a - b).abs() * torch.tensor(augment.std).view(3, 1, 1) * 255


# ------------------------------------------------------------------------------------------------ against the host


@pytest.mark.parametrize("name", POLICIES)
def test_images_are_the_hosts_up_to_rounding(name: str) -> None:
    host, images, parameters, augment = both_ways(POLICIES[name])
    assert images.dtype == torch.uint8
    apart = levels(DeviceAugment(augment, SIZE).finish(images, parameters), host, augment)
    assert apart.max() < (LEVELS if augment.color_jitter or augment.three_augment else 0.01)
    assert apart.mean() < 2


def test_erasing_fills_the_hosts_box_with_other_noise() -> None:
    policy = {"three_augment": True, "color_jitter": 0.3, "erase": 0.7}
    host, images, parameters, augment = both_ways(policy)
    plain = both_ways({**policy, "erase": 0.0})[0]  # the box is drawn last
    found = DeviceAugment(augment, SIZE).finish(images, parameters)
    boxes = parameters[:, BOX : BOX + 4].int().tolist()
    assert 0 < sum(box == [0, 0, 0, 0] for box in boxes) < VIEWS
    noise = []
    for view, (top, left, bottom, right) in enumerate(boxes):
        inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert torch.equal(inside, (host[view] != plain[view]).all(0))
        assert levels(found, plain, augment)[view][:, ~inside].max() < LEVELS
        noise.append(found[view][:, inside].flatten())
    drawn = torch.cat(noise)
    assert abs(drawn.mean()) < 0.05
    assert drawn.std() == pytest.approx(1.0, abs=0.05)
    assert len(drawn.unique()) > 0.9 * len(drawn)


@pytest.mark.parametrize("mixup", [MixupConfig(mixup=0.8), MixupConfig(cutmix=1.0), MixupConfig(mixup=0.8, prob=0.5)])
def test_mixing_equals_the_hosts(mixup: MixupConfig) -> None:
    host, images, parameters, augment = both_ways(POLICIES["three-augment and jitter"])
    labels, kinds = torch.arange(VIEWS), set()
    for step in range(6):
        expected, targets = blend(host, labels, mixup=mixup, seed=0, step=step)
        found, pairs = DeviceAugment(augment, SIZE).finish_and_mix(
            images, parameters, labels, mixup=mixup, seed=0, step=step
        )
        assert levels(found, expected, augment).max() < LEVELS
        assert torch.equal(pairs.labels, targets.labels)
        assert torch.equal(pairs.partners, targets.partners)
        assert pairs.share == targets.share
        kinds.add(draw(mixup, images.shape, seed=0, step=step)[0] == 1.0)
    assert (True in kinds) == (mixup.prob < 1)
    assert False in kinds


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.3, 2.0])
def test_blur_equals_pillows(sigma: float) -> None:
    image = picture(0, SIZE, SIZE)
    parameters = torch.zeros(1, COLUMNS)
    parameters[0, AMOUNT] = sigma
    found = blur(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float(), parameters)
    expected = torch.from_numpy(np.array(image.filter(ImageFilter.GaussianBlur(sigma)))).permute(2, 0, 1)
    assert (found[0] - expected).abs().max() < 2


# ------------------------------------------------------------------------------------------------ the operator


def arguments() -> tuple[Any, ...]:
    policy = {"crop": "simple", "pad": 5, "three_augment": True, "color_jitter": 0.4, "erase": 0.7}
    _, images, parameters, augment = both_ways(policy, 20)
    noise = torch.randn(3001, generator=torch.Generator().manual_seed(0))
    mixing = torch.tensor([0.3, 2, 5, 9, 17])
    return images, parameters, noise, mixing, augment.mean, augment.std, True, True, True


def test_operator_passes_opcheck() -> None:
    torch.library.opcheck(operator, arguments())


def test_operator_is_one_node_of_the_compiled_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    images, parameters, *rest = arguments()

    @torch.compile(backend=counter, fullgraph=True)
    def inputs(images: Tensor, parameters: Tensor) -> Tensor:
        return operator(images, parameters, *rest).bfloat16()

    for shift in range(3):
        found = inputs(images, parameters.roll(shift, 0))
        assert torch.equal(found, operator(images, parameters.roll(shift, 0), *rest).bfloat16())
    assert counter.frame_count == 1
    used = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert sum(target.startswith("bigincubate.augment") for target in used) == 1


BODIES = """
import sys
sys.path.insert(0, "tests/integration")
import torch
from bigincubate.experimental.device_augment import triton_bodies as bodies
from bigincubate.experimental.device_augment.operator import _eager, augment
from test_device_augment import arguments

calls, body = [], bodies.augment
bodies.augment = lambda *given: calls.append(1) or body(*given)
images, parameters, noise, mixing, *options, _, _, _ = arguments()
images, parameters = images[:9], parameters[:9]  # an odd number: who is half a batch away is not symmetric
parameters[:, 13:15] += (parameters[:, 13:15] == 0) * 3
for reflect, three, jitter, erase, mix in [
    (True, True, True, True, True), (False, True, False, True, False), (True, False, True, False, True),
    (False, False, False, False, False), (False, True, True, False, False), (False, False, False, True, True),
]:
    given = [noise if erase else None, mixing if mix else None, *options, reflect, three, jitter]
    found = augment(images, parameters, *given).double()
    exact = _eager(images, parameters.double(), *given)
    error, allowed = ((x - exact).abs().max().item() for x in (found, _eager(images, parameters, *given).double()))
    assert error <= 2 * allowed + 1e-12, (reflect, three, jitter, erase, mix, error, allowed)
print(len(calls), "bodies ran")
"""


def test_triton_error_is_at_most_twice_that_of_eager() -> None:
    assert run_interpreted(BODIES) == "6 bodies ran"


# ------------------------------------------------------------------------------------------------ in training

SETS = [
    *(
        f"augment.batch_transform={DEVICE_AUGMENT}",
        "augment.crop=simple",
        "augment.flip=0.5",
        "augment.three_augment=true",
    ),
    *("augment.color_jitter=0.3", "augment.erase=0.5", "mixup.mixup=0.4", "mixup.cutmix=1.0"),
    *("train.max_steps=6", "checkpoint.every_steps=3", "log.every_steps=1"),
]


def test_interrupted_run_resumes_to_the_bit(harness: Harnesses, tmp_path: Any) -> None:
    whole = harness(*SETS)
    resumed = whole.copy(tmp_path / "resumed")
    whole.train("pretrain")
    cut = resumed.trainer("pretrain")
    step = cut.step

    def fail(batch: Any) -> Any:
        if cut.state.step == 4:
            raise InterruptedError
        return step(batch)

    cut.step = fail
    with pytest.raises(InterruptedError):
        cut.run()
    resumed.train("pretrain")
    found, expected = resumed.weights("pretrain"), whole.weights("pretrain")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_micro_batches_see_the_same_images(harness: Harnesses) -> None:
    trainer = harness(*SETS).trainer("pretrain")
    batch = next(trainer.parts.train_stream.batches(2))
    assert batch["images"].dtype == torch.uint8
    assert batch["augment_params"].shape == (32, COLUMNS)
    images, targets = trainer.task.prepare(batch.to("cpu"), 2)
    for index in range(4):
        rows = batch.rank_sample_index % 4 == index
        part, shares = trainer.task.prepare(batch.micro_batch(index, 4), 2)
        assert torch.equal(part, images[rows])
        assert torch.equal(shares, targets[rows])


def test_trainer_gets_the_images_of_the_host(harness: Harnesses) -> None:
    sets = [*SETS, "augment.erase=0.0"]
    ours, hosts = harness(*sets), harness(*sets[1:])
    (found, _), (expected, _) = (
        one.trainer("pretrain").task.prepare(next(one.trainer("pretrain").parts.train_stream.batches(1)), 1)
        for one in (ours, hosts)
    )
    assert levels(found, expected, ours.recipe.augment).max() < LEVELS
    assert ours.recipe.identity != hosts.recipe.identity  # not the same bits: another experiment


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["finetune.augment.rand_augment=rand-m9-mstd0.5-inc1"], "rand_augment = .* is not supported"),
        (
            ["finetune.augment.batch_transform=no_such:thing"],
            "augment.batch_transform = 'no_such:thing': cannot import",
        ),
    ],
)
def test_unsupported_settings_are_refused_when_planning(sets: list[str], says: str) -> None:
    recipe = load_recipe("digits", [f"augment.batch_transform={DEVICE_AUGMENT}", *sets])
    with pytest.raises(ConfigError, match=says) as caught:
        make_plan(recipe)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("crop", ["none", "pad", "simple"])
def test_parameters_without_timm_operations_are_drawn_from_torch_only(crop: Literal["none", "pad", "simple"]) -> None:
    before = random.getstate(), str(np.random.get_state())
    DeviceAugment(AugmentConfig(crop=crop, color_jitter=0.4), SIZE)(picture(0))
    assert (random.getstate(), str(np.random.get_state())) == before


def test_columns_do_not_overlap() -> None:
    assert [JITTER + 6, BOX + 4, NOISE + 1] == [BOX, NOISE, COLUMNS]
