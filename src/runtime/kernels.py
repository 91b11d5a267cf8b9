"""GroupNorm in the precision of its input, with a backward pass that is quick on a CPU too."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """GroupNorm that stays in the precision of its input. Autocast would lift it, and what it keeps for the
    backward pass, to float32: twice the memory, for nothing, since the kernels sum in float32 all the same."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, S, S].   Returns the same shape and precision."""
        if torch.is_grad_enabled() and is_slow(x):
            return _GroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def is_slow(x: Tensor) -> bool:
    """Whether PyTorch's backward pass takes three times as long as the formula (torch 2.15; docs/performance.md)."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.is_contiguous(memory_format=torch.channels_last)


class _GroupNorm(torch.autograd.Function):
    """group_norm with its derivative written out over [B, S^2, C], which is how channels_last lies in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        batch, channels, height, width = x.shape
        y, mean, rstd = torch.native_group_norm(x, weight, bias, batch, channels, height * width, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With n = (x - mean) rstd and g = dy weight:  dx = rstd (g - E[g] - n E[g n]), E the mean over a group."""
        x, weight, mean, rstd = ctx.saved_tensors
        size = x.shape[2:]
        dy, x = (a.permute(0, 2, 3, 1).flatten(1, 2) for a in (grads[0], x))  # [B, S^2, C], views of channels_last
        by_group = (*mean.shape, -1)  # [B, groups, C / groups]
        weight, mean, rstd = weight.view(mean.shape[1], -1), mean[:, :, None], rstd[:, :, None]
        sum_dy = dy.sum(1).float().view(by_group)
        sum_dy_n = ((dy * x).sum(1).float().view(by_group) - mean * sum_dy) * rstd
        mean_g, mean_g_n = ((weight * s).mean(2, keepdim=True) / size.numel() for s in (sum_dy, sum_dy_n))

        def row(a: Tensor) -> Tensor:
            return a.expand_as(sum_dy).flatten(1)[:, None].to(x.dtype)  # [B, 1, C]

        dx = torch.addcmul(row(rstd * (mean * rstd * mean_g_n - mean_g)), x, row(-rstd * rstd * mean_g_n))
        dx = torch.addcmul(dx, dy, row(rstd * weight)).unflatten(1, size).permute(0, 3, 1, 2)
        return dx, sum_dy_n.sum(0).flatten(), sum_dy.sum(0).flatten(), None, None
