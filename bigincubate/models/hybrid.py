"""Build hybrids from existing models: one module of the target in place of its counterpart in the meta model.

The trainer builds a hybrid as a new model of another depth. The functions here combine the blocks of two existing
models instead, so that other training loops need no recipe. The result is the same model.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

from torch import Tensor, nn

from ..errors import ConfigError, check_integer
from .checks import check_model
from .drop_path import replace_drop_path
from .partition import Partition, check_depths, default_meta_depths, hybrid_depths
from .surgery import extract, freeze_other_modules, initialize, insert, rename_tensors

HYBRID = "bigincubate_hybrid"  # attribute of a model that `build_hybrid` returned


class Hybrid(NamedTuple):
    """The information about a hybrid that `extract_module` needs.

    Attributes:
        module: The module that is trained.
        partition: The hybrid's partition.
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

    Only the parameters of the module require gradients, so autograd records nothing before the module and computes no
    weight gradients after it. The drop-path layers of the module are those of the target; frozen blocks drop nothing.
    The whole hybrid is in training mode. It is a copy: ``target`` and ``meta`` do not change.

    Args:
        target: The deep model. The module starts with its weights.
        meta: The pre-trained shallow model, of the same class, width and input size.
        module: Index of the module to train, from 0 to K-1.
        partition: The target's partition. The default, for models without stages, has one module per block of the meta
            model, of equal depths.
        meta_partition: The meta model's partition. The default has one block per module and stage (two where the
            family needs it).

    Returns:
        The hybrid, on the device of ``meta``.

    Raises:
        ConfigError: There is no such module, or the two models are incompatible.

    Example:
        >>> target = timm.create_model("vit_small_patch16_224", num_classes=10)
        >>> meta = timm.create_model("vit_small_patch16_224", num_classes=10, depth=4)
        >>> hybrid = bi.build_hybrid(target, meta, module=0)  # 6 blocks, of which 3 train
    """
    check_integer("module", module, least=0)
    partition, meta_partition = _match(target, meta, partition, meta_partition)
    if module not in range(partition.modules):
        raise ConfigError(f"module = {module}: the target has modules 0 to {partition.modules - 1}")
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
    check_model(hybrid, own_partition)  # blocks must be equal except for their drop-path rates
    for path, child in dropped.items():
        if path.startswith(tuple(f"{block_path}." for block_path in trained)):
            hybrid.set_submodule(path, child)
    freeze_other_modules(hybrid, own_partition, module)
    setattr(hybrid, HYBRID, Hybrid(module, own_partition, partition))
    return hybrid.train()


def extract_module(hybrid: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a hybrid's trained module under their names in the target.

    Args:
        hybrid: A model returned by `build_hybrid`.

    Returns:
        Copies of the tensors by name, for `assemble`.

    Raises:
        ConfigError: The model was not returned by `build_hybrid`.

    Example:
        >>> modules = [bi.extract_module(hybrid) for hybrid in hybrids]
        >>> target.load_state_dict(bi.assemble(modules, target))
    """
    about = getattr(hybrid, HYBRID, None)
    if not isinstance(about, Hybrid):
        raise ConfigError(
            "extract_module needs the model that build_hybrid returned; if it is wrapped, for example by DDP, pass the"
            " wrapped model, such as model.module"
        )
    tensors = extract(hybrid.state_dict(), about.partition, about.module)
    renamed = rename_tensors(tensors, about.partition, about.target_partition)
    return {name: tensor.detach().clone() for name, tensor in renamed.items()}


def grow(
    target: nn.Module, meta: nn.Module, partition: Partition | None = None, meta_partition: Partition | None = None
) -> None:
    """Initialize the target so that it computes the same function as the meta model.

    The first blocks of each module are copied from its counterpart. Its other blocks become the identity: the last
    projection of each residual branch (or the norm after it) is set to zero. Stem, final norm and head are copied.
    Hybrids built from this target start with the loss of the meta model. In a recipe: ``incubate.init = "grow"``.

    Args:
        target: The deep model; its weights are changed in place.
        meta: The pre-trained shallow model.
        partition: The target's partition; see `build_hybrid`.
        meta_partition: The meta model's partition; see `build_hybrid`.

    Raises:
        ConfigError: The two models are incompatible, or blocks of this class cannot be made the identity.

    Example:
        >>> bi.grow(target, meta)
        >>> hybrid = bi.build_hybrid(target, meta, module=0)
    """
    partition, meta_partition = _match(target, meta, partition, meta_partition)
    initialize(target, partition, range(partition.modules), meta.state_dict(), meta_partition, "grow")


def _is_drop_path(path: str) -> bool:
    return path.rpartition(".")[2].startswith("drop_path")


def _match(
    target: nn.Module, meta: nn.Module, partition: Partition | None, meta_partition: Partition | None
) -> tuple[Partition, Partition]:
    """Replace missing partitions by their defaults, check that the models are compatible, and return both partitions.

    Raises:
        ConfigError: The models are incompatible, or there is no default partition for them.
    """
    for name, given in (("target", target), ("meta", meta)):
        if not isinstance(given, nn.Module):
            raise ConfigError(f"{name} is a {type(given).__name__}; pass a timm model")
    if partition is None:
        modules = meta_partition.modules if meta_partition else sum(Partition.from_model(meta).stage_depths)
        partition = Partition.from_model(target, modules=modules)
    family = partition.family
    if meta_partition is None:
        meta_partition = Partition(family, default_meta_depths(partition.depths, family.parity))
    for name, model, own_partition in (("target", target, partition), ("meta", meta, meta_partition)):
        if (found := family.count_blocks(model.state_dict())) != own_partition.stage_depths:
            raise ConfigError(
                f"the {name} model has {_join_depths(found)} blocks, but its partition has"
                f" {_join_depths(own_partition.stage_depths)}: pass"
                f" {'partition' if name == 'target' else 'meta_partition'} = Partition.from_model(model, depths=...)"
            )
    check_depths(family, partition.depths, meta_partition.depths)
    needed = target.state_dict()
    for name, tensor in rename_tensors(meta.state_dict(), meta_partition, partition).items():
        if name not in needed or needed[name].shape != tensor.shape:
            target_shape = tuple(needed[name].shape) if name in needed else "missing"
            raise ConfigError(
                f"tensor {name!r} is {target_shape} in the target and {tuple(tensor.shape)} in the meta model: both"
                " models must have the same Python class, width, input size and number of classes"
            )
    return partition, meta_partition


def _join_depths(depths: tuple[int, ...]) -> str:
    return " + ".join(map(str, depths))
