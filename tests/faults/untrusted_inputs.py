"""Artifacts, exported models, data sets and recipes made to harm, with the right hashes."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from parts import MANIFEST
from untrusted_common import DEEP, NOWHERE, Kind, Payload, deep, moved_outside, put, sealed, torch_zip

from bigincubate.config import AugmentConfig, DataConfig, ModelConfig, Settings, load_recipe
from bigincubate.data.dataset import compute_dataset_digest, open_dataset
from bigincubate.data.images import labelled_image_schema
from bigincubate.errors import ArtifactError, ConfigError, DataError
from bigincubate.interchange.export import export, load_model
from bigincubate.models.library import find_family
from bigincubate.storage.artifacts import save_artifact
from bigincubate.tasks.registry import make_task

# ------------------------------------------------------------------------------------------------ artifacts


def weights() -> dict[str, torch.Tensor]:
    spec = MANIFEST.model.model
    model = find_family(spec).build(spec, ((1,), (1,)))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def artifact(spoil: Callable[[Any, Path], None]) -> Callable[[Any], Any]:
    def make(place: Any) -> Any:
        save_artifact(place.inside / "artifact", place.weights, MANIFEST)
        spoil(place, place.inside / "artifact")
        return lambda: load_model(place.inside / "artifact")

    return make


def described(depths: Any = None, **fields: Any) -> Callable[[Any], Any]:
    """Return an artifact whose manifest has the right hashes and describes another model."""

    def spoil(place: Any, folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        spec = manifest["model"]
        spec |= {"model": spec["model"] | fields, "depths": depths or spec["depths"]}
        text = json.dumps(manifest)
        sealed(folder, text.replace("OUTSIDE", str(place.outside)).encode())

    return artifact(spoil)


def with_arguments(**arguments: Any) -> Callable[[Any], Any]:
    return described(args=MANIFEST.model.model.args | arguments)


def pickled_weights(place: Any, folder: Path) -> None:
    data = torch_zip(place)
    (folder / "weights.safetensors").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    sealed(folder, json.dumps(manifest | {"digest": hashlib.sha256(data).hexdigest()}).encode())


def exported(spoil: Callable[[Any, Path], None]) -> Callable[[Any], Any]:
    def make(place: Any) -> Any:
        save_artifact(place.inside / "artifact", place.weights, MANIFEST)
        export(place.inside / "artifact", place.inside / "out")
        spoil(place, place.inside / "out")
        return lambda: load_model(place.inside / "out")

    return make


ARTIFACTS: list[Kind] = [
    ("pickled weights", artifact(pickled_weights), ArtifactError),
    ("weights linked", artifact(moved_outside("weights.safetensors")), ArtifactError),
    ("artifact's manifest linked", artifact(moved_outside("manifest.json")), ArtifactError),
    ("artifact's marker linked", artifact(moved_outside("COMMITTED")), ArtifactError),
    ("artifact's manifest nested", artifact(lambda place, folder: sealed(folder, deep())), ArtifactError),
    ("model: pretrained", with_arguments(pretrained=True), ConfigError),
    ("model: a pickle to load", with_arguments(checkpoint_path="OUTSIDE/evil.pth"), ConfigError),
    ("model: weights from a file", with_arguments(pretrained_cfg={"file": "OUTSIDE/evil.pth"}), ConfigError),
    ("model: a class by name", with_arguments(norm_layer="os.system"), ConfigError),
    ("model from a hub", described(name="hf-hub:evil/model"), ConfigError),
    ("model from a folder", described(name="local-dir:OUTSIDE"), ConfigError),
    ("model of a million million classes", described(num_classes=10**12), ArtifactError),
    ("model a million wide", with_arguments(embed_dim=3_000_000), ArtifactError),
    ("model a thousand million deep", described(depths=[[10**9], [1]]), ArtifactError),
    ("export: pickled weights", exported(put("model.safetensors", torch_zip)), ArtifactError),
    ("export: nested config", exported(put("config.json", lambda place: deep())), ArtifactError),
    ("export: weights linked", exported(moved_outside("model.safetensors")), ArtifactError),
    ("export: pickle beside", exported(put("pytorch_model.bin", torch_zip)), None),
]


# ------------------------------------------------------------------------------------------------ data

PIXEL = bytes.fromhex(  # a PNG of one pixel
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c63f8cfc0f01f0005000"
    "1ff56c72fc30000000049454e44ae426082"
)


def sample(image: bytes, label: int) -> bytes:
    return struct.pack("<I", len(image)) + image + struct.pack("<q", label)


def shard(samples: list[bytes], offsets: list[int] | None = None) -> bytes:
    if offsets is None:
        offsets = [4 + 4 * (len(samples) + 1)]
        for each in samples:
            offsets.append(offsets[-1] + len(each))
    return struct.pack(f"<{1 + len(offsets)}I", len(samples), *offsets) + b"".join(samples)


TASK = make_task(
    Settings(model=ModelConfig(img_size=8, num_classes=2), augment=AugmentConfig(eval_crop=1.0)), DataConfig()
)


def dataset(place: Any, data: bytes, *, raw: dict[str, Any] | None = None, index: Any = None, **fields: Any) -> Any:
    """A prepared folder with one shard a split, all digests right."""
    folder, splits = place.inside / "data", {}
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        (folder / split / "shard.00000.mds").write_bytes(data)
        described = {"basename": "shard.00000.mds", "bytes": len(data), **(raw or {})}
        described.setdefault("hashes", {"sha256": hashlib.sha256(data).hexdigest()})
        one = {
            "column_encodings": ["bytes", "int"],
            "column_names": ["image", "label"],
            "column_sizes": [None, 8],
            "compression": None,
            "format": "mds",
            "hashes": ["sha256"],
            "raw_data": described,
            "samples": 1,
            "size_limit": 2**20,
            "version": 2,
            "zip_data": None,
            **fields,
        }
        text = index if isinstance(index, bytes) else json.dumps({"shards": [one], "version": 2}).encode()
        (folder / split / "index.json").write_bytes(text)
        splits[split] = {"index": hashlib.sha256(text).hexdigest(), "samples": one["samples"]}
    schema = labelled_image_schema(["a", "b"])
    digest = compute_dataset_digest(schema, splits, {})
    description = json.dumps({"format": 1, **asdict(schema), "splits": splits, "digest": digest})
    (folder / "dataset.json").write_text(description)

    def read() -> None:
        info = open_dataset(folder)
        for batch in TASK.eval_stream(info, "val", batch_size=1):
            assert batch["images"].shape == (1, 3, 8, 8)

    return read


def of_samples(*samples: bytes, offsets: list[int] | None = None, **options: Any) -> Callable[[Any], Any]:
    return lambda place: dataset(place, shard(list(samples), offsets), **options)


SOUND = sample(PIXEL, 1)


def spoiled_data(spoil: Callable[[Any, Path], None]) -> Callable[[Any], Any]:
    def make(place: Any) -> Any:
        read = dataset(place, shard([SOUND]))
        spoil(place, place.inside / "data")
        return read

    return make


def shard_outside(place: Any, folder: Path) -> None:
    (folder / "val" / "shard.00000.mds").rename(place.outside / "shard.mds")
    (folder / "val" / "shard.00000.mds").symlink_to(place.outside / "shard.mds")


def elsewhere(name: str) -> Callable[[Any], Any]:
    def make(place: Any) -> Any:
        (place.outside / "shard.mds").write_bytes(shard([SOUND]))
        return dataset(place, shard([SOUND]), raw={"basename": name.replace("OUTSIDE", str(place.outside))})

    return make


def png(width: int, height: int) -> bytes:
    """The beginning of a very large picture, and much less of its content."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(2**20))) + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(%pipe%touch ran) (w) file\n%%EOF\n"
ZIPPED = {"basename": "../../outside/shard.mds", "bytes": 1, "hashes": {"sha256": "0" * 64}}

DATA: list[Kind] = [
    ("data as it should be", of_samples(SOUND), None),
    ("index names ../", elsewhere("../../../outside/shard.mds"), DataError),
    ("index names an absolute path", elsewhere("OUTSIDE/shard.mds"), DataError),
    ("shard linked", spoiled_data(shard_outside), DataError),
    ("index linked", spoiled_data(lambda p, f: moved_outside("index.json")(p, f / "val")), DataError),
    ("description linked", spoiled_data(moved_outside("dataset.json")), DataError),
    ("pickled columns", of_samples(SOUND, column_encodings=["pkl", "int"]), DataError),
    ("a compressed shard", of_samples(SOUND, compression="zstd", zip_data=ZIPPED), DataError),
    ("a compressed shard that is not said to be", of_samples(SOUND, zip_data=ZIPPED), DataError),
    ("more samples than bytes", of_samples(SOUND, samples=10**15), DataError),
    ("fewer samples than none", of_samples(SOUND, samples=-1), DataError),
    ("samples in words", of_samples(SOUND, samples="many"), DataError),
    ("nested index", of_samples(SOUND, index=deep()), DataError),
    ("nested description", spoiled_data(put("dataset.json", lambda place: deep())), DataError),
    ("sample beyond the shard", of_samples(SOUND, offsets=[12, 2**31]), DataError),
    ("sample that ends before it begins", of_samples(SOUND, offsets=[2**31, 12]), DataError),
    ("image longer than its sample", of_samples(struct.pack("<I", 2**31) + PIXEL), DataError),
    ("label of no class", of_samples(sample(PIXEL, 10**9)), DataError),
    ("negative label", of_samples(sample(PIXEL, -1)), DataError),
    ("image bomb", of_samples(sample(png(60_000, 60_000), 1)), DataError),
    ("PostScript as image", of_samples(sample(EPS, 1)), DataError),
    ("pickle as image", of_samples(sample(pickle.dumps(Payload(NOWHERE)), 1)), DataError),
]


# ------------------------------------------------------------------------------------------------ recipes


def recipe(text: str | bytes) -> Callable[[Any], Any]:
    def make(place: Any) -> Any:
        file = place.inside / "recipe.toml"
        file.write_bytes(text if isinstance(text, bytes) else f"{text}\n".encode())

        def read() -> None:
            from bigincubate.planning.phases import make_plan

            make_plan(load_recipe(str(file)))

        return read

    return make


def sparse_recipe(place: Any) -> Any:
    read = recipe("")(place)
    os.truncate(place.inside / "recipe.toml", 2**34)
    return read


def piped_recipe(place: Any) -> Any:
    read = recipe("")(place)
    (place.inside / "recipe.toml").unlink()
    os.mkfifo(place.inside / "recipe.toml")
    return read


PLAN = "[plan]\nmodules = 2\n"
RECIPES: list[Kind] = [
    ("recipe: nested lists", recipe("a = " + "[" * DEEP + "]" * DEEP), ConfigError),
    ("recipe: nested tables", recipe("[" + ".".join("a" * 2000) + "]\nb = 1"), ConfigError),
    ("recipe: nested keys", recipe(PLAN + "[model.args]\n" + ".".join("a" * 900) + " = 1"), ConfigError),
    ("recipe: a number of 5,000 digits", recipe(PLAN + "[train]\nseed = " + "9" * 5000), ConfigError),
    ("recipe of 16 GiB", sparse_recipe, ConfigError),
    ("recipe: a pipe", piped_recipe, ConfigError),
    ("recipe: no text", recipe(b"\xff\xfe\x00"), ConfigError),
    ("recipe: a path as name", recipe('name = "../../outside"\n' + PLAN), ConfigError),
    ("recipe: nan", recipe(PLAN + "[train]\nlr = nan"), ConfigError),
    ("recipe: attributes of objects", recipe(PLAN + "[__class__]\n__init__ = 1"), ConfigError),
    ("recipe: pretrained", recipe(PLAN + "[model]\nargs = { pretrained = true }"), ConfigError),
    ("recipe: a hub", recipe(PLAN + '[model]\nname = "hf-hub:evil/model"'), ConfigError),
    ("recipe: more modules than blocks", recipe("[plan]\nmodules = 1000000000"), ConfigError),
    ("recipe: a pickle", recipe(pickle.dumps(Payload(NOWHERE), protocol=0)), ConfigError),
]
