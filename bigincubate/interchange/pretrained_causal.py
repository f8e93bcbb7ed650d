"""Load pretrained causal language models of transformers."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import ModelConfig
from ..errors import ArtifactError, BigincubateError, ConfigError, DataError
from ..models.language.build import TransformersFamily, import_transformers
from .export import load_model
from .pretrained_source import PretrainedSource

PREFIX = "transformers:"
# keys of configurations that do not change what a model computes from its weights, or (windows) are checked apart
IGNORED_KEYS = frozenset(
    {"initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "tie_word_embeddings"}
    | {"pretraining_tp", "reorder_and_upcast_attn", "self", "kwargs"}
    | {"summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"}
    | {"layer_types", "sliding_window", "use_sliding_window", "max_window_layers"}
)


def load_causal_state(source: PretrainedSource, settings: ModelConfig, family: TransformersFamily) -> dict[str, Tensor]:
    """Return the tensors of a pretrained model of any depth, with the names that they have here.

    The head of a model with tied weights becomes a copy of the embedding.

    Args:
        source: ``"transformers:NAME"`` of a hub, or the path of a folder that transformers wrote, a run or an artifact.
        settings: Model settings of the recipe.
        family: The family of its model.

    Raises:
        ConfigError: It has another architecture, width or other setting than the recipe.
        ArtifactError: The folder is missing or damaged.
        DataError: The weights cannot be downloaded.
    """
    init, name = source.init, source.init.removeprefix(PREFIX)
    ours = family.configuration(settings)
    if name == init and not (Path(init) / "config.json").exists():  # a run or an artifact
        model, spec = load_model(Path(init))
        if (spec.model.library, spec.model.name) != (family.library, family.name):
            raise ConfigError(f"{source} is a {spec.model.name} model, but model.name = {family.name!r}")
        _check_same_function(source, family.configuration(spec.model), ours, family)
        return dict(model.state_dict())
    transformers = import_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        if config.model_type != ours.model_type:
            raise ConfigError(f"{source} is a {config.model_type} model, but model.name = {family.name!r}")
        _check_same_function(source, config, ours, family)
        loaded, about = transformers.AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)
    except BigincubateError:
        raise
    except Exception as error:  # damaged files raise errors of several libraries
        text = " ".join(str(error).split()) or type(error).__name__
        if name != init and isinstance(error, OSError):
            raise DataError(f"{source} cannot be downloaded: {text[:300]}") from None
        raise ArtifactError(f"{source} cannot be loaded: {text[:300]}") from None
    if missing := sorted(about["missing_keys"]):  # transformers has drawn random ones
        raise ArtifactError(f"{source} has no tensor {missing[0]}")
    return {family.own_name(key): tensor.detach().float().clone() for key, tensor in loaded.state_dict().items()}


def _check_same_function(source: PretrainedSource, theirs: Any, ours: Any, family: TransformersFamily) -> None:
    """Check that two configurations describe models that differ only in depth.

    Raises:
        ConfigError: They do not; the message names a key and both values.
    """
    ignored = IGNORED_KEYS | {family.depth_key, *family.dropouts}
    if family.positions is None:
        ignored |= {family.length_key}
    for key in sorted(inspect.signature(type(ours).__init__).parameters.keys() - ignored):
        values = getattr(theirs, key, None), getattr(ours, key, None)
        if values[0] != values[1]:
            instead = f"remove model.args.{key}" if values[0] is None else f"set model.args.{key} = {values[0]}"
            raise ConfigError(f"{source} has {key} = {values[0]}, the recipe {values[1]}: {instead}")
    if set(getattr(theirs, "layer_types", None) or ()) - {"full_attention"}:
        raise ConfigError(f"{source} is not supported: it has blocks with attention in a sliding window")
