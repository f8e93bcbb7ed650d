"""Models: which timm families are supported, how they are cut into modules, and how tensors move between depths."""

from .activation_checkpointing import checkpoint_activations
from .compilation import compile_blocks
from .drop_path import DropPath, apply_masks, draw_masks, find_drop_paths, set_drop_path_rates
from .partition import (
    BlockRef,
    Depths,
    Partition,
    check_depths,
    default_meta_depths,
    find_balanced_cut,
    hybrid_depths,
    normalize_depths,
)
from .surgery import assemble, extract, fit_positions, freeze_other_modules, initialize, insert, rename_tensors
from .vision.attention import choose_attention
from .vision.build import block_costs, build, default_depths
from .vision.families import FAMILIES, Family, family_of
from .vision.subset_drop_path import skip_unused

__all__ = [
    "FAMILIES",
    "BlockRef",
    "Depths",
    "DropPath",
    "Family",
    "Partition",
    "apply_masks",
    "assemble",
    "block_costs",
    "build",
    "check_depths",
    "checkpoint_activations",
    "choose_attention",
    "compile_blocks",
    "default_depths",
    "default_meta_depths",
    "draw_masks",
    "extract",
    "family_of",
    "find_balanced_cut",
    "find_drop_paths",
    "fit_positions",
    "freeze_other_modules",
    "hybrid_depths",
    "initialize",
    "insert",
    "normalize_depths",
    "rename_tensors",
    "set_drop_path_rates",
    "skip_unused",
]
