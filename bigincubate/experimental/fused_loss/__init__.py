"""Compute the cross entropy with mixed targets in one pass over the logits.

Enabled by ``loss.name = "bigincubate.experimental.fused_loss:soft_cross_entropy_loss"``.
"""

from .operator import soft_cross_entropy, soft_cross_entropy_loss

__all__ = ["soft_cross_entropy", "soft_cross_entropy_loss"]
