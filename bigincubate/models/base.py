"""The interface to a model library: where a model keeps its blocks, and how to build it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ..config import ModelConfig
from ..errors import BigincubateError, ConfigError

if TYPE_CHECKING:
    from .partition import Partition

# the operators with which torch.nn.init and timm set the values of a tensor
INITIALIZERS = {
    getattr(Tensor, f"{name}_") for name in ("add", "clamp", "erfinv", "fill", "mul", "normal", "uniform", "zero")
}
Depths = tuple[tuple[int, ...], ...]  # number of blocks: one inner tuple per module, one entry per stage


@dataclass(frozen=True, kw_only=True)
class ModelFamily(ABC):
    """One architecture of one library.

    To support another library, subclass this (as a frozen dataclass, so that instances can be compared and hashed) and
    set ``model.library = "package.module:function"``. The function takes the recipe's model settings and returns the
    family.

    What a block computes may depend on its index in the stage only modulo ``parity``, because the index changes when
    an earlier module changes its depth. `build` must raise `ConfigError` for any other dependence.

    Attributes:
        name: Short name, used in messages.
        library: Name of the library, as in ``model.library``.
        covers: The models of this family, by their usual names.
        stages: Number of stages; a flat model has one.
        block: Path of a block, with ``{block}`` for its index in the stage and, where there are several stages,
            ``{stage}``, such as ``"model.layers.{block}"``.
        stem: Dotted prefixes of the tensors before the first block.
        tail: Dotted prefixes of the tensors after the last block. A tensor belongs to the longest prefix of its name
            among ``stem`` and ``tail``.
        parity: What a block computes depends on its index in the stage modulo this number.
        drop_path_ramp: Whether the drop-path rate increases linearly from 0 over the blocks; if not, all blocks have
            the same rate.
        scales_residual_outputs: Whether the library already divides the last layers of the residual branches by the
            square root of their number.
    """

    name: str
    library: str
    covers: str = ""
    stages: int
    block: str
    stem: tuple[str, ...]
    tail: tuple[str, ...]
    parity: int = 1
    drop_path_ramp: bool = True
    scales_residual_outputs: bool = False

    @abstractmethod
    def build(self, model: ModelConfig, depths: Depths, *, device: str = "cpu") -> nn.Module:
        """Build a model with new random weights from torch's default generator, which the caller seeds.

        Args:
            model: The recipe's model settings.
            depths: The depths of the model's modules.
            device: ``"cpu"``, or ``"meta"`` for a model without storage.

        Returns:
            A model with a `DropPath` module (rate 0) at each place that supports stochastic depth.

        Raises:
            ConfigError: The settings or the depths do not fit this family, or a block depends on its index.
        """

    @abstractmethod
    def default_depths(self, model: ModelConfig) -> tuple[int, ...]:
        """Return the number of blocks per stage that the library uses for this model.

        Raises:
            ConfigError: The settings do not fit this family.
        """

    @abstractmethod
    def example_inputs(self, model: ModelConfig, count: int, device: str) -> Tensor:
        """Return ``count`` all-zero inputs of the right shape and dtype, for counting costs."""

    def check_target(self, model: ModelConfig, depths: Depths) -> None:
        """Check that the target may have these depths; the default checks nothing.

        Raises:
            ConfigError: It may not.
        """
        del model, depths

    def check_input_size(self, model: ModelConfig) -> None:
        """Check that a model of any depth reads all of its inputs; the default checks nothing.

        Raises:
            ConfigError: It does not.
        """
        del model

    def residual_outputs(self, block: nn.Module) -> list[nn.Module]:
        """Return the last layers of the residual branches: a block is the identity if they are set to zero.

        Raises:
            ConfigError: The family does not define them for this block.
        """
        raise ConfigError(
            f"init = 'grow' or 'scaled' is not supported for blocks of class {type(block).__name__} ({self.name}):"
            " choose 'boundary' or 'fresh', and 'plain' for end_to_end.init"
        )

    def initialize_mimetic(self, model: nn.Module, partition: Partition) -> None:
        """Initialize attention so that it resembles that of pretrained models (arXiv 2305.09828).

        Raises:
            ConfigError: The model does not support it.
        """
        raise ConfigError(f'end_to_end.init = "mimetic" is not supported for {self.name} models; choose "plain"')

    def adapt_state(self, tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Return a model's tensors, adapted to ``model``, which may have a different input size."""
        return dict(tensors)

    def workspace_bytes(self, model: ModelConfig, samples: int) -> int:
        """Return the bytes of temporary tensors that a pass over a micro-batch needs besides the saved activations.

        Only tensors that may be larger than all activations count, such as the logits of a language model.
        """
        return 0

    def smoke_overrides(self, model: ModelConfig, *, larger_inputs: bool) -> dict[str, Any]:
        """Return values for the recipe's ``[model]`` table that make the model small enough for a smoke test.

        Args:
            model: The model settings of a phase.
            larger_inputs: Whether the inputs of this phase are larger than the smallest inputs of any phase; the small
                model should keep the difference.
        """
        return {}

    def choose_attention(self, model: nn.Module, device: torch.device, precision: str) -> None:
        """Choose the fastest attention implementation for a device and precision; the default changes nothing."""
        del model, device, precision

    def use_subset_drop_path(self, model: nn.Module, partition: Partition) -> None:
        """Compute residual branches only for the samples that stochastic depth keeps.

        Raises:
            ConfigError: The model does not support it.
        """
        raise ConfigError(f"train.subset_drop_path: not supported for {self.name} models; set it to false")

    def compute_last_block_for_cls_token_only(self, model: nn.Module, partition: Partition) -> None:
        """Compute only the class token in the last block, if the rest of its output is unused.

        Raises:
            ConfigError: The model does not support it.
        """
        raise ConfigError(f"train.last_block_cls_only: not supported for {self.name} models; set it to false")

    def widths(self, model: nn.Module) -> tuple[int, ...]:
        """Return the widths of a model's blocks, each once, in order; empty if they are unknown."""
        return ()

    def count_block_flops(self, model: ModelConfig, stage_depths: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Count the forward FLOPs of each block for one sample, on the meta device.

        A multiply-add counts as two FLOPs. Only matrix products and convolutions are counted (torch's FLOP counter).

        Args:
            model: The recipe's model settings.
            stage_depths: Number of blocks per stage.

        Returns:
            One tuple per stage, one number per block.

        Raises:
            ConfigError: The model cannot be built, or does not accept its example inputs.
        """
        built, inputs = self.build(model, (stage_depths,), device="meta"), self.example_inputs(model, 1, "meta")
        with explain_argument_errors(model.name), torch.no_grad(), FlopCounterMode(display=False) as counter:
            built(inputs)
        counts, root = counter.get_flop_counts(), type(built).__name__
        return tuple(
            tuple(sum(counts[f"{root}.{self.block_path(stage, index)}"].values()) for index in range(depth))
            for stage, depth in enumerate(stage_depths)
        )

    def drop_path_rates(self, rate: float, depth: int) -> list[float]:
        """Return the drop-path rate of each of ``depth`` blocks; the last one has ``rate``."""
        return torch.linspace(0, rate, depth, device="cpu").tolist() if self.drop_path_ramp else [rate] * depth

    def block_path(self, stage: int, block: int) -> str:
        """Return the path of the block with this index in its stage, such as ``layers.2.blocks.5``."""
        return self.block.format(stage=stage, block=block)

    def count_blocks(self, names: Iterable[str]) -> tuple[int, ...]:
        """Return the number of blocks per stage of a model with these tensor names."""
        prefixes = [self.block.removesuffix("{block}").format(stage=stage) for stage in range(self.stages)]
        names = list(names)
        return tuple(
            len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})
            for prefix in prefixes
        )


@contextmanager
def explain_argument_errors(name: str) -> Iterator[None]:
    """Convert any error that a library raises for a model's arguments into a one-line `ConfigError`.

    Args:
        name: The model's name, for the message.

    Raises:
        ConfigError: The library raised an error.
    """
    try:
        yield
    except (BigincubateError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"model {name!r} cannot be built with these arguments: {reason[0][:300]}") from error


class SkipMetaInitialization(TorchFunctionMode):
    """Do not initialize tensors on the meta device while a model is built.

    They have no values, but initializing them takes most of the time of building a deep model on this device.
    """

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        if function in INITIALIZERS and arguments[0].is_meta:
            return arguments[0]
        return function(*arguments, **(options or {}))
