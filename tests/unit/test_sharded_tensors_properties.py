"""Properties of sharded tensors: what W ranks write in any shards, W' ranks read in any others."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bigincubate.errors import ArtifactError
from bigincubate.storage.sharded_tensors import (
    DTYPES,
    ShardedTensorReader,
    TensorShard,
    copy_to_cpu,
    write_sharded_tensors,
)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    """Draw tensors of any type and shape, scalars and empty ones included."""
    found = {}
    for number in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        values = torch.arange(math.prod(shape)) % 2 if draw(st.booleans()) else 3 * torch.arange(math.prod(shape)) % 7
        found[f"t{number}"] = values.reshape(shape).to(
            draw(st.sampled_from([getattr(torch, name) for name in sorted(DTYPES)]))
        )
    return found


@st.composite
def ranges(draw: st.DrawFn, length: int, world: int, overlap: bool) -> list[tuple[int, int]]:
    """Draw a range of elements for each rank, some of them empty: they cover everything, and may overlap."""
    ends = sorted(draw(st.lists(st.integers(0, length), min_size=world - 1, max_size=world - 1)))
    found = list(pairwise([0, *ends, length]))
    if overlap:
        found = [(draw(st.integers(0, begin)), draw(st.integers(end, length))) for begin, end in found]
    return draw(st.permutations(found))


@given(st.data())
@settings(max_examples=25)
def test_shards_of_any_ranks_are_read_by_any_others(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole, writers, readers = data.draw(tensors()), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    held: list[dict[str, TensorShard]] = [{} for _ in range(writers)]
    for name, tensor in whole.items():
        for rank, (begin, end) in enumerate(data.draw(ranges(tensor.numel(), writers, data.draw(st.booleans())))):
            part = tensor.flatten()[begin:end]
            held[rank][name] = TensorShard(
                part.reshape(tensor.shape) if len(part) == tensor.numel() else part, begin, tuple(tensor.shape)
            )
    folder: Path = tmp_path_factory.mktemp("shards")
    files = [folder / f"rank-{rank}.safetensors" for rank in range(writers)]
    for file, shards in zip(files, held, strict=True):
        write_sharded_tensors(file, copy_to_cpu(shards))

    reader = ShardedTensorReader(files)
    assert reader.keys() == whole.keys()
    for name, tensor in whole.items():
        assert reader[name].dtype == tensor.dtype
        assert torch.equal(reader[name], tensor)
        for begin, end in data.draw(ranges(tensor.numel(), readers, data.draw(st.booleans()))):
            part = reader.read_range(name, begin, end - begin)
            assert part.dtype == tensor.dtype
            assert torch.equal(part, tensor.flatten()[begin:end])


def test_reader_is_a_mapping_that_reads_a_tensor_only_on_access(tmp_path: Path) -> None:
    tensors = {"whole": torch.arange(3), "half": torch.arange(4)}
    half = TensorShard(tensors["half"][:2], 0, (4,))
    write_sharded_tensors(tmp_path / "file", copy_to_cpu({"whole": tensors["whole"], "half": half}))
    reader = ShardedTensorReader([tmp_path / "file"])
    for found in (reader, reader.renamed({"whole": "whole", "half": "half"})):
        assert set(found) == found.keys() == tensors.keys()
        assert [key in found for key in ("whole", "half", "absent", 0)] == [True, True, False, False]
        assert found.get("absent") is None
        assert found.get("absent", "default") == "default"
        assert torch.equal(found.get("whole"), found["whole"])
        assert torch.equal(found["whole"], tensors["whole"])
        for read in (found.get, found.__getitem__):
            with pytest.raises(ArtifactError, match="tensor 'half' has no element 2"):
                read("half")
        with pytest.raises(ArtifactError, match="no tensor 'absent'"):
            found["absent"]
