"""Recipes: one experiment as typed, validated data.

A recipe is a TOML file. Values are read in the order **defaults < recipe < --set**, and the tables of a phase
(``[incubate.train]``) override the common ones (``[train]``). Every key is either an *identity* key, which says what is
computed (two runs that differ in one are different experiments), or an *execution* key, which says where and how it is
computed (sharding, workers, micro-batch, logging). Digests, refusals and lineage use identity keys only.
"""

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
from .slurm import SlurmJob

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
