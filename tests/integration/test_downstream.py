"""What an exported model is good for elsewhere: features, a folder for the hub, probes of its features."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from sklearn.datasets import load_digits
from test_export import artifact, logits
from test_official import call  # noqa: F401  a fixture
from test_pretrained import hub, publish  # noqa: F401

from bigincubate.data.streams import Batch
from bigincubate.interchange.export import export, load_model
from bigincubate.tasks.image_classification.probe import knn_scores, linear_scores, pooled_features

Harnesses = Callable[..., Any]


@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto"],
)
def test_exported_folder_is_a_model_and_a_backbone_for_timm(name: str, hub: Path, tmp_path: Path) -> None:  # noqa: F811
    artifact(name, tmp_path / "artifact")
    export(tmp_path / "artifact", tmp_path / "out")
    publish(hub, "me/model", *(tmp_path / "out").iterdir())
    ours = load_model(tmp_path / "artifact")[0].eval()
    images = torch.randn(2, 3, 32, 32)
    expected = ours.forward_intermediates(images, indices=2, intermediates_only=True)  # type: ignore[operator]
    for source in (f"local-dir:{tmp_path / 'out'}", "hf-hub:me/model"):
        assert torch.equal(logits(timm.create_model(source, pretrained=True)), logits(ours))
        backbone = timm.create_model(source, pretrained=True, features_only=True, out_indices=[-2, -1]).eval()
        features = backbone(images)
        assert len(features) == len(backbone.feature_info.channels()) == 2
        for found, wanted in zip(features, expected, strict=True):
            channels_first = found if found.shape == wanted.shape else found.permute(0, 3, 1, 2)  # Swin's come last
            assert torch.equal(channels_first, wanted)


def pixels() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).float(), torch.from_numpy(labels)


@pytest.mark.parametrize(("scores", "at_least"), [(knn_scores, 95.0), (linear_scores, 94.0)])
def test_probe_of_good_features_scores_high(scores: Callable[..., torch.Tensor], at_least: float) -> None:
    features, labels = pixels()
    found = scores(features[::2], labels[::2], features[1::2], 10)
    assert 100 * (found.argmax(1) == labels[1::2]).double().mean() > at_least
    shuffled = labels[::2][torch.randperm(len(labels[::2]), generator=torch.Generator().manual_seed(0))]
    nothing = scores(features[::2], shuffled, features[1::2], 10)
    assert (nothing.argmax(1) == labels[1::2]).double().mean() < 0.3


def test_features_are_the_inputs_of_the_classifier(tmp_path: Path) -> None:
    for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto", "mixer_s16_224"):
        artifact(name, tmp_path / name)
        model, _ = load_model(tmp_path / name)
        images, labels = torch.randn(2, 3, 3, 32, 32), torch.arange(6)
        batches = [
            Batch({"images": pair, "labels": labels[:3] + 3 * at}, *[labels[:3]] * 3) for at, pair in enumerate(images)
        ]
        features, found = pooled_features(model, batches, torch.device("cpu"))
        assert found.tolist() == labels.tolist()
        head = model.get_classifier()  # type: ignore[operator]
        torch.testing.assert_close(head(features[3:]), model.eval()(images[1]))


def test_neighbors_vote_by_their_cosine() -> None:
    bank = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    votes = knn_scores(bank, torch.tensor([0, 1, 1]), torch.tensor([[5.0, 0.0]]), 3, neighbors=2, temperature=0.5)
    torch.testing.assert_close(votes, torch.tensor([[1.0, 0.0, 0.0]]).exp() ** 2 - torch.tensor([[0.0, 0.0, 1.0]]))


def test_class_missing_in_training_is_never_predicted() -> None:
    features, labels = pixels()
    some = labels != 3
    scores = linear_scores(features[some], labels[some], features[:50], 12)
    assert scores.shape == (50, 12)
    assert not scores[:, [3, 10, 11]].any()


def test_evaluate_probe_prints_the_score(
    harness: Harnesses,
    digits: Path,
    tmp_path: Path,
    call: Callable[..., Any],  # noqa: F811
) -> None:
    made = harness("train.max_steps=40", "log.every_steps=20", "mixup.mixup=0.0")
    made.train("pretrain")
    model = made.run.phase("pretrain").path
    chance = 10.0
    for kind in ("linear", "knn"):
        code, out = call("evaluate", model, "--data", digits, "--probe", kind, "--json")
        scores = json.loads(out)
        assert (code, set(scores)) == (0, {"top1", "top5", "samples"})
        assert scores["samples"] == made.data.samples["val"]
        assert 1.5 * chance < scores["top1"] < scores["top5"] <= 100
        code, out = call("evaluate", model, "--data", digits, "--probe", kind)
        assert f"({kind} probe) on {scores['samples']} images of" in out
    assert call("evaluate", model, "--data", digits, "--probe", "mlp")[0] == 2
