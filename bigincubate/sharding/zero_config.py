"""Build the DeepSpeed configuration from a JSON file and the recipe.

Batch size, accumulation, clipping, precision, optimizer and schedule come from the recipe. The file may repeat these
values; different values are an error, because DeepSpeed would silently use them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import Settings, ShardingConfig
from ..config.resources import resource_folder
from ..errors import ConfigError

# keys with only one allowed value, and the reason; other values give wrong results or are untested
FIXED = {
    "bf16.enabled": (False, "it would turn frozen parameters into bf16; use train.precision"),
    "fp16.enabled": (False, "it would turn frozen parameters into fp16; use train.precision"),
    "amp.enabled": (False, "use train.precision"),
    "optimizer": (None, "the optimizer is set by [optim] in the recipe"),
    "scheduler": (None, "the schedule is set by [schedule] in the recipe"),
    "communication_data_type": ("fp32", "gradients are reduced in fp32"),
    "data_types.grad_accum_dtype": ("fp32", "gradients are accumulated in fp32"),
    "managed_gradient_accumulation": (True, "the trainer accumulates gradients"),
    "zero_optimization.offload_optimizer.nvme_path": (None, "only offloading to host memory is supported"),
    "zero_optimization.offload_param.nvme_path": (None, "only offloading to host memory is supported"),
    "zero_optimization.zero_hpz_partition_size": (1, "parameters are sharded over all ranks"),
    "zero_optimization.mics_shard_size": (-1, "parameters are sharded over all ranks"),
    "zero_optimization.zero_quantized_weights": (False, "weights are gathered without quantization"),
    "zero_optimization.zero_quantized_gradients": (False, "gradients are reduced in fp32"),
    "zero_optimization.zenflow": (None, "it delays updates"),
    "zero_optimization.compute_grad_norm": (True, "a step is skipped if the norm is not finite"),
}


def deepspeed_config(settings: Settings, *, world: int, micro_batches: int) -> dict[str, Any]:
    """Return the configuration for ``deepspeed.initialize``.

    It always has one micro-batch per step, because the trainer accumulates: otherwise DeepSpeed would reduce gradients
    in each micro-batch.

    Args:
        settings: Settings of the phase.
        world: Number of ranks.
        micro_batches: Micro-batches per step on each rank.

    Raises:
        ConfigError: The file contradicts the recipe or cannot be read; the message contains file and key.
    """
    sharding, train = settings.sharding, settings.train
    file = resolve_config_path(sharding)
    config = read_config(file)
    local_batch = train.batch_size // world
    from_recipe = {
        "train_batch_size": (train.batch_size, "train.batch_size"),
        "train_micro_batch_size_per_gpu": (local_batch // micro_batches, "train.micro_batch"),
        "gradient_accumulation_steps": (micro_batches, "train.micro_batch"),
        "gradient_clipping": (train.clip_grad, "train.clip_grad"),
        "torch_autocast.enabled": (train.precision == "bf16", "train.precision"),
        "torch_autocast.dtype": ("bfloat16", "train.precision"),
        "zero_optimization.stage": (int(sharding.strategy.removeprefix("zero")), "sharding.strategy"),
    }
    for key, (value, source) in from_recipe.items():
        found = _get_value(config, key, file)
        if found not in (None, "auto", value):
            raise ConfigError(
                f"{file}: {key} = {json.dumps(found)}, but the recipe's {source} requires {value!r}; remove the key"
            )
    for key, (value, reason) in FIXED.items():
        found = _get_value(config, key, file)
        if found not in (None, value):
            raise ConfigError(f"{file}: {key} cannot be {json.dumps(found)}: {reason}")
    zero = config.get("zero_optimization", {})
    autocast = config.get("torch_autocast", {})
    return config | {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": local_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.clip_grad,  # DeepSpeed's default is 1.0
        # DeepSpeed would reduce the gradients of the modules in this list in bf16
        "torch_autocast": {"lower_precision_safe_modules": []}
        | autocast
        | {"enabled": train.precision == "bf16", "dtype": "bfloat16"},
        "zero_optimization": zero | {"stage": from_recipe["zero_optimization.stage"][0]},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def resolve_config_path(sharding: ShardingConfig) -> Path:
    """Return the path of ``sharding.deepspeed_config`` (a shipped name or a path), by default the strategy's file."""
    given = sharding.deepspeed_config or sharding.strategy
    if "/" in given:
        return Path(given)
    if not (known := shipped_config_path(given)).exists():
        names = ", ".join(sorted(file.stem for file in known.parent.glob("*.json")))
        raise ConfigError(
            f"sharding.deepspeed_config = {given!r} is not an included file ({names}); write a path with a / or a ."
        )
    return known


def shipped_config_path(strategy: str) -> Path:
    """Return the path of a shipped file: ``zero1``, ``zero2``, ``zero3`` or ``zero3_offload``."""
    return resource_folder("ds_configs") / f"{strategy}.json"


def read_config(file: Path) -> dict[str, Any]:
    """Read a DeepSpeed file.

    Raises:
        ConfigError: The file cannot be read or is not a JSON object.
    """
    try:
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid JSON: {error}") from None
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror} (sharding.deepspeed_config)") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: expected a JSON object, {{...}} (sharding.deepspeed_config)")
    return config


def _get_value(config: dict[str, Any], key: str, file: Path) -> Any:
    value: Any = config
    for part in key.split("."):
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ConfigError(f"{file}: {key.rpartition('.')[0]} must be a JSON object, {{...}}")
        value = value.get(part)
    return value
