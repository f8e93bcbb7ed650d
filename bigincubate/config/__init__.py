"""Recipes: one experiment as typed, validated data.

A recipe is a TOML file. Values are read in the order **defaults < recipe < --set**, and the tables of a phase
(``[incubate.train]``) override the common ones (``[train]``). Every key is either an *identity* key, which says what is
computed (two runs that differ in one are different experiments), or an *execution* key, which says where and how it is
computed (sharding, workers, micro-batch, logging). The identity of a phase depends on identity keys only.
"""

from .keys import RecipeKey, format_recipe_keys, list_recipe_keys
from .reading import list_shipped_recipes, load_recipe
from .recipe import Recipe, describe_changes, differences, is_execution
from .sections import (
    PHASES,
    AugmentConfig,
    DataConfig,
    Fsdp2Config,
    MetaConfig,
    MixupConfig,
    ModelConfig,
    OptimConfig,
    Phase,
    ScheduleConfig,
    Settings,
    ShardingConfig,
    TaskConfig,
    TrainConfig,
)
from .slurm import SlurmJobConfig
