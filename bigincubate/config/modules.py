"""The tables of a recipe about the modules: how the model is divided, and the meta model that they are trained in."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any

from pydantic import model_validator

from .schema import PathMark
from .tables import ConfigTable, Count, StageDepths


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

    @property
    def number(self) -> int:
        """Return the number of modules."""
        return self.modules or len(self.target_depths or ())

    @model_validator(mode="after")
    def _consistent(self) -> PlanConfig:
        if self.target_depths is None and self.meta_depths is not None:
            raise ValueError("meta_depths is set without target_depths; set both")
        if self.modules and self.target_depths and self.modules != len(self.target_depths):
            raise ValueError(f"modules = {self.modules}, but target_depths lists {len(self.target_depths)}")
        if not self.modules and not self.target_depths:
            raise ValueError("set target_depths, or modules for balanced FLOPs")
        return self


class MetaConfig(ConfigTable):
    """Initial weights of the meta model, which the phase ``pretrain`` then trains."""

    init: Annotated[str, PathMark(unless="timm:.*")] | None = None
    """Pretrained weights of the meta model: `"timm:NAME"`, which timm may download, or the path of a run, an export,
    a .safetensors file or a .pth file. None: random weights."""
    select: str | list[int] | list[list[int]] | None = None
    """Indices of the blocks to take from `meta.init` (one list per stage if there are several). `"even"` or None:
    the first and the last block and evenly spaced blocks between them."""

    @model_validator(mode="after")
    def _consistent(self) -> MetaConfig:
        if self.init in ("", "timm:"):
            raise ValueError('init is a path, or "timm:" with the name of a model')
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
