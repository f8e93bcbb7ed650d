"""Recipes: the configuration of an experiment, with types and validation.

A recipe is a TOML file. Its values override defaults, ``--set`` overrides the recipe, and the tables of a phase
(``[incubate.train]``) override the common ones (``[train]``). Every key is either an *identity* key, which determines
what is computed (runs that differ in one are different experiments), or an *execution* key, which determines where and
how it is computed (sharding, workers, micro-batch, logging). The identity of a phase depends only on identity keys.
"""

from .keys import RecipeKey, format_recipe_keys, list_recipe_keys
from .modules import MetaConfig
from .reading import list_shipped_recipes, load_recipe
from .recipe import Recipe, describe_changes, differences, is_execution
from .sections import (
    PHASES,
    AugmentConfig,
    DataConfig,
    Fsdp2Config,
    MixupConfig,
    ModelConfig,
    ModelInit,
    OptimConfig,
    Phase,
    ScheduleConfig,
    Settings,
    ShardingConfig,
    TaskConfig,
    TrackerName,
    TrainConfig,
)
from .slurm import SlurmJobConfig
