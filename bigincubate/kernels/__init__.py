"""Operators of this package's own: an eager reference, a Triton body for GPUs, an autograd formula
where there are gradients.

Each is a ``torch.library.triton_op``, so ``torch.compile`` sees inside and fuses around it. On a CPU the
reference runs. None has been measured on a GPU yet: what uses one is a recipe's choice, not a default.
"""

from .augment import augment
from .branch import add_branch
from .soft_targets import soft_cross_entropy

__all__ = ["add_branch", "augment", "soft_cross_entropy"]
