"""The tables of a recipe about the modules: how the model is divided, and the meta model that they are trained in."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from .tables import ConfigTable, Count, Depth, Pretrained, StageDepths


def _check_incubated(modules: Any) -> Any:
    """Return which modules are incubated. Every other value has the same message, whatever its type."""
    numbers = isinstance(modules, list) and all(type(module) is int for module in modules)
    if modules not in ("all", "none") and not (numbers and _is_ascending(modules)):
        raise ValueError('expected "all", "none", or numbers of modules in ascending order, counted from 0: [1, 3]')
    return modules


class PlanConfig(ConfigTable):
    """How the target model is divided into modules."""

    modules: Count | None = None
    """Number of modules K. Without `target_depths`, the model is divided so that the FLOPs of modules are balanced."""
    target_depths: StageDepths | None = None
    """Number of blocks of each module of the target model: one number per module, or one list per module with one
    number per stage. Unit: blocks."""
    meta_depths: StageDepths | None = None
    """Number of blocks of each module of the meta model, in the same form. None: the smallest possible numbers.
    Unit: blocks."""
    incubate: Annotated[Literal["all", "none"] | list[Depth], BeforeValidator(_check_incubated)] = "all"
    """Modules that are incubated: `"all"`, `"none"` (depth expansion), or a list of their numbers, counted from 0.
    Fine-tuning starts with the others as `expand.init` makes them from the meta model."""

    @property
    def number(self) -> int:
        """Return the number of modules."""
        return self.modules or len(self.target_depths or ())

    @property
    def incubated(self) -> Sequence[int]:
        """Return the numbers of the modules that are incubated."""
        if isinstance(self.incubate, list):
            return self.incubate
        return range(self.number if self.incubate == "all" else 0)  # no list: the number has not been checked yet

    @model_validator(mode="after")
    def _consistent(self) -> PlanConfig:
        if self.target_depths is None and self.meta_depths is not None:
            raise ValueError("meta_depths is set without target_depths; set both")
        if self.modules and self.target_depths and self.modules != len(self.target_depths):
            raise ValueError(f"modules = {self.modules}, but target_depths lists {len(self.target_depths)}")
        if not self.modules and not self.target_depths:
            raise ValueError("set target_depths, or modules for balanced FLOPs")
        if self.incubated and self.incubated[-1] >= self.number:
            raise ValueError(f"incubate lists module {self.incubated[-1]}, but the modules are 0 to {self.number - 1}")
        return self


class MetaConfig(ConfigTable):
    """Initial weights of the meta model, which the phase ``pretrain`` then trains."""

    init: Pretrained | None = None
    """Pretrained weights of the meta model: `"timm:NAME"`, which timm may download, or the path of a run, an export,
    a .safetensors file or a .pth file. For a language model: `"transformers:NAME"` of a hub, or the path of a run, an
    export or a folder that transformers wrote. None: random weights."""
    select: str | list[int] | list[list[int]] | None = None
    """Indices of the blocks to take from `meta.init` (one list per stage if there are several). `"even"` or None:
    the first and the last block and evenly spaced blocks between them."""

    @model_validator(mode="after")
    def _consistent(self) -> MetaConfig:
        if self.select is not None and self.init is None:
            raise ValueError("select chooses blocks of init, which is not set; set init too")
        if self.select not in (None, "even") and not _is_ascending(self.select):
            raise ValueError(f'select is "even", or strictly ascending block indices (given: {self.select!r})')
        return self


def _is_ascending(select: Any) -> bool:
    """Return whether these are strictly ascending block indices, or one list of them per stage."""
    if not isinstance(select, list) or not select:
        return False
    if isinstance(select[0], list):
        return all(map(_is_ascending, select))
    return select[0] >= 0 and all(before < after for before, after in pairwise(select))


class ExpandConfig(ConfigTable):
    """The modules that are not incubated, because ``plan.incubate`` does not list them."""

    init: Literal["fresh", "boundary", "grow", "stack", "g_stack"] = "grow"
    """Weights with which a module that is not incubated enters fine-tuning: as for `incubate.init`, or g_stack (all
    blocks of the meta model, repeated in their order across modules, as in G_stack, arXiv 2405.15319)."""
    schedule: Literal["own", "continue"] = "own"
    """Learning rate of fine-tuning, if `plan.incubate` omits modules: own (a schedule over the steps of fine-tuning,
    which warms up again if it has a warm-up, and otherwise begins at the peak) or continue (one schedule over the steps
    of the meta model and of fine-tuning). For the latter, both phases must have the same peak, warm-up and
    `schedule`."""
    optimizer: Literal["fresh", "kept"] = "fresh"
    """Optimizer state with which fine-tuning starts, if `plan.incubate` omits modules: fresh (none) or kept (each
    tensor that is copied from the meta model has the state of the last checkpoint there). `"kept"` is refused for
    DeepSpeed's ZeRO, and for optimizers that count the steps of all tensors together (lamb)."""
