"""The running average of the weights, from which pictures are drawn (Ho et al. 2020, app. B)."""

from copy import deepcopy

import torch
from torch import nn


class EMA:
    """`ema.model` is a copy of the network that holds the average of its weights and is never trained.

    decay: per optimizer step, in [0, 1); 0 follows the raw weights. Early on it is lower, (1 + step) / (10 + step), so that
    the random initial weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.model = deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards the weights that stand after optimizer step number `step` (0 is the first).
        Raises ValueError where the two networks differ in names or shapes."""
        ours, theirs = dict(self.model.named_parameters()), dict(model.named_parameters())
        if [(name, p.shape) for name, p in ours.items()] != [(name, p.shape) for name, p in theirs.items()]:
            raise ValueError("the average and the network differ in their parameters")
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ours.values()), list(theirs.values()), 1 - decay)
