"""What makes the plain network of src/model.py fast on some device. It never changes what the network computes.

`speed_up` swaps the class of single modules, and so their forward, in a network that exists already. Names, shapes and values
of all parameters stay. Each swap is tested against the plain module; to go without one, delete its line in `swaps`.
LeanResBlock is for CUDA and in no swap until it is measured there: `benchmarks.train_step --variants lean`.
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


class LeanResBlock(plain.ResBlock):
    """ResBlock that keeps each norm's input and not its output for the backward pass: 1 tensor for 2 before the first
    convolution, 1 for 3 before the second. It is plain operations over channels_last, for a compiler to fuse."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x, emb)
        h = self.conv_1(norm_silu(self.norm_1, x))
        h = norm_silu(self.norm_2, h, *self.scale_shift(emb).chunk(2, dim=1))
        return self.skip(x) + self.conv_2(self.dropout(h))


def norm_silu(norm: nn.GroupNorm, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """silu(norm(x) (1 + scale) + shift) in the precision of x, with sums in float32 (of float64: in float64).
    x: [B, C, S, S].   scale, shift: [B, C], or None for neither.   Returns the shape and layout of x."""
    high = torch.promote_types(x.dtype, torch.float32)
    gain, offset = norm.weight.to(high)[None], norm.bias.to(high)[None]  # [1, C]
    if scale is not None and shift is not None:  # two affine maps are one
        gain, offset = gain * (1 + scale.to(high)), offset * (1 + scale.to(high)) + shift.to(high)  # [B, C]
    groups = (norm.num_groups, -1)
    by_group = x.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, groups)  # [B, S^2, groups, C / groups], a view of channels_last
    gain, offset = (a.unflatten(1, groups)[:, None] for a in (gain, offset))  # [1 or B, 1, groups, C / groups]
    # The cast stands outside: torch 2.11 compiles one to the same dtype at the end of a Function to wrong gradients.
    y = _NormSiLU.apply(by_group, gain, offset, norm.eps).to(x.dtype)
    return y.flatten(2).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class _NormSiLU(torch.autograd.Function):
    """silu(z), z = gain n + offset, n = (x - mean) rstd over S^2 and the channels of a group. Shapes as in `norm_silu`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, offset: Tensor, eps: float) -> Tensor:
        var, mean = torch.var_mean(x.to(gain.dtype), (1, 3), correction=0, keepdim=True)  # [B, 1, groups, 1]
        rstd = (var + eps).rsqrt()
        ctx.save_for_backward(x, gain, offset, mean, rstd)
        return F.silu((x - mean) * rstd * gain + offset)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """With dz = dy silu'(z) and g = gain dz:  dx = rstd (g - E[g] - n E[g n]), E the mean over a group. Both means follow
        from the sums over S^2, which gain and offset need as well."""
        if torch.is_grad_enabled():
            raise RuntimeError("This norm has no second derivative (create_graph=True). Use the plain ResBlock.")
        x, gain, offset, mean, rstd = ctx.saved_tensors
        n = (x - mean) * rstd
        z = gain * n + offset
        s = z.sigmoid()
        dz = grads[0] * (s + z * s * (1 - s))
        sum_dz, sum_dz_n = dz.sum(1, keepdim=True), (dz * n).sum(1, keepdim=True)  # [B, 1, groups, C / groups]
        mean_g, mean_g_n = ((gain * a).mean(3, keepdim=True) / x.shape[1] for a in (sum_dz, sum_dz_n))
        dx = rstd * (gain * dz - mean_g - n * mean_g_n)
        return dx.to(x.dtype), sum_dz_n.sum_to_size(gain.shape), sum_dz.sum_to_size(gain.shape), None


class FormulaAttention(plain.Attention):
    """Attention by its formula while training: the backward pass of the CPU's fused kernel takes 2 to 4 times as long in
    bf16 (64 to 256 tokens)."""

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
