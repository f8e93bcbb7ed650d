"""Checkpoints made to harm, with the right hashes."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from parts import manager
from safetensors.torch import save as tensors_file
from untrusted_common import HASH, Kind, Payload, deep, sealed, torch_zip

from bigincubate.errors import ArtifactError, DamagedError


def header(text: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def layout(value: Any) -> bytes:
    return header({"__metadata__": {"layout": value}, "w": entry(0, 8, [2])}, bytes(8))


class Checkpoint:
    """A committed checkpoint, to be spoiled. What is read: the newest, all tensors of it."""

    def __init__(self, place: Any) -> None:
        self.outside, self.folder = place.outside, place.inside / "checkpoints" / "step-00000008"
        self.folder.mkdir(parents=True)
        self.files = {"rank-00000.safetensors": tensors_file({"w": torch.ones(2)}), "state.json": b'{"step": 8}'}
        self.manifest: dict[str, Any] = {"format": 1, "step": 8, "digest": "d" * 64, "world": 1}
        self.place = place

    def write(self, **manifest: Any) -> Path:
        for name, data in self.files.items():
            (self.folder / name).write_bytes(data)
        files = {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in self.files.items()
        }
        sealed(self.folder, json.dumps({**self.manifest, "files": files, **manifest}).encode())
        return self.folder

    def read(self) -> None:
        newest = manager(self.place.inside).load_latest()
        assert newest is not None
        assert {key: newest.tensors[key].sum().item() for key in newest.tensors} == {"w": 2}

    def link(self, name: str) -> None:
        """To a file outside that would do."""
        (self.outside / name).write_bytes((self.folder / name).read_bytes())
        (self.folder / name).unlink()
        (self.folder / name).symlink_to(self.outside / name)


def rank_file(data: Callable[[Any], bytes]) -> Callable[[Any], Any]:
    def spoil(place: Any) -> Any:
        checkpoint = Checkpoint(place)
        checkpoint.files["rank-00000.safetensors"] = data(place)
        checkpoint.write()
        return checkpoint.read

    return spoil


def state_file(data: bytes) -> Callable[[Any], Any]:
    def spoil(place: Any) -> Any:
        checkpoint = Checkpoint(place)
        checkpoint.files["state.json"] = data
        checkpoint.write()
        return checkpoint.read

    return spoil


def manifest_file(data: bytes) -> Callable[[Any], Any]:
    def spoil(place: Any) -> Any:
        checkpoint = Checkpoint(place)
        sealed(checkpoint.write(), data)
        return checkpoint.read

    return spoil


def manifest_with(**fields: Any) -> Callable[[Any], Any]:
    def spoil(place: Any) -> Any:
        checkpoint = Checkpoint(place)
        checkpoint.write(**fields)
        return checkpoint.read

    return spoil


def named(name: Callable[[Any], str]) -> Callable[[Any], Any]:
    """A manifest that names a valid file elsewhere."""

    def spoil(place: Any) -> Any:
        checkpoint, data = Checkpoint(place), tensors_file({"w": torch.ones(2)})
        (place.outside / "rank-00000.safetensors").write_bytes(data)
        (checkpoint.folder / "sub").mkdir()
        (checkpoint.folder / "sub" / "rank-00000.safetensors").write_bytes(data)
        del checkpoint.files["rank-00000.safetensors"]
        state = checkpoint.files["state.json"]
        files = {
            where: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for where, content in ((name(place), data), ("state.json", state))
        }
        checkpoint.write(files=files)
        return checkpoint.read

    return spoil


def linked(name: str) -> Callable[[Any], Any]:
    def spoil(place: Any) -> Any:
        checkpoint = Checkpoint(place)
        checkpoint.write()
        checkpoint.link(name)
        return checkpoint.read

    return spoil


def linked_folder(place: Any) -> Any:
    checkpoint = Checkpoint(place)
    checkpoint.write().rename(place.outside / "step-00000008")
    checkpoint.folder.symlink_to(place.outside / "step-00000008")
    return checkpoint.read


def gigabytes(name: str) -> Callable[[Any], Any]:
    def spoil(place: Any) -> Any:
        checkpoint = Checkpoint(place)
        os.truncate(checkpoint.write() / name, 2**34)
        return checkpoint.read

    return spoil


def pipe(name: str) -> Callable[[Any], Any]:
    """Who opens it waits for ever."""

    def spoil(place: Any) -> Any:
        checkpoint = Checkpoint(place)
        (checkpoint.write() / name).unlink()
        os.mkfifo(checkpoint.folder / name)
        return checkpoint.read

    return spoil


def pickle_beside(place: Any) -> Any:
    checkpoint = Checkpoint(place)
    (checkpoint.write() / ".metadata").write_bytes(pickle.dumps(Payload(place.mark)))
    return checkpoint.read


def other_digits(place: Any) -> Any:
    checkpoint = Checkpoint(place)
    checkpoint.write().rename(checkpoint.folder.with_name("step-٠٠٠٠٠٠٠٨"))

    def read() -> None:
        assert manager(place.inside).load_latest() is None

    return read


CHECKPOINTS: list[Kind] = [
    ("pickle as tensors", rank_file(lambda place: pickle.dumps(Payload(place.mark))), DamagedError),
    ("torch.save as tensors", rank_file(torch_zip), DamagedError),
    ("pickled .metadata beside", pickle_beside, None),
    ("manifest names ../", named(lambda place: "../../../outside/rank-00000.safetensors"), DamagedError),
    ("manifest names an absolute path", named(lambda p: str(p.outside / "rank-00000.safetensors")), DamagedError),
    ("manifest names a subfolder", named(lambda place: "sub/rank-00000.safetensors"), DamagedError),
    ("tensors linked", linked("rank-00000.safetensors"), DamagedError),
    ("state linked", linked("state.json"), DamagedError),
    ("manifest linked", linked("manifest.json"), DamagedError),
    ("marker linked", linked("COMMITTED"), DamagedError),
    ("checkpoint linked", linked_folder, DamagedError),
    ("marker of 16 GiB", gigabytes("COMMITTED"), DamagedError),
    ("manifest of 16 GiB", gigabytes("manifest.json"), DamagedError),
    ("tensors are a pipe", pipe("rank-00000.safetensors"), DamagedError),
    ("header longer than any file", rank_file(lambda place: struct.pack("<Q", 2**62) + b"{}"), DamagedError),
    ("header of 101 MB", rank_file(lambda place: header(b" " * 101_000_000)), DamagedError),
    ("overlapping tensors", rank_file(lambda p: header({k: entry(0, 8, [2]) for k in "wv"}, bytes(8))), DamagedError),
    ("tensors beyond the end", rank_file(lambda p: header({"w": entry(0, 2**40, [2**38])}, bytes(8))), DamagedError),
    ("sizes that do not fit shapes", rank_file(lambda p: header({"w": entry(0, 8, [3])}, bytes(8))), DamagedError),
    ("shape beyond 64 bits", rank_file(lambda p: header({"w": entry(0, 8, [2**62] * 3)}, bytes(8))), DamagedError),
    ("nested header", rank_file(lambda place: header(deep())), DamagedError),
    ("shard at a negative offset", rank_file(lambda place: layout('{"w": [-4, [8]]}')), DamagedError),
    ("shard beyond its tensor", rank_file(lambda place: layout('{"w": [7, [8]]}')), DamagedError),
    ("shard of a huge tensor", rank_file(lambda place: layout('{"w": [0, [1099511627776]]}')), ArtifactError),
    ("layout of other types", rank_file(lambda place: layout('{"w": {"a": "b"}}')), DamagedError),
    ("nested layout", rank_file(lambda place: layout(deep().decode())), DamagedError),
    ("nested manifest", manifest_file(deep('{"a":', "}")), DamagedError),
    ("manifest is a list", manifest_file(b"[]"), DamagedError),
    ("manifest size NaN", manifest_with(files={"state.json": {"size": float("nan"), "sha256": HASH}}), DamagedError),
    ("manifest size negative", manifest_with(files={"state.json": {"size": -1, "sha256": HASH}}), DamagedError),
    ("manifest of a later format", manifest_with(format=99), DamagedError),
    ("manifest with more in it", manifest_with(__reduce__="os.system"), DamagedError),
    ("nested state", state_file(deep()), DamagedError),
    ("state of 65 MiB", state_file(b'{"step": 8}' + b" " * (65 * 2**20)), DamagedError),
    ("state is a list", state_file(b"[8]"), DamagedError),
    ("state of another step", state_file(b'{"step": 7}'), DamagedError),
    ("digits of another script", other_digits, None),
]
