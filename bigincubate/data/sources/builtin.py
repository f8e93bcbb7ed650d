"""Built-in data: scikit-learn's digits, and generated images."""

from __future__ import annotations

import numpy as np

from ..samples import Sample, Source
from ..splits import sort_by_name_hash, split_train_val

EMBEDDED = ("digits", "digits-dev", "made-up")


def read_digits(*, development: bool) -> Source:
    """Return scikit-learn's digits: 1,797 images of 8x8 pixels and 17 gray levels; 20% of each digit is held out.

    The development set contains only the training samples of the full set, and holds out 20% of them.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)
    samples = [Sample(f"{n}", int(label), pixels[n]) for n, label in enumerate(data.target)]
    splits = split_train_val(sort_by_name_hash(samples), 0.2)
    if development:
        splits = split_train_val(splits["train"], 0.2)
    return Source("digits-dev" if development else "digits", [str(n) for n in range(10)], splits)


def generate_images() -> Source:
    """Return colored noise: ten classes of different colors, with 32 images of 40x40 pixels each; 20% is held out."""
    random = np.random.RandomState(0)  # the only generator whose output numpy guarantees never to change
    colors, noise = random.randint(0, 128, (10, 1, 1, 3)), random.randint(0, 128, (320, 40, 40, 3))
    samples = [Sample(f"{n}", n % 10, (noise[n] + colors[n % 10]).astype(np.uint8)) for n in range(320)]
    return Source("made-up", [str(n) for n in range(10)], split_train_val(sort_by_name_hash(samples), 0.2))
