"""AdaScale (Johnson et al., ICML 2020, arXiv:2007.05105): the learning rate grows as far as averaging gradients helps.

A step averages S gradients, one a *contribution*: a micro-batch of a rank. ``train.lr`` and the schedule are those for
the batch of a single contribution; each step multiplies what they say by a *gain* between 1 (the S gradients agree: one
would have done) and S (they are noise that averaging takes away). The schedule still counts optimizer steps, so epochs
and ``train.max_steps`` mean what they always mean. (The paper counts a step of gain r as r steps, and ends earlier.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..cluster.env import RunEnv
from ..config import Settings
from ..errors import ConfigError
from ..sharding import Sharding

SGD = ("sgd", "momentum", "nesterov")  # what timm's names of it and of its variants contain


class AdaScale:
    """The gain of each step, and the learning rates times the gain.

    From the gradients g_1 … g_S of a step and their mean g, the paper (appendix B.3) estimates without bias the
    variance of a contribution and the square of the true gradient::

        var = (sum |g_i|^2 - S |g|^2) / (S - 1)        sqr = |g|^2 - var / S

    takes moving averages of both, cut off below zero, with decay max(0, 1 - S / 1000), and sets::

        r = (var + sqr) / (var / S + sqr)

    Here ``noise`` is var / S. The averages start at zero: what they lack at first cancels in the ratio.

    The gain is r for SGD. The other optimizers (AdamW, LAMB, …) divide by the size of their gradients; that of
    a mean is 1 / sqrt(r) of a contribution's, so that sqrt(r) is in their steps already. Their gain is the other
    sqrt(r), as in AdaptDL (Qiao et al., OSDI 2021); where all is noise this is the square root rule. Decoupled
    weight decay goes with the learning rate, as always.

    Norms are of all trainable parameters together, before clipping. A step that is not finite leaves the averages as
    they are. The host waits for the norm in every step.

    fairscale's AdaScale is not used: it wants every reduced gradient on every rank, which ShardedDataParallel leaves on
    the owner; it gives each parameter group (with and without weight decay) a gain of its own; it lets no variance
    below 1e-6, which small gradients fall short of though they agree; a gradient that is not finite stays in its
    averages for ever; and by its documentation it is for SGD only.

    Args:
        model: frozen as it will stay, not yet wrapped.
        sharding: not yet prepared.
        micro_batches: of a rank in a step.

    Raises:
        ConfigError: a step has a single contribution, or the strategy shows no gradient of one.
    """

    def __init__(
        self, model: nn.Module, settings: Settings, sharding: Sharding, env: RunEnv, micro_batches: int
    ) -> None:
        self.sharding, self.env = sharding, env
        self.contributions = env.world * micro_batches
        if self.contributions < 2:
            raise ConfigError(
                'optim.lr_scaling = "adascale" compares the gradients within a step, and here a step has only one;'
                f" use more ranks, or a train.micro_batch of at most {settings.train.batch_size // 2}"
            )
        sharding.before_update(self.rescale)
        self.micro_batches = micro_batches
        self.decay = max(0.0, 1 - self.contributions / 1000)
        self.power = 1.0 if any(word in settings.optim.name.lower() for word in SGD) else 0.5
        self.noise = self.signal = 0.0
        self.norms: list[Tensor] = []  # of each parameter's gradient in each micro-batch of this rank and step
        for parameter in model.parameters():
            if parameter.requires_grad:  # called before the gradient is added to others, and before it travels
                parameter.register_hook(lambda gradient: self.norms.append(torch.linalg.vector_norm(gradient)))

    @property
    def gain(self) -> float:
        """What the last step's learning rates were multiplied by."""
        square = self.noise + self.signal
        return ((self.contributions * self.noise + self.signal) / square) ** self.power if square else 1.0

    def rescale(self, norm: Tensor) -> None:
        """Take in the gradients of this step, of whose mean ``norm`` is the norm, and multiply the learning rates."""
        total = self.env.sum(torch.stack(self.norms).double().square().sum()).item()
        self.norms.clear()
        count = self.contributions
        each = total * self.micro_batches**2 / count  # a micro-batch's loss was divided by their number
        square = norm.item() ** 2
        if math.isfinite(each + square):
            noise = (each - square) / (count - 1)
            self.noise += (1 - self.decay) * (max(noise, 0.0) - self.noise)
            self.signal += (1 - self.decay) * (max(square - noise, 0.0) - self.signal)
        for group in self.sharding.optimizer.param_groups:
            group["lr"] *= self.gain

    def state(self) -> dict[str, float]:
        """For a checkpoint; the same on all ranks."""
        return {"contributions": self.contributions, "noise": self.noise, "signal": self.signal}

    def load(self, state: dict[str, float]) -> None:
        """
        Raises:
            ConfigError: the checkpoint had another number of contributions, for whose batch ``train.lr`` was.
        """
        if (before := state["contributions"]) != self.contributions:
            raise ConfigError(
                f'optim.lr_scaling = "adascale": a step had {int(before)} gradients (ranks x micro-batches), and now'
                f" {self.contributions}; go on with the same number, by another train.micro_batch"
            )
        self.noise, self.signal = state["noise"], state["signal"]
