"""Small causal language models of every family, for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigincubate.config import ModelConfig
from bigincubate.models.base import Depths
from bigincubate.models.language.build import TransformersFamily
from bigincubate.models.language.causal_lm import CausalLM
from bigincubate.models.language.families import find_transformers_family

FAMILIES = ("llama", "qwen3", "olmo2", "gpt2")
VOCABULARY, LENGTH = 67, 24


def settings(name: str, depth: int = 12, *, length: int = LENGTH, **args: Any) -> ModelConfig:
    """Return the settings of a narrow model with a target of this depth; all but GPT-2 use grouped-query attention."""
    family = find_transformers_family(name)
    small = {**family.smoke_args, "vocab_size": VOCABULARY, family.depth_key: depth, **args}
    if name != "gpt2":
        small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    return ModelConfig(library="transformers", name=name, context_length=length, args=small)


def build(model: ModelConfig, depths: Depths, seed: int = 0) -> tuple[CausalLM, TransformersFamily]:
    """Build a model in which no parameter has its initial value, such as zero or one."""
    family = find_transformers_family(model.name)
    torch.manual_seed(seed)
    built = family.build(model, depths)
    assert isinstance(built, CausalLM)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built, family


def random_tokens(rows: int = 2, length: int = LENGTH, seed: int = 1) -> Tensor:
    """Return random tokens ``[rows, length]``."""
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
