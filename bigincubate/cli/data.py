"""Commands that prepare data."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ..errors import ConfigError
from ..files import quote_path
from .app import MAX_COUNT, data_app, parse_path, progress_display, say


def _parse_columns(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    if any(not name or not column for name, _, column in pairs) or len({name for name, _, _ in pairs}) != len(pairs):
        raise ConfigError(f"--columns {text}: expected image=NAME,label=NAME")
    return {name.strip(): column.strip() for name, _, column in pairs}


def _parse_source(text: str) -> str:
    from ..data.sources import EMBEDDED

    return text if text in EMBEDDED else str(parse_path(text))


@data_app.command("prepare")
def data_prepare(
    source: Annotated[
        str,
        Argument(
            metavar="SOURCE",
            parser=_parse_source,
            help="A file or folder of one of the forms above, digits, or made-up.",
        ),
    ],
    out: Annotated[Path, Option(metavar="DIR", parser=parse_path, help="The output folder.")],
    jobs: Annotated[int, Option(min=1, max=MAX_COUNT, metavar="N", help="Number of processes.")] = os.cpu_count() or 1,
    val_fraction: Annotated[
        float, Option(metavar="X", help="Fraction of each class to hold out if there is no validation split.")
    ] = 0.2,
    columns: Annotated[
        str | None, Option(metavar="image=A,label=B", help="The columns to read, if not those with the usual names.")
    ] = None,
    parts: Annotated[
        int | None,
        Option(
            min=1,
            max=MAX_COUNT,
            metavar="N",
            help="Also divide the training images into N partitions, for data.decentralized.",
        ),
    ] = None,
    balanced: Annotated[
        str, Option(help="How to divide the images: class (each class evenly) or hash (by the hash of their names).")
    ] = "class",
    by: Annotated[
        Path | None,
        Option(metavar="FILE", parser=parse_path, help="Partition of each sample: CSV sample,part, or JSON lines."),
    ] = None,
    skip_bad: Annotated[bool, Option("--skip-bad", help="Leave out images that cannot be read.")] = False,
    check: Annotated[
        bool, Option("--check", help="Compare the contents of all files with what was prepared, not only their times.")
    ] = False,
    max_pixels: Annotated[
        int | None, Option(min=1, help="Maximum number of pixels of an image, if not Pillow's 179 million.")
    ] = None,
    resize: Annotated[
        int | None,
        Option(min=1, metavar="N", help="Resize larger images: the shorter side gets N pixels (JPEG)."),
    ] = None,
) -> None:
    """Convert images to hashed MDS shards for training. Run it again to resume.

    SOURCE is one of:

    - a folder with one folder per class, or such folders in train/ and val/
      (also: training, valid, validation; test if there is no val)
    - a tar, tar.gz or zip file of such folders
    - ImageNet as published: ILSVRC2012_img_train.tar, or the folder with it,
      the validation tar and the devkit
    - WebDataset shards: a folder, a shard, or 'train-{000..146}.tar' in quotes
    - Parquet files of the Hugging Face Hub: a folder or a file (needs pyarrow)
    - a .npz file with arrays such as x_train and y_train
    - a .csv file with the columns path,label or path,label,split
    - a CIFAR-10 or CIFAR-100 python archive; digits; made-up

    Without a validation split, a fraction of each class is held out. Hidden folders, thumbnails and further links to
    the same file are skipped.
    """
    from ..data.partitions import partition_by_class, partition_by_hash, partition_from_file
    from ..data.prepare import prepare_dataset

    if not 0 < val_fraction <= 0.9:
        raise ConfigError(f"--val-fraction {val_fraction}: expected a fraction greater than 0 and at most 0.9")
    ways = {"class": partition_by_class, "hash": partition_by_hash}
    if balanced not in ways:
        raise ConfigError(f"--balanced {balanced}: expected class or hash")
    if by is not None and parts is not None:
        raise ConfigError("--by and --parts: use only one of them; the file of --by defines the partitions")
    divide = partial(partition_from_file, file=by) if by else partial(ways[balanced], parts=parts) if parts else None
    lines: list[str] = []  # printed below the progress
    try:
        with progress_display("preparing", "images") as show:
            info = prepare_dataset(
                source,
                out,
                jobs=jobs,
                val_fraction=val_fraction,
                columns=_parse_columns(columns) if columns is not None else None,
                partition=divide,
                max_pixels=max_pixels,
                resize=resize,
                skip_bad=skip_bad,
                check=check,
                on_progress=show,
                report=lines.append,
            )
    finally:
        for line in lines:
            say(line)
    counts = ", ".join(f"{count:,} {split}" for split, count in info.samples.items())
    counts += f", {len(info.parts)} partitions" if info.parts else ""
    path = quote_path(out)
    say(
        f"{path}: {counts} images of {len(info.schema.metadata['classes'])} classes; use it with --set data.path={path}"
    )
