"""What a large data set costs: calls to the file system, and memory of a loader worker."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from test_streams import data, info

from bigincubate.compat import streaming
from bigincubate.compat.streaming import IsolatedStreamingDataset
from bigincubate.data.dataset import DatasetInfo, open_dataset
from bigincubate.data.epoch_layout import EpochLayout
from bigincubate.data.shards import Shards
from bigincubate.data.shared_memory import claim_memory_prefix
from bigincubate.tasks.image_classification.views import LabelledImages

fixtures = (data, info)
SHARDS = 8


def test_open_dataset_takes_two_metadata_calls_a_shard(info: DatasetInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for the shard and one for its folder; reading the split takes no further ones before shards are opened."""
    calls: Counter[str] = Counter()
    for name in ("stat", "lstat", "listdir", "scandir", "readlink", "access"):
        call = getattr(os, name)

        def counted(path: Any = ".", *arguments: Any, call: Any = call, **named: Any) -> Any:
            if isinstance(path, str | os.PathLike) and f"{info.path}/train/" in f"{os.fspath(path)}/":
                calls[os.path.basename(path)] += 1
            return call(path, *arguments, **named)

        monkeypatch.setattr(os, name, counted)
    found = open_dataset(info.path)
    assert calls["shard.00000.mds"] == SHARDS
    assert {calls[f"{number:05}"] for number in range(SHARDS)} == {1}
    assert calls.total() <= 2 * SHARDS + 10
    calls.clear()
    Shards(found, "train", LabelledImages(5))
    assert calls.total() <= 5


class Order(IsolatedStreamingDataset):
    """The order of samples that do not exist."""

    def select(self, first_row: int, worker: int, workers: int) -> Any:
        return EpochLayout(self.num_samples, 100).select(first_row, worker, workers)


def order_of(folder: Path, samples: int) -> Order:
    shard: dict[str, Any] = {"column_names": [], "column_encodings": [], "column_sizes": [], "compression": None}
    shard |= {"format": "mds", "hashes": [], "size_limit": None, "version": 2, "zip_data": None, "samples": 1000}
    shard["raw_data"] = {"basename": "missing", "bytes": 1, "hashes": {}}
    folder.mkdir()
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": [shard] * (samples // 1000)}))
    options: dict[str, Any] = {"batch_size": 100, "num_canonical_nodes": 1, "partition_algo": "orig"}
    options |= {"shuffle": True, "shuffle_algo": "py1e", "shuffle_block_size": 2**18}
    order = Order(str(folder), "", **claim_memory_prefix()._asdict(), **options)
    order._unique_worker_world = order._unique_rank_world.detect_workers()
    return order


def test_memory_of_a_worker_does_not_depend_on_the_number_of_samples(tmp_path: Path) -> None:
    for samples in (10_000, 1_280_000):
        order = order_of(tmp_path / str(samples), samples)
        order.load_state_dict({"epoch": 0, "sample_in_epoch": 0})  # by the process that forks the workers
        tracemalloc.start()
        work = order._get_work(0, 0)
        assert len(work) == samples
        assert len({work[index] for index in range(0, samples, samples // 100)}) == 100
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 50_000, samples


def test_order_of_an_epoch_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs: list[int] = []
    generate = streaming.generate_work

    def noted(*arguments: Any) -> Any:
        epochs.append(arguments[3])
        return generate(*arguments)

    monkeypatch.setattr(streaming, "generate_work", noted)
    order = order_of(tmp_path / "data", 10_000)
    found = []
    for epoch, first in ((0, 0), (0, 700), (1, 0), (1, 100)):
        order.load_state_dict({"epoch": epoch, "sample_in_epoch": first})
        for _ in range(2):  # two workers
            work = order._get_work(epoch, first)
        found.append([work[index] for index in range(len(work))])
    assert epochs == [0, 1]
    assert found[0] != found[2]
    assert sorted(found[0]) == sorted(found[2]) == list(range(10_000))
