"""An exported folder says how to prepare images: timm's own transform gives the scores of `bigincubate evaluate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from test_export import artifact
from test_pretrained import hub, publish  # noqa: F401  a fixture

from bigincubate.api import evaluate
from bigincubate.data.prepare import prepare_dataset
from bigincubate.interchange.export import export, load_model
from bigincubate.storage.artifacts import load_artifact, save_artifact

CLASSES = 7  # of `artifact`
SIZES = [(8, 8), (32, 32), (33, 37), (36, 36), (47, 200), (75, 33), (131, 64), (320, 213)]  # width, height
# timm reads png and jpeg
KINDS = [("jpg", "RGB"), ("png", "RGBA"), ("jpeg", "RGB"), ("png", "P"), ("jpg", "L"), ("png", "LA"), ("jpg", "CMYK")]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image files of many sizes and kinds, cut from two photographs, as ``train/CLASS/*`` and ``val/CLASS/*``."""
    root = tmp_path_factory.mktemp("photos") / "images"
    sources = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    random = np.random.RandomState(0)
    for label in range(CLASSES):
        for split, sizes in (("train", SIZES[:1]), ("val", SIZES)):
            folder = root / split / f"class {label}"
            folder.mkdir(parents=True)
            for number, (width, height) in enumerate(sizes):
                photo = sources[number % 2]
                left, top = random.randint(photo.width - width + 1), random.randint(photo.height - height + 1)
                suffix, mode = KINDS[(label + number) % len(KINDS)]
                photo.crop((left, top, left + width, top + height)).convert(mode).save(folder / f"{number}.{suffix}")
    return root


@pytest.fixture(scope="module")
def prepared(photos: Path) -> Path:
    return prepare_dataset(str(photos), photos.with_name("data")).path


def spread_predictions(artifact: Path, photos: Path) -> None:
    """Change the classifier of a random model so that it predicts different classes for different images."""
    tensors, manifest = load_artifact(artifact)
    model = load_model(artifact)[0].eval()
    transform = timm.data.create_transform(32, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    images = torch.stack([image for image, _ in timm.data.ImageDataset(str(photos / "val"), transform=transform)])
    with torch.no_grad():
        deviation, mean = torch.std_mean(model(images), dim=0)
        head = model.get_classifier()  # type: ignore[operator]
        head.bias.sub_(mean).div_(deviation)
        head.weight.div_(deviation[:, None])
    save_artifact(artifact, {name: model.state_dict()[name] for name in tensors}, manifest)


def scores_with_timm(model: torch.nn.Module, photos: Path, *, test_size: bool = False) -> dict[str, float]:
    """Evaluate a model with nothing but timm: its transform, its data set and its loader."""
    config = timm.data.resolve_model_data_config(model, use_test_size=test_size)
    dataset = timm.data.create_dataset("", str(photos / "val"))
    dataset.transform = timm.data.create_transform(**config, is_training=False)
    loader = torch.utils.data.DataLoader(dataset, batch_size=16)
    with torch.no_grad():
        found = [(model.eval()(images), labels) for images, labels in loader]
    logits, labels = (torch.cat(column) for column in zip(*found, strict=True))
    hits = logits.topk(5, dim=1).indices == labels[:, None]
    assert len(logits.argmax(1).unique()) >= CLASSES - 1  # a constant would not depend on the transform
    return {
        "top1": 100 * hits[:, 0].sum().item() / len(labels),
        "top5": 100 * hits.sum().item() / len(labels),
        "loss": torch.nn.functional.cross_entropy(logits, labels).item(),
        "samples": len(labels),
    }


def load_with(code: str) -> torch.nn.Module:
    """Return the model that printed code loads. The code imports what it needs."""
    names: dict[str, Any] = {}
    exec(code, names)
    return names["model"]


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "swin_tiny_patch4_window7_224",
        "convnext_atto",  # timm's own weights are tested at 288 pixels
        "mixer_s16_224",  # with fewer blocks than timm builds
    ],
)
def test_timm_gives_the_scores_of_evaluate(
    name: str,
    photos: Path,
    prepared: Path,
    hub: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    artifact(name, tmp_path / "artifact")
    spread_predictions(tmp_path / "artifact", photos)
    code = export(tmp_path / "artifact", tmp_path / "out")
    expected = evaluate(tmp_path / "out", prepared)
    del expected["intervals"]
    models = [load_with(code)]
    if name != "mixer_s16_224":
        publish(hub, "me/model", *(tmp_path / "out").iterdir())
        models += [timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)]
        models += [timm.create_model("hf-hub:me/model", pretrained=True)]
    for model in models:
        for test_size in (False, True):  # True: what timm's validate.py uses
            scores = scores_with_timm(model, photos, test_size=test_size)
            assert scores == {**expected, "loss": pytest.approx(expected["loss"], abs=1e-5)}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k", "convnext_atto"])
def test_config_says_nothing_about_weights_of_timm(name: str, tmp_path: Path) -> None:
    artifact(name, tmp_path / "artifact")
    export(tmp_path / "artifact", tmp_path / "out")
    config = config_of(tmp_path / "out")
    expected = {"input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "num_classes"}
    expected |= {"fixed_input_size", "first_conv", "classifier", "custom_load"}
    assert set(config["pretrained_cfg"]) == expected
    del config["bigincubate"]  # the settings of the model, with its name
    assert not [word for word in ("augreg", "in1k", "apache", "http", "288") if word in json.dumps(config)]


def test_config_names_the_weights_that_training_started_from(tmp_path: Path) -> None:
    artifact("vit_tiny_patch16_224", tmp_path / "artifact", initial_weights="timm:vit_tiny_patch16_224")
    export(tmp_path / "artifact", tmp_path / "out")
    assert config_of(tmp_path / "out")["pretrained_cfg"]["description"] == "initialized from timm:vit_tiny_patch16_224"


def test_config_has_the_names_of_classes(done: Any, digits: Path, tmp_path: Path) -> None:
    export(done.run.path, tmp_path / "out")
    names = json.loads((digits / "dataset.json").read_text())["metadata"]["classes"]
    assert len(names) == 10
    assert config_of(tmp_path / "out")["label_names"] == names
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == names


def test_config_says_whether_exif_orientation_is_applied(harness: Callable[..., Any], tmp_path: Path) -> None:
    made = harness("train.max_steps=2", "augment.exif=apply", "end_to_end.budget=epochs")
    made.train("end_to_end")
    export(made.run.phase("end_to_end").path, tmp_path / "out")
    assert config_of(tmp_path / "out")["bigincubate"]["metadata"]["exif"] == "apply"
