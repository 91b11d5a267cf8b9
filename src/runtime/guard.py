"""No loss or gradient that is not finite reaches the weights."""

import math
from pathlib import Path

import torch
from torch import Tensor

from src.runtime.settings import Settings
from src.utils import UserError


class FiniteGuard:
    """Remembers, on the device, the first step whose loss or gradient norm was not finite, so that no step waits for the
    answer. The optimizer is told at once and skips the step; `check` stops the run when somebody next looks.

    fp16 has its own way: the scaler skips the step and lowers the scale, which ends only where no scale is low enough.
    """

    def __init__(self, device: torch.device):
        self.first_bad = torch.full((), -1, device=device)

    def note(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """loss, norm: scalars of step number `step`. Returns 1.0 where either is not finite, else 0.0."""
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        self.first_bad = torch.where(bad & (self.first_bad < 0), step, self.first_bad)
        return bad.float()

    def check(self, settings: Settings, learning_rate: float, scaler: torch.amp.GradScaler) -> None:
        """Wait for the device; raise UserError if any step so far was bad. Call before anything is saved."""
        step, scale = int(self.first_bad), scaler.get_scale() if scaler.is_enabled() else math.inf
        if step < 0 and scale >= 1:  # the scale halves with each step skipped, from 65536
            return
        latest = Path(settings.CHECKPOINT_PATH) / "latest.pth"
        stands = f"{latest} is the last good state" if latest.exists() else "nothing was saved yet"
        if step >= 0:
            raise UserError(
                f"The loss or gradient of step {step:,} is not finite (learning rate {learning_rate:.1e}). It did not reach "
                f"the weights; {stands}. Run again with half the learning rate (--learning_rate "
                f"{settings.LEARNING_RATE / 2:g} --accept_changes), more --warmup_steps, or --precision fp32."
            )
        raise UserError(
            f"The loss or gradients overflow fp16 even unscaled, so that step after step is skipped (learning rate "
            f"{learning_rate:.1e}); {stands}. Run again with --precision bf16 or fp32."
        )
