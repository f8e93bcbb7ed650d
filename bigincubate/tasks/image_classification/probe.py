"""What a model's features are worth without its head: a linear classifier on them, or their nearest neighbours."""

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
    """What the model's classifier sees of each image, ``[n, features]`` fp32, and labels ``[n]``, both on the host."""
    model.eval()
    features, labels = [], []
    for batch in batches:
        images = batch["images"].to(device)
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
        features.append(pooled.float().cpu())
        labels.append(batch["labels"])
    return torch.cat(features), torch.cat(labels)


def knn_scores(
    bank: Tensor, labels: Tensor, queries: Tensor, classes: int, *, neighbours: int = 20, temperature: float = 0.07
) -> Tensor:
    """Votes ``[n, classes]`` of the nearest neighbours by cosine similarity, each with the weight exp(similarity /
    temperature): Wu et al. 2018 (arXiv 1805.01978), with the defaults of DINO (arXiv 2104.14294).

    Args:
        bank, labels: features ``[m, features]`` and classes ``[m]`` of the training images.
        queries: features ``[n, features]``.
    """
    bank, nearest = F.normalize(bank, dim=1), min(neighbours, len(bank))
    votes = []
    for chunk in F.normalize(queries, dim=1).split(256):
        similarity, index = (chunk @ bank.T).topk(nearest, dim=1)
        votes.append(torch.zeros(len(chunk), classes).scatter_add_(1, labels[index], (similarity / temperature).exp()))
    return torch.cat(votes)


def linear_scores(features: Tensor, labels: Tensor, queries: Tensor, classes: int) -> Tensor:
    """Probabilities ``[n, classes]`` by logistic regression on standardised features (scikit-learn's L-BFGS, with its
    default L2 penalty)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(
        features.numpy(), labels.numpy()
    )
    scores = torch.zeros(len(queries), classes)
    scores[:, classifier.classes_] = torch.from_numpy(classifier.predict_proba(queries.numpy())).float()
    return scores


def probe(
    kind: Probe, model: nn.Module, train: Iterable[Batch], val: Iterable[Batch], classes: int, device: torch.device
) -> dict[str, float]:
    """Top-1 and top-5 accuracy (percent) on ``val`` of what learns from the features of ``train`` alone."""
    features, labels = pooled_features(model, train, device)
    queries, expected = pooled_features(model, val, device)
    scores = (knn_scores if kind == "knn" else linear_scores)(features, labels, queries, classes)
    hits = scores.topk(min(5, classes), dim=1).indices == expected[:, None]
    share = 100 / len(hits)
    return {"top1": share * int(hits[:, 0].sum()), "top5": share * int(hits.sum()), "samples": len(hits)}
