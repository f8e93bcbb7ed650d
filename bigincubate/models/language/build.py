"""Build causal language models of a given depth from configurations of transformers."""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...config import ModelConfig
from ...errors import ConfigError, MissingDependencyError
from ..base import Depths, ModelFamily, SkipMetaInitialization, explain_argument_errors
from ..partition import Partition
from .arguments import check_value
from .causal_lm import CHUNK_TOKENS, CausalLM

# arguments for which only one value is supported: this value, and the reason
FIXED: dict[str, tuple[Any, str]] = {
    "tie_word_embeddings": (False, "embedding and head belong to different modules, which are trained separately"),
    "scale_attn_by_inverse_layer_idx": (
        False,
        "attention would depend on the index of its block, which changes with the depths of earlier modules",
    ),
    "scale_attn_weights": (True, "torch's fused attention always scales"),
    "reorder_and_upcast_attn": (False, "torch's fused attention does not support it"),
    "pad_token_id": (None, "windows are not padded, and the embedding of this token would not be trained"),
    "pretraining_tp": (1, "transformers ignores it"),
    "use_cache": (True, "training never uses the cache, and an exported model always does"),
}
# why dropout is not supported
DROPOUT = "blocks draw no random numbers, so that hybrids and recomputed blocks give the same results"
# rotary embeddings whose frequencies do not depend on the length of the input
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class TransformersFamily(ModelFamily):
    """A family of causal language models from transformers.

    ``model.args`` has the keys of transformers' configuration. Its depth is the *target's*.

    Attributes:
        classes: Prefix of the names of transformers' classes: ``"Llama"`` for ``LlamaConfig`` and ``LlamaModel``.
        causal_class: Name of transformers' class with a head; empty: ``classes`` followed by ``ForCausalLM``.
        exported_prefix: Prefix that tensors have in transformers instead of the prefix ``model.`` that they have here.
        embedding: Name of the token embedding.
        positions: Name of the learned position embedding; None: rotary embeddings.
        norm: Name of the final norm.
        depth_key: Key of the configuration for the number of blocks.
        length_key: Key of the configuration for the maximum length of a window.
        dropouts: Keys of the configuration for dropout rates.
        zeroed_outputs: For `residual_outputs`: path within a block of the last layer of each residual branch, or of the
            norm that follows it.
        smoke_args: Arguments of a narrow model for smoke tests.
    """

    library: str = "transformers"
    stages: int = 1
    classes: str
    causal_class: str = ""
    exported_prefix: str = "model."
    embedding: str
    positions: str | None = None
    norm: str
    depth_key: str
    length_key: str
    dropouts: tuple[str, ...]
    zeroed_outputs: tuple[str, ...]
    smoke_args: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def variant(self, **changes: Any) -> TransformersFamily:
        """Return a family that differs in these attributes."""
        return replace(self, **changes)

    def build(self, model: ModelConfig, depths: Depths, *, device: str = "cpu") -> nn.Module:
        """Build a model of these depths with the initialization of the *target's* depth; see `ModelFamily.build`.

        Raises:
            ConfigError: An argument is not supported, or transformers rejects it.
        """
        (depth,) = Partition(self, depths).stage_depths
        config = self.configuration(model, depth)
        (target_depth,) = self.default_depths(model)
        base = getattr(import_transformers(), f"{self.classes}Model")
        with explain_argument_errors(model.name), SkipMetaInitialization(), torch.device(device):
            built = CausalLM(
                base(config),
                embedding=self.embedding,
                positions=self.positions,
                blocks=self.block.split(".")[1],
                norm=self.norm,
            )
            nn.init.normal_(built.lm_head.weight, std=config.initializer_range)
            if self.scales_residual_outputs:
                self._rescale_outputs(built, math.sqrt(depth / target_depth))
        return built

    def configuration(self, model: ModelConfig, depth: int | None = None) -> Any:
        """Return transformers' configuration of a model.

        Args:
            model: The recipe's model settings.
            depth: Number of blocks; by default the target's.

        Raises:
            ConfigError: An argument is missing, unknown, not supported or rejected by transformers.
        """
        config_class = getattr(import_transformers(), f"{self.classes}Config")
        self._check_arguments(model.args, config_class)
        arguments = copy.deepcopy(model.args)  # transformers changes some values in place
        if self.positions is None:
            arguments.setdefault(self.length_key, model.context_length)
        arguments |= {"tie_word_embeddings": False, "pad_token_id": None, **dict.fromkeys(self.dropouts, 0.0)}
        with explain_argument_errors(model.name):
            config = config_class(**arguments, attn_implementation="sdpa")
            self._check_configuration(config, model)
            types, blocks = _layer_types(config), getattr(config, self.depth_key)
            if types and len(types) != blocks:  # transformers checks it from 4.57 on
                raise ValueError(f"the length of layer_types is {len(types)}, but {self.depth_key} is {blocks}")
            if depth is not None:
                layer_types = {"layer_types": types[:1] * depth} if types else {}
                config = config_class(**{**arguments, self.depth_key: depth, **layer_types}, attn_implementation="sdpa")
        return config

    def widths(self, model: nn.Module) -> tuple[int, ...]:
        """Return the width of the head's input, which is that of every block."""
        return (int(model.get_submodule("lm_head").in_features),)  # type: ignore[arg-type]

    def default_depths(self, model: ModelConfig) -> tuple[int, ...]:
        """Return the depth of the configuration, which is the target's."""
        return (getattr(self.configuration(model), self.depth_key),)

    def example_inputs(self, model: ModelConfig, count: int, device: str) -> Tensor:
        """Return windows of token 0, int64 ``[count, context_length]``."""
        return torch.zeros(count, model.context_length, dtype=torch.int64, device=device)

    def check_target(self, model: ModelConfig, depths: Depths) -> None:
        """Check that the target has the depth of the configuration, because initial weights may depend on it."""
        (own,), total = self.default_depths(model), sum(stages[0] for stages in depths)
        if own != total:
            raise ConfigError(
                f"model.args.{self.depth_key} is {own}, but plan.target_depths has {total} blocks: set the two to the"
                " same depth"
            )

    def check_input_size(self, model: ModelConfig) -> None:
        """Check that the model reads windows of ``model.context_length`` tokens."""
        self.configuration(model)

    def residual_outputs(self, block: nn.Module) -> list[nn.Module]:
        """Return the last layers of the residual branches; see `ModelFamily.residual_outputs`."""
        return [block.get_submodule(path) for path in self.zeroed_outputs]

    def workspace_bytes(self, model: ModelConfig, samples: int) -> int:
        """Return the bytes of the fp32 logits of a chunk of tokens, their exponentials and their gradient."""
        return 3 * 4 * min(CHUNK_TOKENS, samples * model.context_length) * int(model.args["vocab_size"])

    def smoke_overrides(self, model: ModelConfig, *, larger_inputs: bool) -> dict[str, Any]:
        """Return settings for a narrow byte-level model with windows of 32 tokens (64 with ``larger_inputs``)."""
        return {"context_length": 64 if larger_inputs else 32, "args": dict(self.smoke_args)}

    def count_block_flops(self, model: ModelConfig, stage_depths: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Count the forward FLOPs of each block for one window; see `ModelFamily.count_block_flops`.

        Causal attention is counted in full, as if each token attended to all others.
        """
        return super().count_block_flops(model, stage_depths)

    def exported_name(self, name: str) -> str:
        """Return transformers' name of a tensor."""
        return self.exported_prefix + name.removeprefix("model.") if name.startswith("model.") else name

    def own_name(self, name: str) -> str:
        """Return the name in this package of a tensor of transformers; the inverse of `exported_name`."""
        prefix = self.exported_prefix
        return f"model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name

    @property
    def exported_class(self) -> str:
        """Return the name of transformers' class of the model with a head."""
        return self.causal_class or f"{self.classes}ForCausalLM"

    def _check_arguments(self, arguments: Mapping[str, Any], config_class: Any) -> None:
        """Check that the configuration has all arguments and that they are supported; transformers does not check this.

        Raises:
            ConfigError: An argument is unknown, missing or not supported; the message names it.
        """
        parameters = inspect.signature(config_class.__init__).parameters
        own = {*parameters, "tie_word_embeddings", "pad_token_id"}
        own -= {"self", "kwargs"}
        for key in sorted(arguments.keys() - own):
            alias = config_class.attribute_map.get(key)
            near = [alias] if alias else difflib.get_close_matches(key, own, n=1)
            hint = f"did you mean {near[0]}?" if near else f"its keys are {', '.join(sorted(own))}"
            raise ConfigError(f"model.args.{key}: {config_class.__name__} has no such key; {hint}")
        for key, value in arguments.items():
            fixed, reason = (0, DROPOUT) if key in self.dropouts else FIXED.get(key, (value, ""))
            if key.startswith("summary_"):
                fixed, reason = parameters[key].default, "a language model has no classification head"
            if value != fixed:
                raise ConfigError(
                    f"model.args.{key} = {json.dumps(value, default=str)} is not supported: {reason}; remove it"
                )
            if key not in FIXED and key not in self.dropouts:
                check_value(key, value, parameters[key].default)
        if "vocab_size" not in arguments:
            raise ConfigError("model.args.vocab_size is missing: set it to the size of the tokenizer's vocabulary")

    def _check_configuration(self, config: Any, model: ModelConfig) -> None:
        """Check combinations of arguments.

        Raises:
            ConfigError: The model is not supported.
        """
        if getattr(config, self.length_key) < model.context_length:
            raise ConfigError(
                f"model.context_length = {model.context_length} is larger than {self.length_key} ="
                f" {getattr(config, self.length_key)}: lower it, or set model.args.{self.length_key} ="
                f" {model.context_length}"
            )
        scaling = getattr(config, "rope_scaling", None) or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ROPE_TYPES:
            raise ConfigError(
                f"model.args.rope_scaling: type {kind!r} is not supported, because its frequencies depend on the length"
                f" of the input; supported types are {', '.join(ROPE_TYPES)}"
            )
        if set(_layer_types(config)) - {"full_attention"}:
            key = "layer_types" if "layer_types" in model.args else "use_sliding_window"
            raise ConfigError(
                f"model.args.{key}: blocks with other than full attention are not supported, because they depend on"
                " their index, which changes with the depths of earlier modules; remove it"
            )

    @torch.no_grad()
    def _rescale_outputs(self, model: nn.Module, factor: float) -> None:
        """Multiply the initial weights of the residual branches' last layers by a factor."""
        for path, module in model.named_modules():
            if path.endswith(self.zeroed_outputs) and factor != 1:
                module.weight.mul_(factor)


def _layer_types(config: Any) -> list[str]:
    return getattr(config, "layer_types", None) or []


def import_transformers() -> Any:
    """Import transformers. It is optional, because only language models need it.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise MissingDependencyError(
            'model.library = "transformers" needs the library transformers; install it with: pip install'
            " 'bigincubate[text]'"
        ) from None
    return transformers
