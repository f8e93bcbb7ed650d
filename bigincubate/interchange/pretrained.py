"""Load pretrained models of timm or transformers: a meta model of some of their blocks, or a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..config import MetaConfig, ModelConfig
from ..errors import ArtifactError, ConfigError, DataError, format_count
from ..files import check_is_file
from ..models.base import ModelFamily
from ..models.language.build import TransformersFamily
from ..models.partition import Partition
from ..models.vision.build import TimmFamily
from ..models.vision.families import find_timm_family
from ..storage.artifacts import check_finite_weights
from ..storage.finished_models import is_hub_name
from .export import load_model, read_spec
from .official_format import is_state_dict, join_stages, read_torch, stages_of
from .pretrained_causal import load_causal_state
from .pretrained_source import PretrainedModel, PretrainedSource
from .tokenizer_files import identify_exported_tokenizer

# arguments of timm that follow the image size
SIZE_ARGUMENTS = frozenset({"window_size", "pretrained_window_sizes"})


def pretrained_meta(
    meta: MetaConfig, settings: ModelConfig, partition: Partition, fresh: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the state dict of a meta model that is initialized from a pretrained model.

    Args:
        meta: The pretrained model (``init``, which must be set) and the blocks to take from it.
        settings: Model settings of the meta model.
        partition: Partition of the meta model.
        fresh: State dict of the meta model with fresh weights.

    Raises:
        ConfigError: There are no such weights, the family or the width differs, or ``meta.select`` does not fit.
        ArtifactError: The file or folder is missing or damaged.
        NonFiniteError: A weight is not finite.
        DataError: The weights cannot be downloaded.
    """
    assert meta.init is not None
    family = partition.family
    state = _load_pretrained(PretrainedSource("meta.init", meta.init), settings, family, fresh).tensors
    depths = family.count_blocks(state)
    blocks = choose_blocks(meta.select, depths, partition.stage_depths, family.parity)
    new_index = {(stage, index): new for stage, row in enumerate(blocks) for new, index in enumerate(row)}
    whole = Partition(family, (depths,))
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = whole.block_of(name)
        if block is None:
            tensors[name] = tensor
        elif (new := new_index.get((block.stage, block.index_in_stage))) is not None:
            tensors[family.block_path(block.stage, new) + name[len(block.path) :]] = tensor
    return tensors


def pretrained_target(
    source: PretrainedSource, settings: ModelConfig, partition: Partition, fresh: Mapping[str, Tensor]
) -> PretrainedModel:
    """Return a finished model that has the architecture of the target.

    Args:
        source: The model.
        settings: Model settings of the target.
        partition: Partition of the target.
        fresh: State dict of the target with fresh weights.

    Raises:
        ConfigError: It has another architecture; the message says what differs, and what to set.
        ArtifactError: The file or folder is missing or damaged.
        NonFiniteError: A weight is not finite.
        DataError: The weights cannot be downloaded.
    """
    family = partition.family
    spec = None if is_hub_name(source.init) else read_spec(Path(source.init))
    if spec is not None and isinstance(family, TimmFamily):
        _check_arguments(source, spec.model, settings)
    found = _load_pretrained(source, settings, family, fresh)
    if (depths := family.count_blocks(found.tensors)) != partition.stage_depths:
        theirs, ours = (" + ".join(map(str, each)) for each in (depths, partition.stage_depths))
        raise ConfigError(
            f"{source} has {theirs} blocks, but the target {ours}: set plan.target_depths to numbers with this sum"
        )
    if spec is None:
        return found
    return found._replace(
        records={**spec.records, "exported_tokenizer": identify_exported_tokenizer(Path(source.init))}
    )


def _check_arguments(source: PretrainedSource, theirs: ModelConfig, ours: ModelConfig) -> None:
    """Check that two models of timm are built alike; timm itself adapts them to another image size.

    Raises:
        ConfigError: They are not; the message names a key and both values.
    """
    if (theirs.library, theirs.name) != (ours.library, ours.name):
        raise ConfigError(f"{source} is a {theirs.name} model, but model.name = {ours.name!r}; set it to {theirs.name}")
    for key in sorted(theirs.args.keys() | ours.args.keys()):
        values = theirs.args.get(key), ours.args.get(key)
        if values[0] != values[1] and "drop" not in key and key not in SIZE_ARGUMENTS:
            instead = f"remove model.args.{key}" if values[0] is None else f"set model.args.{key} = {values[0]}"
            raise ConfigError(f"{source} has {key} = {values[0]}, the recipe {values[1]}: {instead}")


def _load_pretrained(
    source: PretrainedSource, settings: ModelConfig, family: ModelFamily, fresh: Mapping[str, Tensor]
) -> PretrainedModel:
    """Return a pretrained model of any depth."""
    if isinstance(family, TimmFamily):
        found = _load_timm_model(source, settings, family, fresh)
    elif isinstance(family, TransformersFamily):
        found = PretrainedModel(load_causal_state(source, settings, family), (), {})
    else:
        raise ConfigError(
            f"{source} is for models of timm and transformers, not for model.library = {settings.library!r}"
        )
    check_finite_weights(found.tensors, str(source))
    return found


def choose_blocks(
    select: str | list[int] | list[list[int]] | None, source: tuple[int, ...], meta: tuple[int, ...], parity: int
) -> list[list[int]]:
    """Choose the blocks of a pretrained model from which a meta model is initialized.

    Args:
        select: Block indices, as one list per stage if there are several stages. ``"even"`` or None selects the first
            and the last block and evenly spaced blocks between them; for a single block, the first.
        source: Number of blocks per stage of the pretrained model.
        meta: Number of blocks per stage of the meta model.
        parity: Parity of the family: the old and the new index of a block must be equal modulo this number.

    Returns:
        Block indices, one list per stage.

    Raises:
        ConfigError: The number of blocks does not match the meta model, or an index does not exist or has the wrong
            parity.
    """
    if select is None or select == "even":
        for stage, (have, need) in enumerate(zip(source, meta, strict=True)):
            if have < need:
                raise ConfigError(
                    f"meta.init has {have} blocks{_stage_suffix(stage, meta)}, fewer than the meta model's {need};"
                    " use a deeper model, or lower plan.meta_depths"
                )
        # before each selected block, a multiple of `parity` blocks is skipped
        return [
            [i + parity * (i * (have - need) // (max(1, need - 1) * parity)) for i in range(need)]
            for have, need in zip(source, meta, strict=True)
        ]
    rows: list[Any] = [select] if len(meta) == 1 and not isinstance(select[0], list) else list(select)
    if len(rows) != len(meta) or not all(isinstance(row, list) for row in rows):
        raise ConfigError(
            f"meta.select: this model has {format_count(len(meta), 'stage')}; give one list of blocks per stage"
        )
    for stage, (row, have, need) in enumerate(zip(rows, source, meta, strict=True)):
        where = _stage_suffix(stage, meta)
        if len(row) != need:
            raise ConfigError(
                f"meta.select lists {format_count(len(row), 'block')}{where}, but the meta model has {need}"
            )
        for new, index in enumerate(row):
            if index >= have:
                raise ConfigError(f"meta.select: no block {index}{where}; meta.init has blocks 0 to {have - 1}")
            if (index - new) % parity:
                raise ConfigError(
                    f"meta.select: block {index}{where} would be block {new} of the meta model; every second block"
                    " shifts its windows, so both indices must be even or both odd"
                )
    return rows


def _stage_suffix(stage: int, stages: tuple[int, ...]) -> str:
    return f" in stage {stage}" if len(stages) > 1 else ""


def _load_timm_model(
    source: PretrainedSource, settings: ModelConfig, family: TimmFamily, fresh: Mapping[str, Tensor]
) -> PretrainedModel:
    """Return a pretrained timm model of any depth.

    timm adapts position embeddings, patch embeddings and window sizes. If the pretrained model has no classifier, or
    one of another number of classes, it is the fresh one.
    """
    model = _build_pretrained(source, settings, family)
    if (found := find_timm_family(source.init, model)) != family:
        raise ConfigError(f"{source} is a {found.name} model, but model.name is a {family.name} model")
    state, about = dict(model.state_dict()), dict(model.pretrained_cfg)  # type: ignore[arg-type]
    head = tuple(name for name in _classifier_names(about) if name in fresh)
    for name in head:
        if name not in state or state[name].shape != fresh[name].shape:
            state[name] = fresh[name]
    names = about.get("label_names") if is_hub_name(source.init) else None
    return PretrainedModel(state, head, {"classes": list(names)} if names else {})


def _build_pretrained(source: PretrainedSource, settings: ModelConfig, family: TimmFamily) -> nn.Module:
    """Build and load the pretrained model with timm."""
    arguments: dict[str, Any] = {**settings.args, **family.size_kwargs(settings)}
    name = source.init.removeprefix("timm:")
    if name == source.init:
        name, state = settings.name, _read_state_dict(source, family)
        head = next(iter(_classifier_names(timm.get_pretrained_cfg(name).to_dict())))
        arguments["num_classes"] = len(state[head]) if head in state else 0
        arguments["pretrained_cfg_overlay"] = {"state_dict": state, "num_classes": arguments["num_classes"]}
        depths = family.count_blocks(state)
        if not all(depths):
            raise ConfigError(f"{source} has no blocks of a {family.name} model, the family of model.name")
        arguments |= family.depth_kwargs(depths)
    try:
        return timm.create_model(name, pretrained=True, **arguments)
    except OSError as error:
        raise DataError(f"{source} cannot be downloaded: {_one_line(error)}") from None
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError, RuntimeError) as error:
        problem = str(error).partition("Error(s) in loading state_dict for ")[2].partition("\n\t")[2].partition("\n")[0]
        if problem:
            raise ConfigError(
                f"{source} is not a {settings.name} model with model.args of this recipe: {problem}; set model.name and"
                " model.args to those of the pretrained model"
            ) from None
        raise ConfigError(f"{source} cannot be loaded: {_one_line(error)}") from None


def _read_state_dict(source: PretrainedSource, family: TimmFamily) -> dict[str, Tensor]:
    """Read the state dict of a run, an artifact, an export, a safetensors file, or a file that ``torch.save`` wrote."""
    path = Path(source.init)
    if path.is_dir():
        return dict(load_model(path)[0].state_dict())
    if path.suffix == ".safetensors":
        try:
            check_is_file(path)
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{source}: {_one_line(error)}") from None
    loaded = read_torch(path)
    if stages := stages_of(loaded):
        return join_stages(stages, family)
    nested = (loaded.get(key) for key in ("state_dict", "model")) if isinstance(loaded, dict) else ()
    for state in (*nested, loaded):
        if state and is_state_dict(state):
            return dict(state)
    raise ArtifactError(f"{source} holds no state dict, neither at the top level nor under the key state_dict or model")


def _classifier_names(cfg: Mapping[str, Any]) -> list[str]:
    """Return the tensor names of the classifiers (a model may have two), each with its weight first."""
    names = cfg["classifier"]
    return [f"{name}.{kind}" for name in ([names] if isinstance(names, str) else names) for kind in ("weight", "bias")]


def _one_line(error: Exception) -> str:
    """Return the message of an exception as one line of limited length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else text[:300] + "…"
