"""A model family that is neither timm's nor for images: residual MLPs on vectors, with dotted parameter names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bigincubate.config import ModelConfig
from bigincubate.models.base import Depths, ModelFamily
from bigincubate.models.drop_path import DropPath
from bigincubate.models.partition import Partition

INPUTS, OUTPUTS = 6, 3


class TinyBlock(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.drop_path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.down(self.up(x).relu()))


class TinyBackbone(nn.Module):
    def __init__(self, width: int, hiddens: list[int]) -> None:
        super().__init__()
        self.embed = nn.Linear(INPUTS, width)
        self.layers = nn.ModuleList(TinyBlock(width, hidden) for hidden in hiddens)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class TinyModel(nn.Module):
    def __init__(self, width: int, hiddens: list[int], tied: bool) -> None:
        super().__init__()
        self.model = TinyBackbone(width, hiddens)
        self.head = nn.Linear(width, INPUTS if tied else OUTPUTS, bias=False)
        if tied:
            self.head.weight = nn.Parameter(self.model.embed.weight.T.contiguous())
            self.model.embed.weight = nn.Parameter(self.head.weight.detach().T)  # another view of the same storage
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)  # computed by each model: in no module

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scale * self.model(x))


@dataclass(frozen=True, kw_only=True)
class TinyFamily(ModelFamily):
    def build(self, model: ModelConfig, depths: Depths, *, device: str = "cpu") -> nn.Module:
        (depth,) = Partition(self, depths).stage_depths
        hiddens = [8 + index * model.args.get("wider", 0) for index in range(depth)]
        with torch.device(device):
            return TinyModel(model.args.get("width", 4), hiddens, model.args.get("tied", False))

    def default_depths(self, model: ModelConfig) -> tuple[int, ...]:
        return (6,)

    def example_inputs(self, model: ModelConfig, count: int, device: str) -> Tensor:
        return torch.zeros(count, INPUTS, device=device)

    def residual_outputs(self, block: nn.Module) -> list[nn.Module]:
        return [block.get_submodule("down")]


FAMILY = TinyFamily(
    name="tiny",
    library="tiny_family:find_family",
    stages=1,
    block="model.layers.{block}",
    stem=("model",),
    tail=("model.norm", "head"),  # the longer prefix wins
)


def find_family(model: ModelConfig) -> ModelFamily:
    assert model.library == FAMILY.library
    return FAMILY


def not_a_family(model: ModelConfig) -> str:
    return model.name
