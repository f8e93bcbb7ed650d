"""Stochastic depth whose randomness comes from outside.

The masks of a step are a pure function of (seed, step), drawn for the global batch; a rank cuts out its positions and
hands them to the model. So nothing random lives in a module, and neither ranks nor resumes change what is dropped.

Source: Huang et al., Deep Networks with Stochastic Depth, 2016 (arXiv:1603.09382); rates as in timm.
"""

from __future__ import annotations

from typing import Literal

import torch
from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn

from ..errors import ConfigError
from ..seeds import drop_path_seed
from .partition import Depths, Partition

FEWEST = 2  # samples that a branch is computed for, dropped ones among them (scale 0): compilers take 0 and 1 apart


class DropPath(nn.Module):
    """Drops the residual branch of whole samples.

    Attributes:
        rate: probability that a sample's branch is dropped, in [0, 1).
        active: whether it has a scale in each step: all of a ramp do, where its rate is 0 too (there it is 1 for every
            sample, and changes no bit), so that compiled blocks of a ramp share one graph.
        scale: what each sample's branch is multiplied with, 0 or 1 / (1 - rate), float32 ``[batch]``; None: nothing is
            dropped. `apply_masks` sets it before each forward. ``forward`` reads nothing but this tensor, so compiled
            blocks of different rates share one graph.
        computes_subset: whether the block computes its branch for the samples that are kept alone (`skip_unused`).
        kept_samples: those samples, int64 ``[kept]``; ``scale`` is then theirs, ``[kept]``. None: of all samples.
    """

    rate: float
    active: bool
    scale: Tensor | None
    kept_samples: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.rate = 0.0
        self.active = self.computes_subset = False
        self.scale = self.kept_samples = None

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, ...]`` to the same shape and dtype."""
        if not self.training or self.scale is None:
            return x
        return x * self.scale.to(x.dtype).view(-1, *[1] * (x.dim() - 1))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.4g}"


def replace_drop_path(block: nn.Module) -> None:
    """Put a `DropPath` in the place of everything that timm calls ``drop_path...`` inside a block."""
    names = [name for name, _ in block.named_modules() if name.rpartition(".")[2].startswith("drop_path")]
    for name in names:
        block.set_submodule(name, DropPath())


def find_drop_paths(model: nn.Module) -> list[DropPath]:
    """The model's drop-path modules in order; the place in this list is the row in the masks.

    A ViT or Swin block has two, a ConvNeXt block one. A mixer block has one that serves both of its branches: they are
    kept or dropped together, where timm draws for each.
    """
    return [module for module in model.modules() if isinstance(module, DropPath)]


def set_drop_path_rates(
    model: nn.Module,
    partition: Partition,
    mode: Literal["target", "hybrid"],
    rate: float,
    depths_target: Depths,
    module: int | None,
) -> None:
    """Give every block its drop-path rate.

    Args:
        model: a model of this package's `build`.
        partition: the model's own partition.
        mode: ``"target"``: the blocks of ``module`` have the rate that they will have in the target, all others none.
            ``"hybrid"``: timm's rule over the model's own depth, frozen blocks included.
        rate: the rate of the last block, in [0, 1). timm's rule is a linear ramp from 0, over the blocks of all stages;
            in the mixer family it is this one rate for every block.
        depths_target: the target's depths.
        module: the module that trains; None where the whole model does: then both modes are timm's rule.

    Raises:
        ConfigError: the rate is out of range.
    """
    if not 0 <= rate < 1:
        raise ConfigError(f"drop_path.rate = {rate}: it must be at least 0 and less than 1")
    if module is None or mode == "hybrid":
        rates = _timm_rates(partition, rate)
    else:
        target = Partition(partition.family, depths_target)
        final = _timm_rates(target, rate)
        rates = {
            block.path: final[target.block_path(module, block.stage, block.index_in_module)]
            for block in partition.blocks()
            if block.module == module
        }
    for block in partition.blocks():
        for drop_path in find_drop_paths(model.get_submodule(block.path)):
            drop_path.rate, drop_path.active = rates.get(block.path, 0.0), rate > 0 and block.path in rates
            drop_path.scale = drop_path.kept_samples = None


def _timm_rates(partition: Partition, rate: float) -> dict[str, float]:
    paths = [block.path for block in partition.blocks()]
    ramp = calculate_drop_path_rates(rate, len(paths)) if partition.family.drop_path_ramp else [rate] * len(paths)
    return dict(zip(paths, ramp, strict=True))


def draw_masks(seed: int, step: int, n: int, batch: int) -> Tensor:
    """Uniform numbers in [0, 1) for ``n`` drop-path modules and a global batch: float32 ``[n, batch]`` on the CPU."""
    generator = torch.Generator().manual_seed(drop_path_seed(seed, step))
    return torch.rand(n, batch, generator=generator)


def apply_masks(model: nn.Module, uniform: Tensor) -> None:
    """Set the scale of every drop-path module for the next forward.

    Args:
        uniform: ``[n, micro_batch]``, the columns of `draw_masks` for the samples of this micro-batch.
    """
    modules = find_drop_paths(model)
    keep = 1 - torch.tensor([module.rate for module in modules]).unsqueeze(1)
    device = next(model.parameters()).device
    alive = uniform < keep
    scales, order = alive / keep, None
    if any(module.computes_subset for module in modules):  # on the host, so that the device need not be asked how many
        order = alive.byte().argsort(dim=1, descending=True, stable=True)
        counts = alive.sum(1).clamp(min=min(FEWEST, alive.shape[1])).tolist()
        packed, order = scales.gather(1, order).to(device, non_blocking=True), order.to(device, non_blocking=True)
    scales = scales.to(device, non_blocking=True)
    for index, module in enumerate(modules):
        module.scale = module.kept_samples = None
        if module.active and module.computes_subset and order is not None:
            module.scale, module.kept_samples = packed[index, : counts[index]], order[index, : counts[index]]
            for tensor in (module.scale, module.kept_samples):  # one compiled graph for any number
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        elif module.active:
            module.scale = scales[index]
