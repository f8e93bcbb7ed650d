"""What reaches a module from frozen ones, as MDS shards: made once, chunk by chunk, and read in place of images.

    FOLDER/dataset.json       as of any data set; and what a row is, and a function of
    FOLDER/train/00000/…      row e * samples + j: all views of sample j in epoch e
    FOLDER/val/00000/…        a row a sample
    FOLDER/.making.json       while chunks are missing: what a row is, and how many bytes all of them take

Whoever is stopped goes on with the next chunk; what grew from something else is cleared away.
"""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import config
from ..errors import EnvironmentFault
from .chunks import describe, write_chunk
from .dataset import SPLITS, DatasetInfo, Features, open_dataset, read_json, write_json
from .streams import Batch, EveryView

MAKING = ".making.json"
CHUNK = 256  # samples
MEND = "make room, or set incubate.prefix_cache = false"

Compute = Callable[[Batch], Tensor]  # a batch of n views -> what reaches the module, [n, ...]
Chunk = tuple[str, int]  # a split, and its number there


class FeatureMaker:
    """The folder of a module.

    Args:
        folder: of this phase alone. info: the images.
        epochs: those whose views differ.
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
        epochs: int,
        rows: int,
        grown: dict[str, str],
    ) -> None:
        self.folder, self.info, self.settings, self.data = folder, info, settings, data
        self.epochs, self.rows, self.grown = epochs, rows, grown
        self.samples = {"train": epochs * info.samples["train"], "val": info.samples["val"]}  # rows of each split

    @property
    def done(self) -> bool:
        """Whether all rows are there, and are these. Their hashes are looked at by who reads them."""
        try:
            found = open_dataset(self.folder).features
        except EnvironmentFault:
            return False
        return found is not None and found.grown == self.grown

    def begin(self, compute: Compute, beside: Sequence[Path] = ()) -> tuple[Features, list[Chunk]]:
        """Clear away what is another's; see what a row is, and which chunks are to be made. By one rank alone.

        Args:
            beside: folders that others may be filling at the same time.

        Raises:
            EnvironmentFault: the disk has no room for all rows.
        """
        features = _noted(self.folder, self.grown)
        if features is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            for split in SPLITS:
                (self.folder / split).mkdir(parents=True)
            first = range(min(self.rows, self.samples["train"]))
            batch = next(self._views("train").batches([list(first)], 0))
            features = _described(compute(batch), self.settings.augment.repeats, self.grown)
        for left in self.folder.glob(".tmp-*"):  # by one that was killed
            shutil.rmtree(left)
        size = self.size(features)["bytes"]
        self._check_room(size - _written(self.folder), sum(map(outstanding, beside)))
        write_json(self.folder / MAKING, {"features": features.model_dump(), "bytes": size})
        return features, [chunk for chunk in self.chunks() if not self._place(chunk).exists()]

    def chunks(self) -> list[Chunk]:
        return [(split, number) for split in SPLITS for number in range(math.ceil(self.samples[split] / CHUNK))]

    def make(self, features: Features, compute: Compute, chunks: Sequence[Chunk]) -> Iterator[Chunk]:
        """Makes one chunk at each step of the iteration.

        Raises:
            EnvironmentFault: an image cannot be read, or the disk is full.
        """
        for split in SPLITS:
            own = [chunk for chunk in chunks if chunk[0] == split]
            views = self._views(split)
            pieces = [piece for chunk in own for piece in self._pieces(chunk)]
            batches = views.batches([_filled(piece, self.rows) for piece in pieces], self.data.workers)
            for chunk in own:
                left = len(self._rows(chunk))
                try:
                    write_chunk(self._place(chunk), self._encoded(features, compute, batches, left, views.repeats))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    raise EnvironmentFault(f"the disk of {self.folder} is full; {MEND}") from None
                yield chunk

    def finish(self, features: Features) -> None:
        """Describe what all ranks have made. By one rank, afterwards."""
        places = {split: [self._place(chunk) for chunk in self.chunks() if chunk[0] == split] for split in SPLITS}
        describe(self.folder, self.info.classes, places, {"kind": "features"}, {"features": features.model_dump()})
        (self.folder / MAKING).unlink()

    def size(self, features: Features) -> dict[str, int]:
        """Rows and bytes of all of them."""
        view = math.prod(features.shape) * getattr(torch, features.dtype).itemsize
        views = self.samples["train"] * features.views + self.samples["val"]
        return {"rows": sum(self.samples.values()), "bytes": views * view}

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

    def _place(self, chunk: Chunk) -> Path:
        return self.folder / chunk[0] / f"{chunk[1]:05}"

    def _rows(self, chunk: Chunk) -> range:
        return range(chunk[1] * CHUNK, min((chunk[1] + 1) * CHUNK, self.samples[chunk[0]]))

    def _pieces(self, chunk: Chunk) -> Iterator[range]:
        """What is computed at once."""
        rows = self._rows(chunk)
        return (rows[at : at + self.rows] for at in range(0, len(rows), self.rows))

    def _encoded(
        self, features: Features, compute: Compute, batches: Iterator[Batch], rows: int, repeats: int
    ) -> Iterator[tuple[bytes, int]]:
        """The next ``rows`` rows."""
        for left in range(rows, 0, -self.rows):
            batch = next(batches)
            found = compute(batch).permute(0, *features.order).contiguous().cpu()  # as it lies in memory
            samples = found.unflatten(0, (-1, repeats))
            labels = batch.labels[::repeats].tolist()
            for row in range(min(left, self.rows)):
                yield samples[row].view(torch.uint8).numpy().tobytes(), labels[row]

    def _check_room(self, size: int, beside: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if size + beside > free:
            others = f", and {beside / 2**30:.3g} GiB more for other modules" if beside else ""
            raise EnvironmentFault(
                f"incubate.prefix_cache takes {size / 2**30:.3g} GiB for this module{others};"
                f" {free / 2**30:.3g} GiB are free where {self.folder} is; {MEND}"
            )


def _noted(folder: Path, grown: dict[str, str] | None = None) -> Features | None:
    """What a folder that is being filled says of its rows; None where it is not, or from something else."""
    try:
        found = Features.model_validate(read_json(folder / MAKING)["features"])
    except (EnvironmentFault, KeyError, ValueError):
        return None
    return found if grown in (None, found.grown) else None


def _written(folder: Path) -> int:
    """Bytes of the rows that are there."""
    return sum(file.stat().st_size for file in folder.glob("*/*/*.mds"))


def outstanding(folder: Path) -> int:
    """Bytes that somebody else will still write to a folder of features."""
    try:
        promised: Any = read_json(folder / MAKING)["bytes"]
        return max(0, int(promised) - _written(folder))
    except (EnvironmentFault, KeyError, ValueError, TypeError, OSError):
        return 0


def _described(features: Tensor, views: int, grown: dict[str, str]) -> Features:
    """``features``: [n, ...]; rows keep the order in which its dimensions lie in memory."""
    order = sorted(range(1, features.dim()), key=features.stride, reverse=True)
    shape = [features.shape[dim] for dim in order]
    dtype = str(features.dtype).removeprefix("torch.")
    return Features.model_validate({"dtype": dtype, "shape": shape, "order": order, "views": views, "grown": grown})


def _filled(piece: range, rows: int) -> list[int]:
    """As many rows as ever, the last one again and again."""
    return [*piece, *[piece[-1]] * (rows - len(piece))]
