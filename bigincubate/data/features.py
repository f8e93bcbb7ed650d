"""What reaches a module from frozen ones, as MDS shards: made once, chunk by chunk, and read in place of images.

    FOLDER/dataset.json       as of any data set; and what a row is, and a function of
    FOLDER/train/00000/…      row e * samples + j: all views of sample j in epoch e
    FOLDER/val/00000/…        a row a sample

Whoever is stopped goes on with the next chunk; what grew from something else is cleared away.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from .. import config
from ..errors import EnvironmentFault
from .chunks import describe, write_chunk
from .dataset import DESCRIPTION, SPLITS, DatasetInfo, Features, open_dataset, read_json, write_json
from .streams import Batch, EveryView

UNFINISHED = ".making.json"
CHUNK = 256  # samples

Compute = Callable[[Batch], Tensor]  # a batch of n views -> what reaches the module, [n, ...]


class FeatureMaker:
    """The folder of a module, and this rank's share of the work.

    Args:
        folder: of this phase alone. info: the images.
        rows: samples that are computed at once, always as many: what a product rounds to may depend on that.
        grown: what the features are a function of, in words and digests.
    """

    def __init__(
        self,
        folder: Path,
        info: DatasetInfo,
        settings: config.Settings,
        data: config.Data,
        *,
        rows: int,
        grown: dict[str, str],
    ) -> None:
        self.folder, self.info, self.rows, self.grown = folder, info, rows, grown
        self.settings, self.data = settings, data
        self.epochs = settings.augment.views or 1

    @property
    def done(self) -> bool:
        return (self.folder / DESCRIPTION).exists()

    def begin(self, compute: Compute) -> Features:
        """Clear away what is another's, and see what a row will be. By one rank, before the others look.

        Raises:
            EnvironmentFault: the disk has no room for all rows.
        """
        for left in self.folder.glob(".tmp-*"):  # by one that was killed
            shutil.rmtree(left)
        for mark in (DESCRIPTION, UNFINISHED):
            if (self.folder / mark).exists() and (found := self._features(mark)) is not None:
                return found
        shutil.rmtree(self.folder, ignore_errors=True)
        for split in SPLITS:
            (self.folder / split).mkdir(parents=True)
        views = self._views("train")
        batch = next(self._batches(views, [list(range(min(self.rows, len(views))))]))
        found = _described(compute(batch), self.settings.augment.repeats, self.grown)
        self._check_room(found)
        write_json(self.folder / UNFINISHED, found.model_dump())
        return found

    def make(self, features: Features, compute: Compute, stopped: Callable[[], bool], *, rank: int, world: int) -> bool:
        """This rank's chunks that are not there yet. False: asked to stop before they all were.

        Raises:
            EnvironmentFault: an image that cannot be read.
        """
        for split in SPLITS:
            views = self._views(split)
            chunks = self._chunks(split)
            own = [chunk for number, chunk in enumerate(chunks) if number % world == rank and not chunk[0].exists()]
            pieces = [rows[at : at + self.rows] for _, rows in own for at in range(0, len(rows), self.rows)]
            batches = self._batches(views, [_filled(piece, self.rows) for piece in pieces])
            for folder, rows in own:
                if stopped():
                    return False
                write_chunk(folder, self._encoded(features, compute, batches, len(rows), views.repeats))
        return True

    def finish(self, features: Features) -> None:
        """Describe what all ranks have made. By one rank, afterwards."""
        chunks = {split: [folder for folder, _ in self._chunks(split)] for split in SPLITS}
        more = {"features": features.model_dump()}
        describe(self.folder, self.info.classes, chunks, {"kind": "features"}, more)
        (self.folder / UNFINISHED).unlink()

    def size(self, features: Features) -> dict[str, int]:
        """Rows and bytes of all of them."""
        rows = {"train": self.epochs * self.info.samples["train"], "val": self.info.samples["val"]}
        view = math.prod(features.shape) * getattr(torch, features.dtype).itemsize
        return {"rows": sum(rows.values()), "bytes": (rows["train"] * features.views + rows["val"]) * view}

    def _features(self, mark: str) -> Features | None:
        """What the folder says of its rows; None where that is not what is wanted."""
        try:
            if mark == DESCRIPTION:
                found = open_dataset(self.folder).features
            else:
                found = Features.model_validate(read_json(self.folder / mark))
        except (EnvironmentFault, ValueError):  # damaged: made again
            return None
        return found if found is not None and found.grown == self.grown else None

    def _views(self, split: str) -> EveryView:
        return EveryView(
            self.info,
            split,
            self.data,
            self.settings.augment,
            img_size=self.settings.model.img_size,
            seed=self.settings.train.seed,
            epochs=self.epochs if split == "train" else 1,
        )

    def _chunks(self, split: str) -> list[tuple[Path, list[int]]]:
        """Folders, and the rows in each."""
        rows = self.info.samples[split] * (self.epochs if split == "train" else 1)
        return [
            (self.folder / split / f"{begin // CHUNK:05}", list(range(begin, min(begin + CHUNK, rows))))
            for begin in range(0, rows, CHUNK)
        ]

    def _batches(self, views: EveryView, pieces: list[list[int]]) -> Iterator[Batch]:
        return views.batches(pieces, self.data.workers)

    def _encoded(
        self, features: Features, compute: Compute, batches: Iterator[Batch], rows: int, repeats: int
    ) -> Iterator[tuple[bytes, int]]:
        """The next ``rows`` rows."""
        for left in range(rows, 0, -self.rows):
            batch = next(batches)
            found = laid_out(compute(batch), features.order).contiguous().cpu()
            samples = found.unflatten(0, (-1, repeats))
            labels = batch.labels[::repeats].tolist()
            for row in range(min(left, self.rows)):
                yield samples[row].view(torch.uint8).numpy().tobytes(), labels[row]

    def _check_room(self, features: Features) -> None:
        size = self.size(features)["bytes"]
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise EnvironmentFault(
                f"incubate.prefix_cache takes {size / 2**30:.3g} GiB for this module, {free / 2**30:.3g} GiB are free"
                f" where {self.folder} is; make room, or set incubate.prefix_cache = false"
            )


def _described(features: Tensor, views: int, grown: dict[str, str]) -> Features:
    """``features``: [n, ...]; rows keep the order in which its dimensions lie in memory."""
    order = sorted(range(1, features.dim()), key=features.stride, reverse=True)
    shape = [features.shape[dim] for dim in order]
    dtype = str(features.dtype).removeprefix("torch.")
    return Features.model_validate({"dtype": dtype, "shape": shape, "order": order, "views": views, "grown": grown})


def _filled(piece: list[int], rows: int) -> list[int]:
    """As many rows as ever, the last one again and again."""
    return piece + piece[-1:] * (rows - len(piece))


def laid_out(features: Tensor, order: list[int]) -> Tensor:
    """[n, ...] as the module takes it -> as a row has it."""
    return features.permute(0, *order)
