"""The file that DeepSpeed is configured with: the user's, completed from the recipe, never against it.

Batch, accumulation, clipping, precision, optimizer and schedule are the recipe's. A file may repeat what the recipe
says; one that says otherwise is refused, because DeepSpeed would follow it without a word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import Settings, Sharding
from ..errors import ConfigError
from ..resources import resource_folder

# What cannot be right here, or is not proven: the one value that a file may give.
FIXED = {
    "bf16.enabled": (False, "it would turn frozen parameters into bf16; use train.precision"),
    "fp16.enabled": (False, "it would turn frozen parameters into fp16; use train.precision"),
    "amp.enabled": (False, "use train.precision"),
    "optimizer": (None, "the optimizer is the recipe's [optim]"),
    "scheduler": (None, "the schedule is the recipe's [schedule]"),
    "communication_data_type": ("fp32", "gradients travel in fp32"),
    "data_types.grad_accum_dtype": ("fp32", "gradients add up in fp32"),
    "managed_gradient_accumulation": (True, "the trainer accumulates"),
    "zero_optimization.offload_optimizer.nvme_path": (None, "what is offloaded rests in host memory"),
    "zero_optimization.offload_param.nvme_path": (None, "what is offloaded rests in host memory"),
    "zero_optimization.zero_hpz_partition_size": (1, "shares are cut over all ranks"),
    "zero_optimization.mics_shard_size": (-1, "shares are cut over all ranks"),
    "zero_optimization.zero_quantized_weights": (False, "weights travel whole"),
    "zero_optimization.zero_quantized_gradients": (False, "gradients travel in fp32"),
    "zero_optimization.zenflow": (None, "it updates late"),
    "zero_optimization.compute_grad_norm": (True, "steps that are not finite are left out by the norm"),
}


def deepspeed_config(settings: Settings, *, world: int, micro_batches: int) -> dict[str, Any]:
    """What ``deepspeed.initialize`` takes.

    To DeepSpeed a step is one micro-batch, whose backward comes in parts: told of the accumulation it would reduce
    gradients after each.

    Raises:
        ConfigError: naming file and key, where the file contradicts the recipe, or cannot be read.
    """
    sharding, train = settings.sharding, settings.train
    file = config_file(sharding)
    config = read(file)
    share = train.batch_size // world
    recipes = {
        "train_batch_size": (train.batch_size, "train.batch_size"),
        "train_micro_batch_size_per_gpu": (share // micro_batches, "train.micro_batch"),
        "gradient_accumulation_steps": (micro_batches, "train.micro_batch"),
        "gradient_clipping": (train.clip_grad, "train.clip_grad"),
        "torch_autocast.enabled": (train.precision == "bf16", "train.precision"),
        "torch_autocast.dtype": ("bfloat16", "train.precision"),
        "zero_optimization.stage": (int(sharding.strategy.removeprefix("zero")), "sharding.strategy"),
    }
    for key, (value, source) in recipes.items():
        found = _get(config, key, file)
        if found not in (None, "auto", value):
            raise ConfigError(f"{file}: {key} = {json.dumps(found)}, but the recipe's {source} makes it {value!r}")
    for key, (value, reason) in FIXED.items():
        found = _get(config, key, file)
        if found not in (None, value):
            raise ConfigError(f"{file}: {key} cannot be {json.dumps(found)}: {reason}")
    zero = config.get("zero_optimization", {})
    autocast = config.get("torch_autocast", {})
    return config | {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": share,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.clip_grad,  # left out it is 1.0
        # DeepSpeed would send the gradients of the modules in this list as bf16
        "torch_autocast": {"lower_precision_safe_modules": []}
        | autocast
        | {"enabled": train.precision == "bf16", "dtype": "bfloat16"},
        "zero_optimization": zero | {"stage": recipes["zero_optimization.stage"][0]},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def config_file(sharding: Sharding) -> Path:
    """``sharding.deepspeed_config``: a shipped name or a path; the strategy's own where nothing is said."""
    given = sharding.deepspeed_config or sharding.strategy
    return known if (known := shipped(given)).exists() else Path(given)


def shipped(strategy: str) -> Path:
    """The file of that name that comes with the package: ``zero1`` … ``zero3``, ``zero3_offload``."""
    return resource_folder("ds_configs") / f"{strategy}.json"


def read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid JSON: {error}") from None
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror} (sharding.deepspeed_config)") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: a DeepSpeed configuration is an object, {{...}}")
    return config


def _get(config: dict[str, Any], key: str, file: Path) -> Any:
    value: Any = config
    for part in key.split("."):
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ConfigError(f"{file}: {key.rpartition('.')[0]} must be an object, {{...}}")
        value = value.get(part)
    return value
