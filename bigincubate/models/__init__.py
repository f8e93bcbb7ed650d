"""Models: which timm families are supported, how they are cut into modules, and how tensors move between depths."""

from .activation_checkpointing import checkpoint_activations
from .compilation import compile_blocks
from .drop_path import DropPath, apply_masks, draw_masks, drop_paths, set_rates
from .partition import (
    BlockRef,
    Depths,
    Partition,
    balanced_cut,
    check_depths,
    default_meta,
    hybrid_depths,
    normalise_depths,
)
from .surgery import assemble, extract, fit_positions, freeze, initialise, insert, rename
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
    "balanced_cut",
    "block_costs",
    "build",
    "check_depths",
    "checkpoint_activations",
    "choose_attention",
    "compile_blocks",
    "default_depths",
    "default_meta",
    "draw_masks",
    "drop_paths",
    "extract",
    "family_of",
    "fit_positions",
    "freeze",
    "hybrid_depths",
    "initialise",
    "insert",
    "normalise_depths",
    "rename",
    "set_rates",
    "skip_unused",
]
