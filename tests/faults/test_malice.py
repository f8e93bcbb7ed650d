"""Files made to harm, with the right hashes: nothing of them runs, and they lead nowhere outside their folder."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ledger import ROOT, Ledger
from parts import MANIFEST, manager
from safetensors.torch import save as tensors_file

from bigincubate.config import AugmentConfig, load_recipe
from bigincubate.data.dataset import compute_dataset_digest, open_dataset
from bigincubate.data.file_locks import runtime_dir
from bigincubate.data.images import labelled_image_schema
from bigincubate.data.streams import EvalStream
from bigincubate.errors import (
    ArtifactError,
    BigincubateError,
    ConfigError,
    DamagedError,
    DataError,
)
from bigincubate.interchange.export import export, load_model
from bigincubate.models import build
from bigincubate.storage.artifacts import load_artifact, save_artifact
from bigincubate.tasks.image_classification.views import EvalTransform

Kind = tuple[str, Callable[[Any], Any], type[BigincubateError] | None]  # None: it does no harm, and does not matter
NOWHERE, DEEP, HASH = Path("/nowhere"), 100_000, "0" * 64


class Payload:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


# ------------------------------------------------------------------------------------------------ the guard

FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
KNOWN = tuple({str(ROOT), sys.prefix, sys.base_prefix, *map(os.path.realpath, sys.path), "/proc", "/sys", "/dev/shm"})
KNOWN += (str(runtime_dir()),)  # locks of this user's
watch = SimpleNamespace(root=None, seen=[])


def guard(event: str, arguments: tuple[Any, ...]) -> None:
    if watch.root is None:
        return
    if event in FORBIDDEN:
        watch.seen.append((event, *map(str, arguments)))
    if event == "open" and isinstance(arguments[0], str | bytes):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        allowed = path.startswith((str(watch.root), *filter(None, KNOWN))) or path.endswith("_filelock")
        if not allowed or "outside" in path:
            watch.seen.append((event, path))


@contextmanager
def guarded(root: Path) -> Iterator[list[Any]]:
    """What happens in the block that must not."""
    if "guard" not in vars(watch):
        watch.guard = guard
        sys.addaudithook(guard)  # for good: it cannot be taken away
    watch.root, watch.seen = os.path.realpath(root), []
    try:
        yield watch.seen
    finally:
        watch.root = None


# ------------------------------------------------------------------------------------------------ checkpoints


def deep(opening: str = "[", closing: str = "]") -> bytes:
    return (opening * DEEP + closing * DEEP).encode()


def header(text: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def layout(value: Any) -> bytes:
    return header({"__metadata__": {"layout": value}, "w": entry(0, 8, [2])}, bytes(8))


def sealed(folder: Path, manifest: bytes) -> None:
    (folder / "manifest.json").write_bytes(manifest)
    (folder / "COMMITTED").write_text(hashlib.sha256(manifest).hexdigest())


class Checkpoint:
    """A committed checkpoint, to be spoiled. What is read: the newest, all tensors of it."""

    def __init__(self, place: Any) -> None:
        self.outside, self.folder = place.outside, place.inside / "checkpoints" / "step-00000008"
        self.folder.mkdir(parents=True)
        self.files = {"rank-00000.safetensors": tensors_file({"w": torch.ones(2)}), "state.json": b'{"step": 8}'}
        self.manifest: dict[str, Any] = {"format": 1, "step": 8, "recipe": "d" * 64, "world": 1}
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


def torch_zip(place: Any) -> bytes:
    file = io.BytesIO()
    torch.save({"w": Payload(place.mark)}, file)
    return file.getvalue()


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


# ------------------------------------------------------------------------------------------------ artifacts


def weights() -> dict[str, torch.Tensor]:
    settings = MANIFEST.model.model
    model = build(settings.name, ((1,), (1,)), num_classes=10, img_size=8, args=settings.args)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def artifact(spoil: Callable[[Any, Path], None]) -> Callable[[Any], Any]:
    def make(place: Any) -> Any:
        save_artifact(place.inside / "artifact", place.weights, MANIFEST)
        spoil(place, place.inside / "artifact")
        return lambda: load_model(place.inside / "artifact")

    return make


def described(**fields: Any) -> Callable[[Any], Any]:
    """By a manifest with the right hashes and a model of its own."""

    def spoil(place: Any, folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        text = json.dumps(manifest | {"model": manifest["model"] | fields})
        sealed(folder, text.replace("OUTSIDE", str(place.outside)).encode())

    return artifact(spoil)


def with_settings(**settings: Any) -> Callable[[Any], Any]:
    return described(model=MANIFEST.model.model.model_dump() | settings)


def with_arguments(**arguments: Any) -> Callable[[Any], Any]:
    return with_settings(args=MANIFEST.model.model.args | arguments)


def pickled_weights(place: Any, folder: Path) -> None:
    data = torch_zip(place)
    (folder / "weights.safetensors").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    sealed(folder, json.dumps(manifest | {"digest": hashlib.sha256(data).hexdigest()}).encode())


def moved_outside(name: str) -> Callable[[Any, Path], None]:
    def spoil(place: Any, folder: Path) -> None:
        (folder / name).rename(place.outside / name)
        (folder / name).symlink_to(place.outside / name)

    return spoil


def exported(spoil: Callable[[Any, Path], None]) -> Callable[[Any], Any]:
    def make(place: Any) -> Any:
        save_artifact(place.inside / "artifact", place.weights, MANIFEST)
        export(place.inside / "artifact", place.inside / "out")
        spoil(place, place.inside / "out")
        return lambda: load_model(place.inside / "out")

    return make


def put(name: str, data: Callable[[Any], bytes]) -> Callable[[Any, Path], None]:
    return lambda place, folder: (folder / name).write_bytes(data(place)) and None


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
    ("model from a hub", with_settings(name="hf-hub:evil/model"), ConfigError),
    ("model from a folder", with_settings(name="local-dir:OUTSIDE"), ConfigError),
    ("model of a million million classes", with_settings(num_classes=10**12), ArtifactError),
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
    text = json.dumps({"format": 1, **asdict(schema), "splits": splits, "digest": digest})
    (folder / "dataset.json").write_text(text)

    def read() -> None:
        info = open_dataset(folder)
        transform = EvalTransform(AugmentConfig(eval_crop=1.0), 8, classes=2)
        for batch in EvalStream(info, "val", transform, batch_size=1):
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
KINDS = [*CHECKPOINTS, *ARTIFACTS, *DATA, *RECIPES]


@pytest.mark.row("malice")
def test_malice(ledger: Ledger, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ledger.row.full == ledger.row.few == len(KINDS), len(KINDS)
    tensors = weights()
    for trial in ledger.trials():
        with ledger.keep(trial):
            name, make, expected = KINDS[trial.number]
            top = tmp_path / str(trial.number)
            place = SimpleNamespace(inside=top / "inside", outside=top / "outside", mark=top / "ran", weights=tensors)
            place.inside.mkdir(parents=True), place.outside.mkdir()
            (place.outside / "evil.pth").write_bytes(torch_zip(place))
            read = make(place)
            before = sorted(place.outside.rglob("*"))
            with guarded(place.inside) as seen:
                found = outcome(read)
            assert isinstance(found, expected or type(None)), f"{name}: {found!r}"
            assert "\n" not in str(found), f"{name}: {found}"
            assert not seen, f"{name}: {seen}"
            assert not place.mark.exists(), name
            assert sorted(place.outside.rglob("*")) == before, name
    ledger.check()


def outcome(read: Callable[[], Any]) -> BaseException | None:
    try:
        read()
    except Exception as error:
        return error
    return None


@pytest.fixture
def trainer(lab: Callable[..., Any]) -> Any:
    return lab().trainer("pretrain")


def test_a_checkpoint_with_the_right_hashes_that_does_not_fit_is_one_line(trainer: Any) -> None:
    """What only the trainer can tell: values of the wrong type, tensors of the wrong shape, places that are not."""
    trainer.checkpoints.save(0, trainer.sharding.save() | trainer.ema.save(), {"step": 0})
    valid = trainer.checkpoints.load_latest()
    trainer.restore(valid)
    tensors = {key: valid.tensors[key] for key in valid.tensors}
    name = next(key for key in tensors if key.startswith("model/") and tensors[key].ndim == 2)
    for step, (state, own) in enumerate(
        [
            ({"seen": "many"}, {}),
            ({"lr_hook": {"gain": [1]}}, {}),
            ({"last": 3}, {}),
            ({}, {name: torch.zeros(3, 3)}),
            ({}, {"group/step/99": torch.tensor(1)}),
            ({}, {"group/step/x": torch.tensor(1)}),
        ],
        start=1,
    ):
        trainer.checkpoints.save(step, {**tensors, **own}, {**valid.state, "step": step, **state})
        with pytest.raises(ArtifactError, match="does not fit") as caught:
            trainer.restore(trainer.checkpoints.load_latest())
        assert "\n" not in str(caught.value)


def test_the_guard_sees(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "outside").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with guarded(tmp_path / "inside") as seen:
        pickle.loads((tmp_path / "outside").read_bytes())
    assert [event for event, *_ in seen] == ["open", "pickle.find_class"]
    assert (tmp_path / "ran").exists()
    with pytest.raises(ArtifactError):
        load_artifact(tmp_path)
