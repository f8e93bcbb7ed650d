"""Initialize a whole model that is trained from random weights."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..config import ModelInit
from ..errors import ConfigError
from .partition import Partition


def initialize_model(model: nn.Module, partition: Partition, init: ModelInit) -> None:
    """Change the random weights that the library gave a new model, as ``init`` says.

    - ``"plain"`` changes nothing.
    - ``"scaled"`` divides the last layer of each residual branch by the square root of the number of branches, 2·depth
      in a ViT, so that the branches together add as much as one does (as in GPT-2: Radford et al., 2019, section 2.3).
    - ``"mimetic"`` makes attention resemble that of pretrained ViTs (see `ModelFamily.initialize_mimetic`).

    Random numbers come from torch's default generator, like those of the library.

    Args:
        model: A new model; on the meta device, this only checks that the model supports the initialization.
        partition: Its partition.
        init: The initialization.

    Raises:
        ConfigError: The model does not support the initialization.
    """
    if init == "scaled":
        scale_residual_outputs(model, partition)
    elif init == "mimetic":
        partition.family.initialize_mimetic(model, partition)


@torch.no_grad()
def scale_residual_outputs(model: nn.Module, partition: Partition) -> None:
    """Divide the last layer of each residual branch by the square root of the number of branches.

    Raises:
        ConfigError: The family does not know the last layers of blocks of this class, or its library divides them.
    """
    if partition.family.scales_residual_outputs:
        raise ConfigError(
            f'end_to_end.init = "scaled": new {partition.family.name} models are scaled in this way already; choose'
            ' "plain"'
        )
    blocks = [model.get_submodule(block.path) for block in partition.blocks()]
    outputs = [output for block in blocks for output in partition.family.residual_outputs(block)]
    for output in outputs:
        for parameter in output.parameters():
            parameter.div_(math.sqrt(len(outputs)))
