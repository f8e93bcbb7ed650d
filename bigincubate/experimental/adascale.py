"""AdaScale (Johnson et al., ICML 2020, arXiv:2007.05105): scale learning rates by the noise of the gradients.

Enabled by ``optim.lr_scaling = "bigincubate.experimental.adascale:AdaScale"``.

A step averages S gradients, one per micro-batch and rank. ``train.lr`` and the schedule refer to the batch size of one
such gradient. Each step multiplies the scheduled rate by a *gain* between 1 (all S gradients are equal, so one would
have been enough) and S (they are pure noise, which averaging reduces). The schedule still counts optimizer steps, so
epochs and ``train.max_steps`` keep their meaning. (In the paper, a step of gain r counts as r steps.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..config import Settings
from ..distributed.process_group import DistributedContext
from ..errors import ConfigError
from ..sharding import Sharding

SGD = ("sgd", "momentum", "nesterov")  # parts of timm's names for variants of SGD


class AdaScale:
    """Compute the gain of each step and multiply the learning rates by it.

    From the gradients g_1 … g_S of a step and their mean g, the paper (appendix B.3) computes unbiased estimates of the
    variance of one gradient and the square of the true gradient::

        var = (sum |g_i|^2 - S |g|^2) / (S - 1)        sqr = |g|^2 - var / S

    Both are clamped at zero and averaged with decay max(0, 1 - S / 1000). Then::

        r = (var + sqr) / (var / S + sqr)

    ``noise`` is the average of var / S. The averages start at zero; this bias cancels in the ratio.

    The gain is r for SGD. Other optimizers (AdamW, LAMB, …) divide by the size of their gradients. The size of the mean
    gradient is 1 / sqrt(r) times that of a single gradient, so their steps already contain a factor of sqrt(r). Their
    gain is therefore only sqrt(r), as in AdaptDL (Qiao et al., OSDI 2021); for pure noise this is the square root rule.
    Decoupled weight decay is multiplied like the learning rate.

    Norms are over all trainable parameters, before clipping. Steps with non-finite gradients do not change the
    averages. The host waits for the norm in every step.

    fairscale's AdaScale is not used because it needs all reduced gradients on every rank (ShardedDataParallel keeps
    them only on their owner), computes one gain per parameter group, clamps the variance at 1e-6 (too large for small
    gradients that agree), never recovers from a non-finite gradient, and supports only SGD according to its
    documentation.

    Args:
        model: The model before the sharding strategy wraps it, with frozen parameters already frozen.
        settings: The settings of the phase.
        sharding: The sharding strategy before the call of ``prepare``.
        env: The process group.
        micro_batches: Number of micro-batches per rank and step.

    Attributes:
        contributions: S, the number of gradients that a step averages.

    Raises:
        ConfigError: A step has only one gradient, or the sharding strategy does not give access to the gradients of
            each rank.
    """

    def __init__(
        self, model: nn.Module, settings: Settings, sharding: Sharding, env: DistributedContext, micro_batches: int
    ) -> None:
        self.sharding, self.env = sharding, env
        self.contributions = env.world * micro_batches
        if self.contributions < 2:
            raise ConfigError(
                f'optim.lr_scaling = "{settings.optim.lr_scaling}" compares several gradients per step, but here'
                f" a step has only one; use more ranks or train.micro_batch <= {settings.train.batch_size // 2}"
            )
        sharding.register_pre_step_hook(self.scale_learning_rates)
        self.micro_batches = micro_batches
        self.decay = max(0.0, 1 - self.contributions / 1000)
        self.power = 1.0 if any(word in settings.optim.name.lower() for word in SGD) else 0.5
        self.noise = self.signal = 0.0
        self.norms: list[Tensor] = []  # gradient norms by parameter and micro-batch, of this rank and step
        for parameter in model.parameters():
            if parameter.requires_grad:  # the hook runs before accumulation and before communication
                parameter.register_hook(lambda gradient: self.norms.append(torch.linalg.vector_norm(gradient)))

    @property
    def gain(self) -> float:
        """The factor that the learning rates of the last step were multiplied by."""
        square = self.noise + self.signal
        return ((self.contributions * self.noise + self.signal) / square) ** self.power if square else 1.0

    def scale_learning_rates(self, norm: Tensor) -> None:
        """Update the averages from this step's gradients and multiply the learning rates by the gain.

        Args:
            norm: Norm of the mean gradient, a scalar.
        """
        total = self.env.sum_over_ranks(torch.stack(self.norms).double().square().sum()).item()
        self.norms.clear()
        count = self.contributions
        mean_square = total * self.micro_batches**2 / count  # losses were divided by the number of micro-batches
        square = norm.item() ** 2
        if math.isfinite(mean_square + square):
            noise = (mean_square - square) / (count - 1)
            self.noise += (1 - self.decay) * (max(noise, 0.0) - self.noise)
            self.signal += (1 - self.decay) * (max(square - noise, 0.0) - self.signal)
        for group in self.sharding.optimizer.param_groups:
            group["lr"] *= self.gain

    def state(self) -> dict[str, float]:
        """Return the state for a checkpoint, equal on all ranks."""
        return {"contributions": self.contributions, "noise": self.noise, "signal": self.signal}

    def load_state(self, state: dict[str, float]) -> None:
        """Restore a state returned by `state`.

        Raises:
            ConfigError: The checkpoint has another number of gradients per step, on which the right ``train.lr``
                depends.
        """
        if (before := state["contributions"]) != self.contributions:
            raise ConfigError(
                f"optim.lr_scaling: AdaScale averaged {int(before)} gradients per step (ranks x micro-batches), and now"
                f" {self.contributions}; change train.micro_batch so that the number is the same"
            )
        self.noise, self.signal = state["noise"], state["signal"]
