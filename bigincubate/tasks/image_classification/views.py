"""What is read of a sample: its views in training, and the one of validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import Compose

from ... import config
from ...data.dataset import DatasetInfo
from ...data.shards import Shards
from ...errors import EnvironmentFault
from ...experimental.device_augment import HalfTransform
from .augment import ToNormalized, draws_from_torch_alone, eval_transform, picture_steps, reseed, train_transform

View = tuple[Any, ...]  # an image, or a tensor such as pixels [3, H, W], and what else the batch has of it: parameters
Row = tuple[list[View], int, int]  # R views, label, id
Finish = Callable[[Sequence[Any]], Tensor]  # n images or tensors -> [n, ...]


class TrainViews(Shards):
    """Samples as training sees them; iterated, in its order. Random: inside `set_aside`."""

    def __init__(
        self,
        info: DatasetInfo,
        augment: config.Augment,
        img_size: int,
        *,
        seed: int,
        **order: Any,
    ) -> None:
        super().__init__(info, "train", **order)
        self.seed, self.repeats, self.different = seed, augment.repeats, augment.views
        self.transform, self.finish = _halves(augment, img_size)
        self.torch_alone = draws_from_torch_alone(augment)

    def __getitem__(self, at: Any) -> Row | EnvironmentFault:
        epoch = self.epoch if self.different is None else self.epoch % self.different
        try:
            image, label = self.read(at)
        except EnvironmentFault as fault:
            return fault
        views = []
        for view in range(self.repeats):
            reseed(self.seed, epoch, at, view, torch_alone=self.torch_alone)
            views.append(self.transform(image))
        return views, label, at


class EvalViews(Dataset[Row | EnvironmentFault]):
    """The samples ``ids`` of a split, each with its one view."""

    def __init__(
        self,
        info: DatasetInfo,
        split: str,
        augment: config.Augment,
        img_size: int,
        ids: range,
        *,
        remote: str | None = None,
    ) -> None:
        self.shards, self.ids = Shards(info, split, remote=remote), ids
        self.transform = eval_transform(augment, img_size)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: int) -> Row | EnvironmentFault:
        try:
            image, label = self.shards.read(self.ids[at])
        except EnvironmentFault as fault:
            return fault
        return [(self.transform(image),)], label, self.ids[at]


def _halves(augment: config.Augment, img_size: int) -> tuple[Callable[[Image.Image], View], Finish]:
    """What is done image by image, and what with all of a batch at once."""
    if augment.device:
        return HalfTransform(augment, img_size), stack
    if augment.erase:  # with noise, drawn image by image, on pixels that are normalised
        whole = train_transform(augment, img_size)
        return lambda image: (whole(image),), stack
    pictures = Compose(picture_steps(augment, img_size))
    return lambda image: (pictures(image),), ToNormalized(augment).all


def stack(columns: Sequence[Tensor]) -> Tensor:
    return torch.stack(tuple(columns))


def collate(finish: Finish, rows: list[Row | EnvironmentFault]) -> tuple[Any, ...]:
    """Columns of views, labels, ids. A fault travels as a value: raised, it would arrive wrapped in a traceback."""
    for row in rows:
        if isinstance(row, EnvironmentFault):
            return (), row
    views, labels, ids = zip(*rows, strict=True)
    images, *more = zip(*chain.from_iterable(views), strict=True)
    return (finish(images), *map(stack, more)), torch.tensor(labels), torch.tensor(ids)
