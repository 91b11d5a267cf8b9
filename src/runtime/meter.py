"""Means of what training does, gathered on the device."""

import torch
from torch import Tensor

from src.runtime.distributed import World

QUARTERS = ("1_least_noise", "2", "3", "4_most_noise")  # of [0, T)


class Meter:
    """Sums of the loss, by quarter of t, and of the gradient norm, kept on the device: nothing waits until `read`.

    What is not finite is left out: under fp16 a step whose gradients overflow is skipped, and happens every so often.
    """

    def __init__(self, time_steps: int, device: torch.device):
        self.time_steps = time_steps
        self.sums = torch.zeros(2, 4, device=device)  # loss, images
        self.norms = torch.zeros(2, device=device)  # gradient norm, steps

    def add(self, losses: Tensor, t: Tensor) -> None:
        """losses: [B] float32.   t: [B] int64."""
        quarter = t * 4 // self.time_steps
        self.sums.index_add_(1, quarter, torch.stack(finite(losses.detach())))

    def add_norm(self, norm: Tensor) -> None:
        self.norms += torch.stack(finite(norm))

    def collect(self, world: World) -> None:
        """Bring the losses of all processes together in the first one, which logs and saves."""
        world.sum(self.sums)
        if not world.is_main:
            self.sums.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """So that the first point after a resume is the mean that the uninterrupted run would have shown."""
        return {"sums": self.sums, "norms": self.norms}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.sums.copy_(state["sums"])
        self.norms.copy_(state["norms"])

    def read(self) -> dict[str, float]:
        """The means since the last read, by TensorBoard tag; waits for the device. What had no value is left out."""
        losses, images = self.sums.tolist()
        norm, steps = self.norms.tolist()
        self.sums.zero_()
        self.norms.zero_()
        totals = {"loss/train": (sum(losses), sum(images)), "optimizer/gradient_norm": (norm, steps)}
        totals |= {f"loss_by_t/{q}": (loss, n) for q, loss, n in zip(QUARTERS, losses, images)}
        return {tag: total / count for tag, (total, count) in totals.items() if count}


def finite(values: Tensor) -> list[Tensor]:
    """The values with 0 for what is not finite, and 1 for each that is, else 0."""
    is_finite = values.isfinite()
    return [values.where(is_finite, 0), is_finite.to(values.dtype)]
