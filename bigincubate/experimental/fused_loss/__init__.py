"""Cross entropy of mixed targets in one pass over the logits."""

from .operator import soft_cross_entropy

__all__ = ["soft_cross_entropy"]
