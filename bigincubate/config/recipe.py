"""The complete recipe: settings of each phase, identity keys, and differences between two recipes."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from . import modules, sections
from .schema import iterate_fields
from .sections import Phase, PhaseConfig, Settings
from .slurm import SlurmConfig
from .tables import execution_field


class Recipe(Settings):
    """Configuration of an experiment: common settings and overrides of each phase, which :meth:`settings` merges."""

    name: str = execution_field("experiment", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the experiment, shown in tables and messages."""
    description: str = execution_field("")
    """Description of the experiment."""
    data: sections.DataConfig = sections.DataConfig()
    plan: modules.PlanConfig
    meta: modules.MetaConfig = modules.MetaConfig()
    pretrain: sections.PretrainConfig = sections.PretrainConfig()
    incubate: sections.IncubateConfig = sections.IncubateConfig()
    expand: modules.ExpandConfig = modules.ExpandConfig()
    finetune: sections.FinetuneConfig = sections.FinetuneConfig()
    end_to_end: sections.EndToEndConfig = sections.EndToEndConfig()
    log: sections.LogConfig = sections.LogConfig()
    checkpoint: sections.CheckpointConfig = sections.CheckpointConfig()
    slurm: SlurmConfig = SlurmConfig()

    @property
    def incubated(self) -> Sequence[int]:
        """Return the numbers of the modules that are incubated; none if fine-tuning starts from a finished model."""
        return () if self.finetune.init else self.plan.incubated

    def phase_overrides(self, phase: Phase) -> PhaseConfig:
        """Return the settings that a phase overrides."""
        overrides: PhaseConfig = getattr(self, phase)
        return overrides

    def settings(self, phase: Phase) -> Settings:
        """Return the settings of a phase: the common values, overridden by those of the phase."""
        own = self.phase_overrides(phase)
        tables: dict[str, Any] = {}
        for key in Settings.model_fields:
            common = getattr(self, key)
            tables[key] = type(common).model_validate(merge(common.model_dump(), getattr(own, key)))
        return Settings(**tables)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Return the identity keys with dots: ``{"train.lr": 0.001, "incubate.train.epochs": 26, …}``."""
        return self.values_of(execution=False)

    def values_of(self, *, execution: bool) -> dict[str, Any]:
        """Return the values of all execution keys, or of all identity keys, by dotted key."""
        return {key: value for key, value in self.flat().items() if is_execution(key) == execution}

    def toml(self) -> str:
        """Return the recipe as TOML, including defaults."""
        import tomli_w

        return tomli_w.dumps(self.model_dump(exclude_none=True))


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the values of ``over``, merged table by table. Neither is changed."""
    out = copy.deepcopy(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else copy.deepcopy(value)
    return out


def is_execution(key: str) -> bool:
    """Return whether a dotted key is an execution key: it determines where or how to compute, not what."""
    return any(
        isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("execution"))
        for field in iterate_fields(Recipe, key)
    )


def differences(old: Recipe, new: Recipe, *, execution_keys: bool = False) -> list[str]:
    """Return one line per key whose value differs, such as ``train.lr: 0.001 -> 0.002``.

    Args:
        old: A recipe.
        new: Another recipe.
        execution_keys: Whether to compare execution keys instead of identity keys.
    """
    return describe_changes(old.values_of(execution=execution_keys), new.values_of(execution=execution_keys))


def describe_changes(before: Mapping[str, Any], after: Mapping[str, Any], *, absent: Any = None) -> list[str]:
    """Return one line per key whose value differs, such as ``train.lr: 0.001 -> 0.002``.

    Args:
        before: Values by key.
        after: Other values by key.
        absent: The value for a key that one of them does not have.
    """
    return [
        f"{key}: {json.dumps(before.get(key, absent))} -> {json.dumps(after.get(key, absent))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
