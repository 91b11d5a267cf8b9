"""What makes the plain network of src/model.py fast on some device. It never changes what the network computes.

`speed_up` swaps the class of single modules, and so their forward, in a network that exists already. Names, shapes and values
of all parameters stay. Each swap is tested against the plain module; to go without one, delete its line in `swaps`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src import model as plain


def speed_up(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Swap modules of the network for quicker ones, in place. dtype: the precision in which it will run on `device`."""
    table = swaps(device, dtype)
    for module in network.modules():
        module.__class__ = table.get(type(module), type(module))


def swaps(device: torch.device, dtype: torch.dtype) -> dict[type, type]:
    """plain class -> quicker class. What each gains is measured in docs/performance.md."""
    table: dict[type, type] = {}
    if dtype != torch.float32:
        table[nn.GroupNorm] = LowPrecisionNorm
    if device.type == "cpu":
        table[plain.Upsample] = FourProductUpsample
        if dtype == torch.bfloat16:
            table[nn.GroupNorm] = QuickNorm
            table[plain.Attention] = FormulaAttention
    return table


class LowPrecisionNorm(nn.GroupNorm):
    """GroupNorm in the precision of its input. Autocast would lift it, and what it keeps for the backward pass, to float32:
    twice the memory for nothing, because the kernels sum in float32 in any case."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class QuickNorm(LowPrecisionNorm):
    """The same on a CPU, with its derivative written out: PyTorch's takes three times as long (channels_last in bf16)."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.dtype == torch.bfloat16 and x.is_contiguous(memory_format=torch.channels_last):
            return _QuickNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return super().forward(x)


class _QuickNorm(torch.autograd.Function):
    """group_norm over [B, S^2, C], which is how channels_last lies in memory. The backward pass has no derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        batch, channels, height, width = x.shape
        y, mean, rstd = torch.native_group_norm(x, weight, bias, batch, channels, height * width, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With n = (x - mean) rstd and g = dy weight:  dx = rstd (g - E[g] - n E[g n]), E the mean over a group."""
        if torch.is_grad_enabled():  # mean and rstd are constants here, so a second derivative would be wrong
            raise RuntimeError("This GroupNorm has no second derivative (create_graph=True). Use the network without speed_up.")
        x, weight, mean, rstd = ctx.saved_tensors
        high, size, weight = torch.promote_types(x.dtype, torch.float32), x.shape[2:], weight.view(mean.shape[1], -1)
        mean, rstd = (a.to(high)[:, :, None] for a in (mean, rstd))  # a compiler thinks that they are in x.dtype
        dy, x = (a.permute(0, 2, 3, 1).flatten(1, 2) for a in (grads[0], x))  # [B, S^2, C], views of channels_last

        def row(a: Tensor) -> Tensor:
            return a.expand(-1, -1, weight.shape[1]).flatten(1)[:, None].to(x.dtype)  # [B, 1, C]

        def per_channel(a: Tensor) -> Tensor:
            return a.sum(1).to(high).unflatten(1, weight.shape)  # [B, groups, C / groups]

        # n = (near - rest) rstd. Before any product is rounded to bf16: where |mean| is many deviations, x - mean cancels.
        near, rest = x - row(mean), mean - mean.to(x.dtype).to(high)
        sum_dy = per_channel(dy)
        sum_dy_n = (per_channel(dy * near) - rest * sum_dy) * rstd
        mean_g, mean_g_n = ((weight * s).mean(2, keepdim=True) / size.numel() for s in (sum_dy, sum_dy_n))
        dx = row(rstd * (rest * rstd * mean_g_n - mean_g))  # what is the same for all pixels: rstd (rest rstd E[g n] - E[g])
        dx = torch.addcmul(dx, near, row(-rstd * rstd * mean_g_n))  # - rstd (near rstd) E[g n]
        dx = torch.addcmul(dx, dy, row(rstd * weight))  # rstd g
        dx = dx.unflatten(1, size).permute(0, 3, 1, 2)
        return dx, sum_dy_n.sum(0).flatten(), sum_dy.sum(0).flatten(), None, None


class FormulaAttention(plain.Attention):
    """Attention by its formula while training: on a CPU the fused kernel's backward pass takes 2 to 4 times as long in bf16."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not q.requires_grad:
            return super().attend(q, k, v)
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


class FourProductUpsample(plain.Upsample):
    """Upsample with 4 products for each output pixel instead of 9. The nine weights meet only 2x2 different pixels, so those
    that meet the same one are summed first, once for each parity of the output's rows and columns."""

    # What output rows of either parity see of the input, by row of the kernel: (above, own, own), (own, own, below).
    ROWS = ((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1))  # [parity, input row, kernel row]

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # sums in float32
            rows = self.weight.new_tensor(self.ROWS)
            kernels = torch.einsum("pik,qjl,ockl->pqocij", rows, rows, self.weight)

        def part(p: int, q: int) -> Tensor:
            return F.conv2d(F.pad(x, (1 - q, q, 1 - p, p)), kernels[p, q], self.bias).permute(0, 2, 3, 1)  # [B, S, S, dim]

        doubled = torch.stack([torch.stack([part(p, 0), part(p, 1)], dim=3) for p in (0, 1)], dim=2)  # [B, S, 2, S, 2, dim]
        return doubled.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
