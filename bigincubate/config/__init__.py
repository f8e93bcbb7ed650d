"""Recipes: one experiment as typed, validated data.

A recipe is a TOML file. Values are taken in the order **defaults < recipe < --set**, and a phase's own sections
(``[incubate.train]``) come over the common ones (``[train]``). Every key is either *identity* (what is computed:
two runs that differ in one are different experiments) or *execution* (where and how it is computed: sharding,
workers, micro-batch, logging). Digests, refusals and lineage look at identity keys only.
"""

from .jobs import SlurmJob
from .reading import load_recipe, shipped
from .recipe import Recipe, differences, is_execution
from .sections import (
    PHASES,
    Augment,
    Data,
    Fsdp2,
    Meta,
    Mixup,
    Model,
    Optim,
    Phase,
    Schedule,
    Settings,
    Sharding,
    Train,
)

__all__ = [
    "PHASES",
    "Augment",
    "Data",
    "Fsdp2",
    "Meta",
    "Mixup",
    "Model",
    "Optim",
    "Phase",
    "Recipe",
    "Schedule",
    "Settings",
    "Sharding",
    "SlurmJob",
    "Train",
    "differences",
    "is_execution",
    "load_recipe",
    "shipped",
]
