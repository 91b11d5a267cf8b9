"""No loss or gradient that is not finite reaches the weights."""

import torch
from torch import Tensor

from src.settings import Settings
from src.utils import UserError


class FiniteGuard:
    """Remembers, on the device, the first step whose loss or gradient norm was not finite, so that no step waits for the
    answer. The optimizer is told at once and skips the step; `check` stops the run when somebody next looks."""

    def __init__(self, device: torch.device):
        self.first_bad = torch.full((), -1, device=device)

    def note(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """loss, norm: scalars of step number `step`. Returns 1.0 where either is not finite, else 0.0."""
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        self.first_bad = torch.where(bad & (self.first_bad < 0), step, self.first_bad)
        return bad.float()

    def check(self, settings: Settings, learning_rate: float) -> None:
        """Wait for the device; raise UserError if any step so far was bad. Call before anything is saved."""
        step = int(self.first_bad)
        if step >= 0:
            raise UserError(
                f"The loss or gradient of step {step:,} is not finite (learning rate {learning_rate:.1e}). It did not reach "
                f"the weights, and {settings.CHECKPOINT_PATH}/latest.pth is the last good state. Try a new run with half the "
                f"--learning_rate, more --warmup_steps, a smaller --grad_clip, or --precision fp32."
            )
