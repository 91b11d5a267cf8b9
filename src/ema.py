"""The running average of the weights, from which images are drawn (Ho et al. 2020, app. B)."""

from copy import deepcopy

import torch
from torch import Tensor, nn


class EMA:
    """`ema.model` is a copy of the network that holds the average of its weights. It is never trained.

    decay: per optimizer step, in [0, 1); 0 follows the raw weights. Early on it is lower, (1 + step) / (10 + step), so that
    the random initial weights are soon forgotten: the average then trails the weights by about a tenth of the steps done.
    Buffers, which our network has none of, are copied: statistics of a BatchNorm follow, and constants stay what they are.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.model = deepcopy(model).eval().requires_grad_(False)
        self.averages: list[Tensor] = list(self.model.parameters())
        self.weights: list[Tensor] = list(model.parameters())
        self.buffers: list[tuple[Tensor, Tensor]] = list(zip(self.model.buffers(), model.buffers()))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after optimizer step number `step`; 0 is the first."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averages, self.weights, 1 - decay)
        for copy, buffer in self.buffers:
            copy.copy_(buffer)
