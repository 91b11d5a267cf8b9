"""A residual block for CUDA that is not measured there yet: `benchmarks.train_step --variants lean`. Where it gains, it becomes
a swap of src/runtime/kernels.py."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src import model as plain


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
