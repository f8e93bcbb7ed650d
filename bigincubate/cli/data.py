"""Commands that prepare data."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ..errors import ConfigError, format_count
from ..files import quote_path
from .app import MAX_COUNT, data_app, parse_path, progress_display, say

if TYPE_CHECKING:
    from ..data.dataset import DatasetInfo
    from ..data.partitions import PartitionFunction


def _parse_columns(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    if any(not name or not column for name, _, column in pairs) or len({name for name, _, _ in pairs}) != len(pairs):
        raise ConfigError(f"--columns {text}: expected image=NAME,label=NAME")
    return {name.strip(): column.strip() for name, _, column in pairs}


def _parse_source(text: str) -> str:
    from ..data.sources import EMBEDDED
    from ..data.text.files import EMBEDDED_TEXT

    return text if text in (*EMBEDDED, *EMBEDDED_TEXT) else str(parse_path(text))


@data_app.command("prepare")
def data_prepare(
    source: Annotated[
        str,
        Argument(
            metavar="SOURCE",
            parser=_parse_source,
            help="A file or folder of one of the forms above, or the name of built-in data.",
        ),
    ],
    out: Annotated[Path, Option(metavar="DIR", parser=parse_path, help="The output folder.")],
    jobs: Annotated[int, Option(min=1, max=MAX_COUNT, metavar="N", help="Number of processes.")] = os.cpu_count() or 1,
    val_fraction: Annotated[
        float | None,
        Option(
            metavar="X",
            help="Fraction of each class to hold out if there is no validation split (default: 0.2); of text, of the"
            " documents of each domain (default: 0.05).",
        ),
    ] = None,
    columns: Annotated[
        str | None, Option(metavar="image=A,label=B", help="The columns to read, if not those with the usual names.")
    ] = None,
    parts: Annotated[
        int | None,
        Option(
            min=1,
            max=MAX_COUNT,
            metavar="N",
            help="Also divide the training split into N partitions, for data.decentralized.",
        ),
    ] = None,
    balanced: Annotated[
        str,
        Option(
            help="How to divide the training split: class (each class or domain evenly), hash (by the hash of the"
            " names) or, for text, domain (one partition for each domain)."
        ),
    ] = "class",
    by: Annotated[
        Path | None,
        Option(metavar="FILE", parser=parse_path, help="Partition of each sample: CSV sample,part, or JSON lines."),
    ] = None,
    skip_bad: Annotated[bool, Option("--skip-bad", help="Leave out images or documents that cannot be read.")] = False,
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
    window: Annotated[
        int | None,
        Option(min=1, max=MAX_COUNT, metavar="N", help="SOURCE is text: store it as windows of N tokens."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        Option(
            metavar="bytes|bpe:N|FILE",
            help="Tokenizer of text: bytes (the default), a BPE tokenizer with N tokens that is trained on the text, or"
            " a tokenizer.json.",
        ),
    ] = None,
    domain_bytes: Annotated[
        int | None,
        Option(min=1, metavar="N", help="Use N bytes of each domain of a text, in whole documents (default: all)."),
    ] = None,
    development: Annotated[
        bool,
        Option("--development", help="Of text: divide the training documents again, to tune without the validation."),
    ] = False,
    column: Annotated[
        str | None,
        Option(metavar="NAME", help="Field of JSON lines or column of Parquet files with the text (default: text)."),
    ] = None,
) -> None:
    """Convert images or text to hashed MDS shards for training. Run it again to resume.

    SOURCE is one of:

    - a folder with one folder per class, or such folders in train/ and val/
      (also: training, valid, validation; test if there is no val)
    - a tar, tar.gz or zip file of such folders
    - ImageNet as published: ILSVRC2012_img_train.tar, or the folder with it,
      the validation tar and the devkit
    - WebDataset shards: a folder, a shard, or 'train-{000..146}.tar' in quotes
    - Parquet or Arrow files of Hugging Face: a folder or a file (needs pyarrow)
    - a .npz file with arrays such as x_train and y_train
    - a .csv file with the columns path,label or path,label,split
    - a CIFAR-10 or CIFAR-100 python archive; digits; made-up
    - with --window, text for language models: a folder of text, Markdown, HTML
      or source files, a .txt file, .jsonl, .jsonl.gz, .jsonl.zst or Parquet
      files (or a folder of them); stdlib; made-up-text

    Without a validation split, a fraction of each class is held out. Hidden folders, thumbnails and further links to
    the same file are skipped.
    """
    from ..data.prepare import prepare_dataset
    from ..data.text.prepare import prepare_text

    if val_fraction is not None and not 0 < val_fraction <= 0.9:
        raise ConfigError(f"--val-fraction {val_fraction}: expected a fraction greater than 0 and at most 0.9")
    of_images = {"--columns": columns, "--max-pixels": max_pixels, "--resize": resize}
    of_text = {
        "--tokenizer": tokenizer,
        "--column": column,
        "--balanced domain": balanced == "domain" or None,
        "--domain-bytes": domain_bytes,
        "--development": development or None,
    }
    for option, value in (of_text if window is None else of_images).items():
        if value is not None:
            what, advice = ("text", "add --window N") if window is None else ("images", "omit it, or omit --window")
            raise ConfigError(f"{option} is for {what}: {advice}")
    options: dict[str, Any] = {
        "jobs": jobs,
        "partition": _choose_partition(parts, balanced, by),
        "skip_bad": skip_bad,
        "check": check,
    }
    prepare: Callable[..., DatasetInfo]
    if window is not None:
        options |= {"window": window, "tokenizer": tokenizer or "bytes", "column": column}
        options |= {"domain_bytes": domain_bytes, "development": development}
        prepare = partial(prepare_text, val_fraction=val_fraction or 0.05, **options)
    else:
        pairs = _parse_columns(columns) if columns is not None else None
        options |= {"columns": pairs, "max_pixels": max_pixels, "resize": resize}
        prepare = partial(prepare_dataset, val_fraction=val_fraction or 0.2, **options)
    lines: list[str] = []  # printed below the progress
    try:
        with progress_display("preparing", "images" if window is None else "percent") as show:
            info = prepare(source, out, on_progress=show, report=lines.append)
    finally:
        for line in lines:
            say(line)
    counts = ", ".join(f"{count:,} {split}" for split, count in info.samples.items())
    partitions = f", {format_count(len(info.parts), 'partition')}" if info.parts else ""
    found, path = info.schema.metadata, quote_path(out)
    if window is None:
        text = f"{counts} images of {format_count(len(found['classes']), 'class')}{partitions}"
    else:
        text = (
            f"{counts} windows of {format_count(window, 'token')}, a vocabulary of {found['vocabulary']:,}{partitions}"
        )
    say(f"{path}: {text}; use it with --set data.path={path}")


@data_app.command("adopt")
def data_adopt(
    source: Annotated[
        str, Argument(metavar="DIR|URL", help="A folder or URL with the splits train and val, or of one split.")
    ],
    val: Annotated[
        str | None, Option(metavar="DIR|URL", help="The validation split, if it is not val in the folder or URL.")
    ] = None,
    columns: Annotated[
        str | None,
        Option(metavar="image=A,label=B", help="The names of the columns, if not image and label; tokens=A for text."),
    ] = None,
    classes: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            parser=parse_path,
            help="Names of the classes, one per line or a JSON list; needed if the labels are text.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        Option(metavar="bytes|FILE", help="The tokenizer that produced the tokens: a tokenizer.json, or bytes."),
    ] = None,
    out: Annotated[
        Path | None,
        Option(metavar="DIR", parser=parse_path, help="The folder of the description (default: adopted in DIR)."),
    ] = None,
    parts: Annotated[
        int,
        Option(min=0, max=MAX_COUNT, metavar="N", help="Also describe N partitions of whole shards or subfolders."),
    ] = 0,
    jobs: Annotated[int, Option(min=1, max=MAX_COUNT, metavar="N", help="Number of processes.")] = os.cpu_count() or 1,
) -> None:
    """Use MDS shards of mosaicml-streaming for training without rewriting them.

    The shards may be compressed, and may have any columns except pickles. They are read once, to hash them and to check
    the labels or tokens; those at a URL such as s3://bucket/data are downloaded one at a time for this, and again when
    they are needed for training. Run it again to check that the indexes and the options are still the same.
    """
    from ..data.adopt import adopt_dataset

    lines: list[str] = []  # printed below the progress
    try:
        with progress_display("reading", "samples") as show:
            info = adopt_dataset(
                _parse_place(source),
                out,
                val=None if val is None else _parse_place(val),
                columns=_parse_columns(columns) if columns is not None else None,
                classes=classes,
                tokenizer=tokenizer,
                parts=parts,
                jobs=jobs,
                on_progress=show,
                report=lines.append,
            )
    finally:
        for line in lines:
            say(line)
    counts = ", ".join(f"{count:,} {split}" for split, count in info.samples.items())
    partitions = f", {format_count(len(info.parts), 'partition')}" if info.parts else ""
    path = quote_path(info.path)
    found = info.schema.metadata
    what = (
        f"images of {format_count(len(found['classes']), 'class')}"
        if "classes" in found
        else f"windows of {format_count(found['window'], 'token')}"
    )
    say(f"{path}: {counts} {what}{partitions}; use it with --set data.path={path}")


def _parse_place(text: str) -> Path | str:
    """Return a URL as it is, without a slash at its end, and otherwise the absolute path."""
    from ..data.remote import is_url

    return text.rstrip("/") if is_url(text) else parse_path(text)


def _choose_partition(parts: int | None, balanced: str, by: Path | None) -> PartitionFunction | None:
    """Return the function that divides the training split; None if it is not divided."""
    from ..data.partitions import partition_by_class, partition_by_domain, partition_by_hash, partition_from_file

    ways: dict[str, Callable[..., Any]] = {
        "class": partition_by_class,
        "hash": partition_by_hash,
        "domain": partition_by_domain,
    }
    if balanced not in ways:
        raise ConfigError(f"--balanced {balanced}: expected class, hash or domain")
    if by is not None and parts is not None:
        raise ConfigError("--by and --parts: use only one of them; the file of --by defines the partitions")
    if by is not None:
        return partial(partition_from_file, file=by)
    return partial(ways[balanced], parts=parts) if parts or balanced == "domain" else None
