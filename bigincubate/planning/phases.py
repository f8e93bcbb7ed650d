"""The phases of a recipe, each described by one row of data.

==================== ============================= ======================= ===========
phase                depths of the model           initial weights         trainable
==================== ============================= ======================= ===========
``pretrain``         meta                          fresh, or `meta.init`   all
``incubate`` k       meta, module k at target      meta, module k by init  module k
``finetune``         target                        modules; not incubated: all
                                                   meta model, by init; or
                                                   `finetune.init`
``end_to_end``       target                        fresh, by init          all
==================== ============================= ======================= ===========
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import nn

from ..config import PHASES, ModelConfig, ModelInit, Phase, Recipe, Settings
from ..config.objects import load_object
from ..config.seeds import phase_key
from ..errors import ConfigError
from ..models.base import Depths, ModelFamily
from ..models.checks import check_model
from ..models.initialization import initialize_model
from ..models.library import find_family
from ..models.partition import Partition, check_depths, default_meta_depths, find_balanced_cut, normalize_depths
from ..models.surgery import Boundary, freeze_other_modules
from ..optim.optimizer import counts_steps_together
from ..tasks.registry import make_task

Source = Literal["fresh", "meta", "module", "expand", "finished"]


@dataclass(frozen=True)
class Slot:
    """One module of a phase's model: its number of blocks per stage, and the source of its initial weights.

    ``expand`` means its counterpart in the meta model, from which ``expand.init`` makes a module of the target;
    ``finished``, a module of the finished model ``finetune.init``.
    """

    depths: tuple[int, ...]
    source: Source


@dataclass(frozen=True)
class PhasePlan:
    """One row of the table above.

    Attributes:
        phase: The phase.
        module: The module that is trained; None if all are.
        slots: The modules.
        init: How the new random weights are changed before any others are inserted.
        boundary: Whether the stem and the tail of a hybrid are trained or those of the meta model.
    """

    phase: Phase
    module: int | None
    slots: tuple[Slot, ...]
    init: ModelInit = "plain"
    boundary: Boundary = "own"

    @property
    def key(self) -> str:
        """The name of the phase, with the index of the trained module if there is one, such as ``incubate/3``."""
        return phase_key(self.phase, self.module)

    @property
    def title(self) -> str:
        """The name of the phase in tables and messages."""
        titles = {"pretrain": "meta model", "finetune": "fine-tuning", "end_to_end": "end to end"}
        return titles.get(self.phase) or f"module {self.module}"

    @property
    def depths(self) -> Depths:
        """The depths of the model that the phase trains."""
        return tuple(slot.depths for slot in self.slots)

    @property
    def is_assembled(self) -> bool:
        """Whether the phase starts from a model of several parts, which is evaluated before it is trained."""
        return not {slot.source for slot in self.slots}.isdisjoint({"module", "expand"})


@dataclass(frozen=True)
class Plan:
    """How a recipe's model is divided into modules, and the phases that follow from it.

    Attributes:
        family: The family of the model.
        target: Depths of the target.
        meta: Depths of the meta model.
        expanded: Modules that are not incubated, which fine-tuning makes from the meta model.
        baseline_init: How the end-to-end baseline is initialized.
        boundary: Whether the stem and the tail are trained with their modules or are those of the meta model.
        finished: The finished model that is fine-tuned; None: fine-tuning starts from the modules. If it is set, there
            are no phases before fine-tuning.
    """

    family: ModelFamily
    target: Depths
    meta: Depths
    expanded: frozenset[int] = frozenset()
    baseline_init: ModelInit = "plain"
    boundary: Boundary = "own"
    finished: str | None = None

    @property
    def modules(self) -> int:
        """The number of modules."""
        return len(self.target)

    @property
    def incubated(self) -> list[int]:
        """The modules that are incubated."""
        return [] if self.finished else [module for module in range(self.modules) if module not in self.expanded]

    def row(self, phase: Phase, module: int | None = None) -> PhasePlan:
        """Return a phase.

        Raises:
            ConfigError: ``incubate`` without the index of an incubated module, or another phase with a module index; or
                the plan has no such phase, because a finished model is fine-tuned.
        """
        if self.finished and phase in ("pretrain", "incubate"):
            raise ConfigError(
                f"--phase {phase}: finetune.init = {self.finished!r} is a finished model, so there is no meta model and"
                " no module; use --phase finetune"
            )
        if phase == "incubate":
            if module is None or not 0 <= module < self.modules:
                raise ConfigError(f"--phase incubate needs --module 0 to {self.modules - 1}, or auto (given: {module})")
            if module in self.expanded:
                listed = ", ".join(map(str, self.incubated)) or "no module"
                raise ConfigError(f"--module {module} is not incubated: plan.incubate lists {listed}")
            meta = self._meta_slots
            slots = (*meta[:module], Slot(self.target[module], "fresh"), *meta[module + 1 :])
            return PhasePlan(phase, module, slots, boundary=self.boundary)
        if module is not None:
            raise ConfigError(f"--module {module} is only for --phase incubate, not for {phase}; remove it")
        sources: list[Source] = ["fresh"] * self.modules
        if phase == "finetune":
            sources = ["expand" if k in self.expanded else "module" for k in range(self.modules)]
            sources = ["finished"] * self.modules if self.finished else sources
        slots = tuple(map(Slot, self.meta if phase == "pretrain" else self.target, sources))
        return PhasePlan(phase, module, slots, self.baseline_init if phase == "end_to_end" else "plain")

    @cached_property
    def _meta_slots(self) -> tuple[Slot, ...]:
        """Return the slots that the K hybrids share, which have K slots each."""
        return tuple(Slot(depths, "meta") for depths in self.meta)

    def partial(self, joined: Collection[int]) -> PhasePlan:
        """Return a row for evaluation only: the incubated modules ``joined``, and meta modules in the other places."""
        slots = (
            Slot(self.target[k], "module") if k in joined else Slot(self.meta[k], "meta") for k in range(self.modules)
        )
        return PhasePlan("incubate", None, tuple(slots))

    def rows(self) -> list[PhasePlan]:
        """Return all phases, each after the phases that it depends on."""
        meta = [] if self.finished else [self.row("pretrain")]
        modules = [self.row("incubate", module) for module in self.incubated]
        return [*meta, *modules, self.row("finetune"), self.row("end_to_end")]


def make_plan(recipe: Recipe) -> Plan:
    """Divide the recipe's model into modules, and check the settings of every phase.

    Loads every ``package.module:attribute`` of the settings, so that errors appear before training.

    Raises:
        ConfigError: The model is not supported, the depths do not fit it, or a name cannot be loaded.
    """
    model, config = recipe.model, recipe.plan
    family = find_family(model)
    own = family.default_depths(model)
    if config.target_depths is not None:
        target = normalize_depths(config.target_depths, family.stages, "plan.target_depths")
    else:
        assert config.modules is not None
        if config.modules > sum(own):
            raise ConfigError(
                f"plan.modules = {config.modules}, but {model.name} has only {sum(own)} blocks; use fewer modules"
            )
        target = find_balanced_cut(family.count_block_flops(model, own), config.modules, family.parity)
    if config.meta_depths is not None:
        meta = normalize_depths(config.meta_depths, family.stages, "plan.meta_depths")
    else:
        meta = default_meta_depths(target, family.parity)
    family.check_target(model, target)
    check_depths(family, target, meta)
    checked: list[ModelConfig] = []
    for phase in PHASES:
        settings = recipe.settings(phase)
        for key in ("library", "name"):
            if getattr(settings.model, key) != getattr(model, key):
                raise ConfigError(f"{phase}.model.{key} differs from model.{key}: a phase cannot change it; remove it")
        make_task(settings, recipe.data)
        if settings.model not in checked:
            family.check_input_size(settings.model)
            checked.append(settings.model)
        if ":" in (name := settings.optim.lr_scaling):
            load_object(name, key="optim.lr_scaling")
    expanded = frozenset(range(len(target))).difference(config.incubated)
    kept, grown = recipe.expand.optimizer == "kept", recipe.expand.init != "fresh"
    if expanded and kept and grown and recipe.finetune.init is None:
        _check_kept_optimizer(recipe, "expand.optimizer", "pretrain", "finetune")
    if config.incubated and recipe.incubate.optimizer == "kept" and recipe.finetune.init is None:
        if recipe.incubate.init != "fresh":
            _check_kept_optimizer(recipe, "incubate.optimizer", "pretrain", "incubate")
        if recipe.incubate.boundary == "meta":  # fine-tuning has the boundary's state from the meta model
            _check_kept_optimizer(recipe, "incubate.optimizer", "pretrain", "finetune")
        _check_kept_optimizer(recipe, "incubate.optimizer", "incubate", "finetune")
    start, boundary = recipe.end_to_end.init, recipe.incubate.boundary
    return Plan(family, target, meta, expanded, start, boundary, recipe.finetune.init)


def _check_kept_optimizer(recipe: Recipe, key: str, source: Phase, phase: Phase) -> None:
    """Check that a phase can start with the optimizer state of another phase.

    Args:
        recipe: The recipe.
        key: The key that asks for it.
        source: The phase that the state comes from.
        phase: The phase that starts with it.

    Raises:
        ConfigError: It cannot: the optimizers differ, or the steps of new and of copied tensors cannot be counted
            separately.
    """
    before, settings = recipe.settings(source), recipe.settings(phase)
    kept, instead = f'{key} = "kept"', f'or {key} = "fresh"'
    name, strategy = settings.optim.name, settings.sharding.strategy
    if before.optim.name != name:
        raise ConfigError(
            f"{kept}: {phase}.optim.name = {name!r}, but {source}.optim.name = {before.optim.name!r}; use the same,"
            f" {instead}"
        )
    if strategy.startswith("zero"):
        raise ConfigError(
            f"{kept}: DeepSpeed counts the steps of all tensors together, but not all have as many; use"
            f' {phase}.sharding.strategy = "ddp", "fsdp2" or "oss" (given: "{strategy}"), {instead}'
        )
    if counts_steps_together(settings):
        raise ConfigError(
            f"{kept}: {name} counts the steps of all tensors together, but not all have as many; use another"
            f' optim.name, such as "adamw", {instead}'
        )


def phase_model(row: PhasePlan, settings: Settings, family: ModelFamily, *, device: str = "cpu") -> nn.Module:
    """Build a phase's model with new random weights, and freeze the modules that the phase does not train.

    Raises:
        ConfigError: The model cannot be built or initialized, or its modules cannot be trained separately.
    """
    model = family.build(settings.model, row.depths, device=device)
    partition = Partition(family, row.depths)
    check_model(model, partition)
    initialize_model(model, partition, row.init)
    freeze_other_modules(model, partition, row.module, row.boundary)
    if settings.train.subset_drop_path:
        family.use_subset_drop_path(model, partition)
    if settings.train.last_block_cls_only:
        family.compute_last_block_for_cls_token_only(model, partition)
    return model
