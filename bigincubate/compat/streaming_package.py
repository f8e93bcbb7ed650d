"""The names of mosaicml-streaming that this package uses, imported without the libraries that they do not need.

``streaming`` imports its modules for text, images and several modalities, and transformers for two classes, which bring
scikit-learn, SciPy and pandas. Import its names from here. If they were imported before, they are used as they are.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from .lean_imports import DeferredModule, replaced_modules

UNUSED_PARTS = ("streaming.text", "streaming.multimodal", "streaming.vision")
# streaming's loader compares batches with these classes; batches of this package are neither
UNUSED_CLASSES = {
    "transformers.feature_extraction_utils": "BatchFeature",
    "transformers.tokenization_utils_base": "BatchEncoding",
}


def _empty_module(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)  # importlib.util.find_spec needs one
    return module


def import_streaming() -> None:
    """Import ``streaming``; the parts that this package does not use are imported when they are first used."""
    if "streaming" in sys.modules:
        return
    stand_ins: dict[str, ModuleType | None] = {}
    if "transformers" not in sys.modules:
        stand_ins["transformers"] = _empty_module("transformers")
        for name, class_name in UNUSED_CLASSES.items():
            stand_ins[name] = _empty_module(name)
            setattr(stand_ins[name], class_name, type(class_name, (), {}))
    sys.modules.update({name: DeferredModule(name) for name in UNUSED_PARTS})
    with replaced_modules(stand_ins):
        importlib.import_module("streaming")


import_streaming()

from streaming import MDSWriter, Stream, StreamingDataLoader, StreamingDataset  # noqa: E402
from streaming.base import shared  # noqa: E402
from streaming.base.batching import generate_work  # noqa: E402
from streaming.base.compression import decompress, is_compression  # noqa: E402
from streaming.base.format.mds.encodings import mds_decode  # noqa: E402
from streaming.base.hashing import get_hash, is_hash  # noqa: E402
from streaming.base.storage import CloudDownloader  # noqa: E402
from streaming.base.util import retry  # noqa: E402
from streaming.base.world import World  # noqa: E402

__all__ = [
    "CloudDownloader",
    "MDSWriter",
    "Stream",
    "StreamingDataLoader",
    "StreamingDataset",
    "World",
    "decompress",
    "generate_work",
    "get_hash",
    "is_compression",
    "is_hash",
    "mds_decode",
    "retry",
    "shared",
]
