"""Hybrids of models that a user has built: a module of the target in place of its counterpart in the meta model.

The trainer builds a hybrid as a model of another depth. Here it is put together from the blocks of two models that
exist, so that a training loop outside of this package needs no recipe. Both give the same model.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

from torch import Tensor, nn

from ..errors import ConfigError
from .checks import check_model
from .drop_path import replace_drop_path
from .partition import Partition, check_depths, default_meta_depths, hybrid_depths
from .surgery import extract, freeze_other_modules, initialize, insert, rename_tensors

HYBRID = "bigincubate_hybrid"  # attribute of a model that `build_hybrid` returned


class Hybrid(NamedTuple):
    """What `extract_module` needs to know about a hybrid.

    Attributes:
        module: The module that trains.
        partition: The hybrid's own partition.
        target_partition: The target's partition.
    """

    module: int
    partition: Partition
    target_partition: Partition


def build_hybrid(
    target: nn.Module,
    meta: nn.Module,
    module: int,
    partition: Partition | None = None,
    meta_partition: Partition | None = None,
) -> nn.Module:
    """Return the meta model with one module of the target in place of its counterpart.

    The hybrid trains as in the trainer. Only the parameters of the module require a gradient, so autograd records
    nothing before the module and computes no weight gradients after it. The drop-path layers of the module stay as they
    are in the target; frozen blocks drop nothing. The hybrid is in training mode as a whole. It is a copy: neither
    ``target`` nor ``meta`` changes.

    Args:
        target: The deep model. Its weights are what the module starts from.
        meta: The pre-trained shallow model, of the same class, width and input size.
        module: Which module to train, from 0 to K-1.
        partition: How the target is cut. None, for a model without stages: into as many modules as the meta model has
            blocks, cut evenly.
        meta_partition: How the meta model is cut. None: one block per module and stage (two where the family needs it).

    Returns:
        The hybrid, on the device of ``meta``.

    Raises:
        ConfigError: There is no such module, or the two models do not fit each other.

    Example:
        >>> target = timm.create_model("vit_small_patch16_224", num_classes=10)
        >>> meta = timm.create_model("vit_small_patch16_224", num_classes=10, depth=4)
        >>> hybrid = bi.build_hybrid(target, meta, module=0)  # 6 blocks, of which 3 train
    """
    partition, meta_partition = _match(target, meta, partition, meta_partition)
    if module not in range(partition.modules):
        raise ConfigError(f"module = {module}: the target is cut into modules 0 to {partition.modules - 1}")
    family, own = partition.family, hybrid_depths(partition.depths, meta_partition.depths, module)
    hybrid, own_partition = copy.deepcopy(meta), Partition(family, own)
    device = next(hybrid.parameters()).device

    stages: list[list[nn.Module]] = [[] for _ in range(family.stages)]
    for block in own_partition.blocks():
        trains = block.module == module
        source = partition if trains else meta_partition
        found = (target if trains else hybrid).get_submodule(
            source.block_path(block.module, block.stage, block.index_in_module)
        )
        stages[block.stage].append(copy.deepcopy(found).to(device) if trains else found)
    for stage, blocks in enumerate(stages):
        container = hybrid.get_submodule(family.block_path(stage, 0).rpartition(".")[0])
        assert isinstance(container, nn.Sequential | nn.ModuleList)
        del container[:]
        container.extend(blocks)
    insert(hybrid, own_partition, extract(target.state_dict(), partition, module), partition)

    trained = [block.path for block in own_partition.blocks() if block.module == module]
    dropped = {path: child for path, child in hybrid.named_modules() if _is_drop_path(path)}
    for block in own_partition.blocks():
        replace_drop_path(hybrid.get_submodule(block.path))
    check_model(hybrid, own_partition)  # blocks must be alike up to their drop-path rates
    for path, child in dropped.items():
        if path.startswith(tuple(f"{block_path}." for block_path in trained)):
            hybrid.set_submodule(path, child)
    freeze_other_modules(hybrid, own_partition, module)
    setattr(hybrid, HYBRID, Hybrid(module, own_partition, partition))
    return hybrid.train()


def extract_module(hybrid: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the module that a hybrid trains, under the names that they have in the target.

    Args:
        hybrid: A model that `build_hybrid` returned.

    Returns:
        Copies of the tensors by name, for `assemble`.

    Raises:
        ConfigError: `build_hybrid` did not return this model.

    Example:
        >>> modules = [bi.extract_module(hybrid) for hybrid in hybrids]
        >>> target.load_state_dict(bi.assemble(modules))
    """
    about = getattr(hybrid, HYBRID, None)
    if not isinstance(about, Hybrid):
        raise ConfigError(
            "extract_module takes the model that build_hybrid returned; if DDP or another wrapper holds it, give"
            " the model inside"
        )
    tensors = extract(hybrid.state_dict(), about.partition, about.module)
    renamed = rename_tensors(tensors, about.partition, about.target_partition)
    return {name: tensor.detach().clone() for name, tensor in renamed.items()}


def grow(
    target: nn.Module, meta: nn.Module, partition: Partition | None = None, meta_partition: Partition | None = None
) -> None:
    """Initialize the target so that it computes what the meta model computes.

    Each module starts with the blocks of its counterpart. Its other blocks become the identity: the last projection of
    each residual branch (or the norm after it) is set to zero. Stem, final norm and head are copied. Hybrids built from
    this target then begin with the loss of the meta model. The recipe's ``incubate.init = "grow"`` does the same.

    Args:
        target: The deep model; its weights are changed in place.
        meta: The pre-trained shallow model.
        partition: How the target is cut; see `build_hybrid`.
        meta_partition: How the meta model is cut; see `build_hybrid`.

    Raises:
        ConfigError: The two models do not fit each other, or blocks of this class cannot be made the identity.

    Example:
        >>> bi.grow(target, meta)
        >>> hybrid = bi.build_hybrid(target, meta, module=0)
    """
    partition, meta_partition = _match(target, meta, partition, meta_partition)
    state = meta.state_dict()
    for module in range(partition.modules):
        initialize(target, partition, module, state, meta_partition, "grow")


def _is_drop_path(path: str) -> bool:
    return path.rpartition(".")[2].startswith("drop_path")


def _match(
    target: nn.Module, meta: nn.Module, partition: Partition | None, meta_partition: Partition | None
) -> tuple[Partition, Partition]:
    """Return the partitions of both models, with defaults for those that are None, after checking that they fit.

    Raises:
        ConfigError: They do not fit each other, or a default does not exist.
    """
    if partition is None:
        modules = meta_partition.modules if meta_partition else sum(Partition.from_model(meta).stage_depths)
        partition = Partition.from_model(target, modules=modules)
    family = partition.family
    if meta_partition is None:
        meta_partition = Partition(family, default_meta_depths(partition.depths, family.parity))
    for name, model, cut in (("target", target, partition), ("meta", meta, meta_partition)):
        if (found := family.count_blocks(model.state_dict())) != cut.stage_depths:
            raise ConfigError(
                f"the {name} model has {_shown(found)} blocks, its partition {_shown(cut.stage_depths)}: give"
                f" {'partition' if name == 'target' else 'meta_partition'} = Partition.from_model(model, depths=...)"
            )
    check_depths(family, partition.depths, meta_partition.depths)
    needed = target.state_dict()
    for name, tensor in rename_tensors(meta.state_dict(), meta_partition, partition).items():
        if name not in needed or needed[name].shape != tensor.shape:
            there = tuple(needed[name].shape) if name in needed else "missing"
            raise ConfigError(
                f"tensor {name!r} is {there} in the target and {tuple(tensor.shape)} in the meta model: both need the"
                " same class, width, input size and classes"
            )
    return partition, meta_partition


def _shown(depths: tuple[int, ...]) -> str:
    return " + ".join(map(str, depths))
