"""Measure what a large prepared data set costs: CPU time, memory of loader workers, and calls to its files.

    python benchmarks/data_scale.py [--samples 10000 1280000] [--workers 2] [--folder DIR]

The data set is generated: shards of 1,000 images of 16 bytes that are not decoded, so that only the numbers of samples
and shards matter. CPU seconds are those of one process after its imports. Calls to files of the data are counted with
an audit hook (opens, listed folders) and in wrappers of `os.stat` and `os.lstat`. Memory is that of loader workers,
resident bytes of their own (`RssAnon`, which contains the memory of the main process that they were forked from) and
shared with other processes (`RssShmem`). Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script, from anywhere

SHARD_SAMPLES = 1000
READ = 100_000  # samples that are read, over all epochs
PAYLOAD = b"0123456789abcdef"


def make_shard(samples: int) -> bytes:
    """Return an MDS shard of records with the same image and different labels."""
    record = 4 + len(PAYLOAD) + 8
    begin = 4 * (samples + 2)
    offsets = [begin + record * row for row in range(samples + 1)]
    records = (struct.pack("<I", len(PAYLOAD)) + PAYLOAD + struct.pack("<q", row) for row in range(samples))
    return struct.pack(f"<{samples + 2}I", samples, *offsets) + b"".join(records)


def make_dataset(folder: Path, samples: int) -> None:
    """Write a prepared data set with one shard per chunk; all digests are right."""
    from bigincubate.data.dataset import compute_dataset_digest
    from bigincubate.data.images import LABELLED_IMAGE_COLUMNS, labelled_image_schema

    schema, splits = labelled_image_schema(["a", "b"]), {}
    for split, total in (("train", samples), ("val", SHARD_SAMPLES)):
        shards = []
        for number in range(-(-total // SHARD_SAMPLES)):
            size = min(SHARD_SAMPLES, total - number * SHARD_SAMPLES)
            data = make_shard(size)
            chunk = folder / split / f"{number:05}"
            chunk.mkdir(parents=True)
            (chunk / "shard.00000.mds").write_bytes(data)
            raw = {"basename": f"{chunk.name}/shard.00000.mds", "bytes": len(data)}
            raw["hashes"] = {"sha256": hashlib.sha256(data).hexdigest()}
            shards.append(
                {
                    "column_encodings": list(LABELLED_IMAGE_COLUMNS.values()),
                    "column_names": list(LABELLED_IMAGE_COLUMNS),
                    "column_sizes": [None, 8],
                    "compression": None,
                    "format": "mds",
                    "hashes": ["sha256"],
                    "raw_data": raw,
                    "samples": size,
                    "size_limit": 2**26,
                    "version": 2,
                    "zip_data": None,
                }
            )
        text = json.dumps({"shards": shards, "version": 2}, sort_keys=True, indent=1).encode()
        (folder / split / "index.json").write_bytes(text)
        splits[split] = {"index": hashlib.sha256(text).hexdigest(), "samples": total}
    digest = compute_dataset_digest(schema, splits, {})
    description = {"format": 1, **asdict(schema), "splits": splits, "digest": digest}
    (folder / "dataset.json").write_text(json.dumps(description))


class PlainTransform:
    """Decode nothing, so that only reading is measured."""

    def decode(self, record: dict[str, Any]) -> Any:
        return record["label"]

    def compact(self, sample: Any) -> tuple[Any, int]:
        return sample, 2**40  # never kept

    def view(self, sample: Any, epoch: int, sample_id: int, repeat: int) -> Any:
        return sample

    def collate(self, views: Any) -> dict[str, Any]:
        import torch

        return {"labels": torch.tensor(views)}


def memory(pid: int) -> dict[str, int]:
    """Return the resident bytes of a process by kind: private, shared, and those of files."""
    kinds = {"RssAnon": "anon", "RssShmem": "shmem", "RssFile": "file"}
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {kinds[k]: int(v.split()[0]) * 1024 for k, _, v in (line.partition(":") for line in lines) if k in kinds}


class CallCounter:
    """Counts opens, and calls of `os.stat`, `os.lstat` and `os.listdir` or `os.scandir`, below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.opens, self.stats, self.lists, self.active = str(folder), 0, 0, 0, False
        sys.addaudithook(self._count)
        for name in ("stat", "lstat"):
            setattr(os, name, self._counted(getattr(os, name)))

    def _count(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active or event not in ("open", "os.listdir", "os.scandir"):
            return
        if isinstance(arguments[0], str | os.PathLike) and os.fspath(arguments[0]).startswith(self.folder):
            if event == "open":
                self.opens += 1
            else:
                self.lists += 1

    def _counted(self, call: Any) -> Any:
        def counted(path: Any, *arguments: Any, **named: Any) -> Any:
            if self.active and isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.folder):
                self.stats += 1
            return call(path, *arguments, **named)

        return counted

    def take(self) -> dict[str, int]:
        """Return and reset the counts."""
        counts = {"opens": self.opens, "stats": self.stats, "lists": self.lists}
        self.opens = self.stats = self.lists = 0
        return counts


def measure(folder: Path, workers: int) -> dict[str, float]:
    """Return what opening the data set, starting an epoch and reading samples cost, in this process."""
    import multiprocessing

    from bigincubate.config import DataConfig
    from bigincubate.data import shards
    from bigincubate.data.dataset import open_dataset
    from bigincubate.data.streams import TrainStream

    counter, check_hash, found, hashed = CallCounter(folder), shards.check_hash, {}, []

    def counted(file: Path, *arguments: Any, **named: Any) -> None:
        hashed.append(file)
        counter.active = False  # do not count the opens that hash
        check_hash(file, *arguments, **named)
        counter.active = True

    shards.check_hash = counted
    counter.active = True
    start = time.process_time()
    info = open_dataset(folder)
    found["seconds to open the data set"] = time.process_time() - start
    number = -(-info.samples["train"] // SHARD_SAMPLES) + 1
    calls = counter.take()
    found["metadata calls per shard to open it"] = (calls["stats"] + calls["lists"]) / number
    start = time.process_time()
    stream = TrainStream(info, DataConfig(workers=workers), PlainTransform(), seed=0, batch_size=100)
    found["seconds to make a stream"] = time.process_time() - start
    calls = counter.take()
    found["metadata calls per shard to make a stream"] = (calls["stats"] + calls["lists"]) / number
    start, batches = time.process_time(), stream.batches(0)
    if workers:
        for _ in range(READ // 100):
            next(batches)
        children = [memory(child.pid) for child in multiprocessing.active_children() if child.pid]
        found["MiB of a worker"] = max(child["anon"] for child in children) / 2**20
        found["MiB shared by the workers"] = max(child["shmem"] for child in children) / 2**20
        return found
    stream._loader.load_state_dict({"epoch": 0, "sample_in_epoch": 0})
    found["seconds to compute the order of an epoch"] = time.process_time() - start
    counter.take()
    for _ in range(READ // 100):
        next(batches)
    found["opens per 1,000 samples"] = counter.take()["opens"] / (READ / 1000)
    found["shards hashed while reading"] = len(hashed)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[10_000, 1_280_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=None, help="keep the data sets in this folder")
    parser.add_argument("--measure", nargs=2, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(Path(args.measure[0]), int(args.measure[1]))))
        return
    columns: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for samples in args.samples:
            folder = (args.folder or Path(temporary)) / str(samples)
            if not folder.exists():
                make_dataset(folder, samples)
            columns.append({})
            for run, workers in (("", 0), (" (second run)", 0), ("", args.workers)):
                command = [sys.executable, __file__, "--measure", str(folder), str(workers)]
                out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
                rows = json.loads(out)
                names = [name for name in rows if not run or name.startswith(("opens", "shards"))]
                columns[-1] |= {name + run: rows[name] for name in names if name + run not in columns[-1]}
    print(f"| | {' | '.join(f'{samples:,} images' for samples in args.samples)} |")
    print(f"| --- |{' ---: |' * len(args.samples)}")
    for name in columns[0]:
        print(f"| {name} | {' | '.join(f'{column[name]:.3g}' for column in columns)} |")


if __name__ == "__main__":
    main()
