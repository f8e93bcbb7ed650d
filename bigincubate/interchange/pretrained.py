"""Make a meta model from some of the blocks of a pretrained model, which timm loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..config import MetaConfig, ModelConfig
from ..errors import ArtifactError, ConfigError, DataError
from ..models.partition import Partition
from ..models.vision.build import TimmFamily
from ..models.vision.families import find_timm_family
from .export import load_model
from .official_format import is_state_dict, join_stages, read_torch, stages_of


def pretrained_meta(
    meta: MetaConfig, settings: ModelConfig, partition: Partition, fresh: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of a meta model that is made from a pretrained one, under the meta model's names.

    Position and patch embeddings and window sizes are adapted as timm does. If the pretrained model has a classifier of
    other classes, or none, the meta model's fresh one is kept.

    Args:
        meta: What to start from (``init``, which must be set), and which of its blocks.
        settings: Model settings of the meta model.
        partition: Partition of the meta model.
        fresh: State dict of the meta model with fresh weights.

    Raises:
        ConfigError: timm has no such weights, family or width differ, or ``meta.select`` does not fit.
        ArtifactError: The file or folder is missing or damaged.
        DataError: The weights cannot be downloaded.
    """
    assert meta.init is not None
    if not isinstance(partition.family, TimmFamily):
        raise ConfigError(f"meta.init = {meta.init!r} is for timm models, not for model.library = {settings.library!r}")
    source = _load(meta.init, settings, partition.family)
    if (family := find_timm_family(meta.init, source)) != partition.family:
        raise ConfigError(f"meta.init = {meta.init!r} is a {family.name} model, model.name a {partition.family.name}")
    state = source.state_dict()
    depths = family.count_blocks(state)
    blocks = choose_blocks(meta.select, depths, partition.stage_depths, family.parity)
    places = {(stage, index): place for stage, row in enumerate(blocks) for place, index in enumerate(row)}
    whole = Partition(family, (depths,))
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block = whole.block_of(name)
        if block is None:
            tensors[name] = tensor
        elif (place := places.get((block.stage, block.index_in_stage))) is not None:
            tensors[family.block_path(block.stage, place) + name[len(block.path) :]] = tensor
    for name in _classifier(source.pretrained_cfg):  # type: ignore[arg-type]
        if name in fresh and (name not in tensors or tensors[name].shape != fresh[name].shape):
            tensors[name] = fresh[name]
    return tensors


def choose_blocks(
    select: str | list[int] | list[list[int]] | None, source: tuple[int, ...], meta: tuple[int, ...], parity: int
) -> list[list[int]]:
    """Choose the blocks of each stage of a pretrained model that a meta model takes.

    Args:
        select: Block indices, with several stages one list per stage; ``"even"`` or None: the first, the last and
            evenly between them (of one block: the first).
        source: Number of blocks per stage of the pretrained model.
        meta: Number of blocks per stage of the meta model.
        parity: Parity of the family; a block keeps its index modulo this.

    Returns:
        Block indices, one list per stage.

    Raises:
        ConfigError: There are too few blocks, their number is not that of the meta model, or an index does not exist
            or has the wrong parity.
    """
    if select is None or select == "even":
        for stage, (have, need) in enumerate(zip(source, meta, strict=True)):
            if have < need:
                raise ConfigError(
                    f"meta.init has {have} blocks{_in(stage, meta)}, fewer than the meta model's {need}: take a deeper"
                    " one, or less in plan.meta_depths"
                )
        # before each block that is taken, a multiple of `parity` blocks is left out
        return [
            [i + parity * (i * (have - need) // (max(1, need - 1) * parity)) for i in range(need)]
            for have, need in zip(source, meta, strict=True)
        ]
    rows: list[Any] = [select] if len(meta) == 1 and not isinstance(select[0], list) else list(select)
    if len(rows) != len(meta) or not all(isinstance(row, list) for row in rows):
        raise ConfigError(f"meta.select: this model has {len(meta)} stages; give a list of blocks for each")
    for stage, (row, have, need) in enumerate(zip(rows, source, meta, strict=True)):
        where = _in(stage, meta)
        if len(row) != need:
            raise ConfigError(f"meta.select lists {len(row)} blocks{where}, the meta model has {need}")
        for place, index in enumerate(row):
            if index >= have:
                raise ConfigError(f"meta.select: no block {index}{where}; meta.init has {have}, 0 to {have - 1}")
            if (index - place) % parity:
                raise ConfigError(
                    f"meta.select: block {index}{where} would be block {place} of the meta model; every second block"
                    " shifts its windows, so both must be even or both odd"
                )
    return rows


def _in(stage: int, stages: tuple[int, ...]) -> str:
    return f" in stage {stage}" if len(stages) > 1 else ""


def _load(init: str, settings: ModelConfig, family: TimmFamily) -> nn.Module:
    """Build and load the pretrained model with timm."""
    arguments: dict[str, Any] = {**settings.args, **family.size_kwargs(settings)}
    name = init.removeprefix("timm:")
    if name == init:
        name, state = settings.name, _read(Path(init), family)
        head = next(iter(_classifier(timm.get_pretrained_cfg(name).to_dict())))
        arguments["num_classes"] = len(state[head]) if head in state else 0
        arguments["pretrained_cfg_overlay"] = {"state_dict": state, "num_classes": arguments["num_classes"]}
        depths = family.count_blocks(state)
        if not all(depths):
            raise ConfigError(f"meta.init = {init!r} has no blocks of a {family.name} model, which model.name is")
        arguments |= family.depth_kwargs(depths)
    try:
        return timm.create_model(name, pretrained=True, **arguments)
    except OSError as error:
        raise DataError(f"meta.init = {init!r} cannot be fetched: {_line(error)}") from None
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError, RuntimeError) as error:
        raise ConfigError(f"meta.init = {init!r} cannot be loaded: {_line(error)}") from None


def _read(path: Path, family: TimmFamily) -> dict[str, Tensor]:
    """Read the state dict of a run, an artifact or an export, of a safetensors file, or of a file of ``torch.save``."""
    if path.is_dir():
        return dict(load_model(path)[0].state_dict())
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"meta.init = {str(path)!r}: {_line(error)}") from None
    held = read_torch(path)
    if stages := stages_of(held):
        return join_stages(stages, family)
    wrapped = (held.get(key) for key in ("state_dict", "model")) if isinstance(held, dict) else ()
    for state in (*wrapped, held):
        if state and is_state_dict(state):
            return dict(state)
    raise ArtifactError(f"meta.init = {str(path)!r} holds no state dict, under no key or under state_dict or model")


def _classifier(cfg: Mapping[str, Any]) -> list[str]:
    """Return the names of the tensors of the classifiers (a model may have two), weight first."""
    names = cfg["classifier"]
    return [f"{name}.{kind}" for name in ([names] if isinstance(names, str) else names) for kind in ("weight", "bias")]


def _line(error: Exception) -> str:
    """Return the text of an exception in one line of limited length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else text[:300] + "…"
