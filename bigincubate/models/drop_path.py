"""Stochastic depth with masks that are computed outside the model.

The masks of a step are a pure function of (seed, step), drawn for the global batch. Each rank passes the columns of its
own samples to the model. The model draws no random numbers, so the number of ranks and resuming do not change what is
dropped.

Source: Huang et al., Deep Networks with Stochastic Depth, 2016 (arXiv:1603.09382); rates as in timm.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..config.seeds import drop_path_seed
from ..errors import ConfigError
from .base import Depths
from .partition import Partition

# minimum number of samples for which a branch is computed (scale 0 if dropped): torch.compile specializes on 0 and 1
MIN_SAMPLES = 2


class DropPath(nn.Module):
    """Drop the residual branch of whole samples.

    Attributes:
        rate: Probability that a sample's branch is dropped, in [0, 1).
        active: Whether it has a scale in each step. True for all modules of a ramp, even with rate 0 (where the scale
            of 1 changes no bit), so that all compiled blocks share one graph.
        scale: Factor of each sample's branch, 0 or 1 / (1 - rate), float32 ``[batch]``; None if nothing is dropped.
            `apply_masks` sets it before each forward pass. ``forward`` does not read ``rate``, so compiled blocks of
            different rates share one graph.
        computes_subset: Whether the block computes its branch only for the samples that are kept.
        kept_samples: Indices of those samples, int64 ``[kept]``; ``scale`` then has only their factors, ``[kept]``.
            None if the branch is computed for all samples.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rate = 0.0
        self.active = self.computes_subset = False
        self.scale: Tensor | None = None
        self.kept_samples: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Scale each sample of ``x``, ``[batch, ...]``; shape and dtype stay the same."""
        if not self.training or self.scale is None:
            return x
        return x * self.scale.to(x.dtype).view(-1, *[1] * (x.dim() - 1))

    def extra_repr(self) -> str:
        """Show the rate."""
        return f"rate={self.rate:.4g}"


def replace_drop_path(block: nn.Module) -> None:
    """Replace every submodule of a block whose name starts with ``drop_path`` (as in timm) by a `DropPath`."""
    names = [name for name, _ in block.named_modules() if name.rpartition(".")[2].startswith("drop_path")]
    for name in names:
        block.set_submodule(name, DropPath())


def find_drop_paths(model: nn.Module) -> list[DropPath]:
    """Return the model's drop-path modules in order; the index in this list is the row in the masks.

    A block has one per branch, or one that keeps or drops several branches together.
    """
    return [module for module in model.modules() if isinstance(module, DropPath)]


def block_drop_path_rates(
    partition: Partition, mode: Literal["target", "hybrid"], rate: float, depths_target: Depths, module: int | None
) -> dict[str, float]:
    """Return the drop-path rate of each block by its path, without the blocks that drop nothing.

    Args:
        partition: The model's partition.
        mode: ``"target"``: the blocks of ``module`` have their rates in the target, all other blocks have rate 0.
            ``"hybrid"``: the family's rule (`ModelFamily.drop_path_rates`) over the depth of this model, including
            frozen blocks.
        rate: The rate of the last block, in [0, 1).
        depths_target: The target's depths.
        module: The module that is trained; None if the whole model is trained: both modes then use the family's rule.

    Raises:
        ConfigError: The rate is out of range.
    """
    if not 0 <= rate < 1:
        raise ConfigError(f"drop_path.rate = {rate}: it must be at least 0 and less than 1")
    if module is None or mode == "hybrid":
        return _rates_by_path(partition, rate)
    target = Partition(partition.family, depths_target)
    final = _rates_by_path(target, rate)
    return {
        block.path: final[target.block_path(module, block.stage, block.index_in_module)]
        for block in partition.blocks()
        if block.module == module
    }


def set_drop_path_rates(
    model: nn.Module,
    partition: Partition,
    mode: Literal["target", "hybrid"],
    rate: float,
    depths_target: Depths,
    module: int | None,
) -> None:
    """Set the drop-path rate of every block of a model that its family built; see `block_drop_path_rates`."""
    rates = block_drop_path_rates(partition, mode, rate, depths_target, module)
    for block in partition.blocks():
        for drop_path in find_drop_paths(model.get_submodule(block.path)):
            drop_path.rate, drop_path.active = rates.get(block.path, 0.0), rate > 0 and block.path in rates
            drop_path.scale = drop_path.kept_samples = None


def _rates_by_path(partition: Partition, rate: float) -> dict[str, float]:
    paths = [block.path for block in partition.blocks()]
    return dict(zip(paths, partition.family.drop_path_rates(rate, len(paths)), strict=True))


def draw_masks(seed: int, step: int, n: int, batch: int) -> Tensor:
    """Draw uniform numbers for ``n`` drop-path modules and a global batch: float32 ``[n, batch]`` on the CPU."""
    generator = torch.Generator().manual_seed(drop_path_seed(seed, step))
    return torch.rand(n, batch, generator=generator)


def apply_masks(model: nn.Module, uniform: Tensor) -> None:
    """Set the scale of every drop-path module for the next forward pass.

    Args:
        model: A model with `DropPath` modules.
        uniform: The columns of `draw_masks` for the samples of this micro-batch, ``[n, micro_batch]``.
    """
    modules = find_drop_paths(model)
    keep = 1 - torch.tensor([module.rate for module in modules]).unsqueeze(1)
    device = next(model.parameters()).device
    kept = uniform < keep
    scales, order = kept / keep, None
    if any(module.computes_subset for module in modules):  # on the CPU, so that the counts need no synchronization
        order = kept.byte().argsort(dim=1, descending=True, stable=True)
        counts = kept.sum(1).clamp(min=min(MIN_SAMPLES, kept.shape[1])).tolist()
        packed, order = scales.gather(1, order).to(device, non_blocking=True), order.to(device, non_blocking=True)
    scales = scales.to(device, non_blocking=True)
    for index, module in enumerate(modules):
        module.scale = module.kept_samples = None
        if module.active and module.computes_subset and order is not None:
            module.scale, module.kept_samples = packed[index, : counts[index]], order[index, : counts[index]]
            for tensor in (module.scale, module.kept_samples):  # one compiled graph for any number of samples
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        elif module.active:
            module.scale = scales[index]
