"""Models: how they are cut into modules, and how tensors move between depths. Families of timm are in `vision`."""

from .activation_checkpointing import checkpoint_activations
from .base import Depths, ModelFamily, explain_argument_errors
from .checks import check_model
from .compilation import compile_blocks
from .drop_path import DropPath, apply_masks, draw_masks, find_drop_paths, replace_drop_path, set_drop_path_rates
from .library import find_family
from .partition import (
    BlockRef,
    Partition,
    check_depths,
    default_meta_depths,
    find_balanced_cut,
    hybrid_depths,
    normalize_depths,
)
from .surgery import assemble, extract, freeze_other_modules, initialize, insert, rename_tensors

__all__ = [
    "BlockRef",
    "Depths",
    "DropPath",
    "ModelFamily",
    "Partition",
    "apply_masks",
    "assemble",
    "check_depths",
    "check_model",
    "checkpoint_activations",
    "compile_blocks",
    "default_meta_depths",
    "draw_masks",
    "explain_argument_errors",
    "extract",
    "find_balanced_cut",
    "find_drop_paths",
    "find_family",
    "freeze_other_modules",
    "hybrid_depths",
    "initialize",
    "insert",
    "normalize_depths",
    "rename_tensors",
    "replace_drop_path",
    "set_drop_path_rates",
]
