"""Evaluate the features of a model without its head, with a linear or a nearest-neighbor classifier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.batch import Batch

Probe = Literal["linear", "knn"]


@torch.no_grad()
def pooled_features(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the inputs of the model's classifier, ``[n, features]`` fp32, and labels ``[n]``, both on the CPU."""
    model.eval()
    features, labels = [], []
    for batch in batches:
        images = batch["images"].to(device)
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
        features.append(pooled.float().cpu())
        labels.append(batch["labels"])
    return torch.cat(features), torch.cat(labels)


def knn_scores(
    bank: Tensor, labels: Tensor, queries: Tensor, classes: int, *, neighbors: int = 20, temperature: float = 0.07
) -> Tensor:
    """Return the votes ``[n, classes]`` of the nearest neighbors by cosine similarity.

    The weight of a vote is exp(similarity / temperature), as in Wu et al. 2018 (arXiv 1805.01978). The defaults are
    those of DINO (arXiv 2104.14294).

    Args:
        bank: Features of the training images, ``[m, features]``.
        labels: Classes of the training images, ``[m]``.
        queries: Features of the images to classify, ``[n, features]``.
        classes: Number of classes.
        neighbors: Number of neighbors that vote.
        temperature: Divisor of the similarities.
    """
    bank, nearest = F.normalize(bank, dim=1), min(neighbors, len(bank))
    votes = []
    for chunk in F.normalize(queries, dim=1).split(256):
        similarity, index = (chunk @ bank.T).topk(nearest, dim=1)
        votes.append(torch.zeros(len(chunk), classes).scatter_add_(1, labels[index], (similarity / temperature).exp()))
    return torch.cat(votes)


def linear_scores(features: Tensor, labels: Tensor, queries: Tensor, classes: int) -> Tensor:
    """Return the probabilities ``[n, classes]`` of a logistic regression on standardized features.

    Uses scikit-learn's L-BFGS solver with the default L2 penalty.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    classifier.fit(features.numpy(), labels.numpy())
    scores = torch.zeros(len(queries), classes)
    scores[:, classifier.classes_] = torch.from_numpy(classifier.predict_proba(queries.numpy())).float()
    return scores


def probe(
    kind: Probe, model: nn.Module, train: Iterable[Batch], val: Iterable[Batch], classes: int, device: torch.device
) -> dict[str, float]:
    """Train a classifier on the features of ``train`` and return its top-1 and top-5 accuracy (percent) on ``val``."""
    features, labels = pooled_features(model, train, device)
    queries, expected = pooled_features(model, val, device)
    scores = (knn_scores if kind == "knn" else linear_scores)(features, labels, queries, classes)
    hits = scores.topk(min(5, classes), dim=1).indices == expected[:, None]
    share = 100 / len(hits)
    return {"top1": share * int(hits[:, 0].sum()), "top5": share * int(hits.sum()), "samples": len(hits)}
