"""Vision models of timm: which families are supported, and how they are built."""

from .attention import choose_attention
from .build import TimmFamily
from .families import FAMILIES, find_timm_family
from .position_embeddings import resample_position_embeddings
from .subset_drop_path import compute_last_block_for_cls_token_only, use_subset_drop_path

__all__ = [
    "FAMILIES",
    "TimmFamily",
    "choose_attention",
    "compute_last_block_for_cls_token_only",
    "find_timm_family",
    "resample_position_embeddings",
    "use_subset_drop_path",
]
