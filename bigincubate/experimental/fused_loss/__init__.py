"""Cross entropy of mixed targets in one pass over the logits.

Switched on by ``loss.name = "bigincubate.experimental.fused_loss:soft_cross_entropy_loss"``.
"""

from .operator import soft_cross_entropy, soft_cross_entropy_loss

__all__ = ["soft_cross_entropy", "soft_cross_entropy_loss"]
