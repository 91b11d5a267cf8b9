"""The U-Net that looks at a noisy image x_t and its step t and predicts the noise (or v, or x_0).

The shape is that of Ho et al. 2020 (arXiv:2006.11239, app. B) with the changes of Nichol & Dhariwal 2021
(arXiv:2102.09672): the step enters by scale and shift after the second norm, and attention has several heads.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def norm_groups(dim: int) -> int:
    """Groups of every GroupNorm in a network of base width `dim`: 32, or 8 below 128 channels, where 32 groups
    would be one or two channels each."""
    return 32 if dim >= 128 else 8


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """Embed the step as in Vaswani et al. 2017, sec. 3.5. t: [B] int64. Returns [B, dim] float32 in [-1, 1]."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=t.device))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zeroed(layer: nn.Module) -> nn.Module:
    """A last layer that starts at zero: its block starts as the identity, the whole network as the zero map."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResBlock(nn.Module):
    """Two convolutions and a residual connection. The embedding of step and class scales and shifts between them."""

    def __init__(self, dim_in: int, dim_out: int, emb_dim: int, groups: int, dropout: float):
        super().__init__()
        self.norm_1 = nn.GroupNorm(groups, dim_in)
        self.conv_1 = nn.Conv2d(dim_in, dim_out, 3, padding=1)
        self.scale_shift = nn.Linear(emb_dim, 2 * dim_out)
        self.norm_2 = nn.GroupNorm(groups, dim_out)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = zeroed(nn.Conv2d(dim_out, dim_out, 3, padding=1))
        self.skip = nn.Conv2d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: [B, dim_in, S, S].   emb: [B, emb_dim], after its SiLU.   Returns [B, dim_out, S, S]."""
        h = self.conv_1(F.silu(self.norm_1(x)))
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm_2(h) * (1 + scale) + shift)
        return self.skip(x) + self.conv_2(self.dropout(h))


class Attention(nn.Module):
    """Multi-head self-attention over all pixels, with a residual connection. Heads have 64 channels, or more if 64 does
    not divide `dim`."""

    def __init__(self, dim: int, groups: int):
        super().__init__()
        self.heads = next(heads for heads in range(max(1, dim // 64), 0, -1) if dim % heads == 0)
        self.norm = nn.GroupNorm(groups, dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = zeroed(nn.Linear(dim, dim))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(d)) v, each [B, heads, tokens, d]."""
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, dim, S, S].   Returns the same shape."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, S^2, dim]: no copy if x is channels_last
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, S^2, dim / heads]
        h = self.attend(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(h).transpose(1, 2).unflatten(2, x.shape[2:])


class Block(nn.Module):
    """A residual block, followed by self-attention on the levels that have it."""

    def __init__(self, dim_in: int, dim_out: int, emb_dim: int, groups: int, dropout: float, attention: bool):
        super().__init__()
        self.block = ResBlock(dim_in, dim_out, emb_dim, groups, dropout)
        self.attention = Attention(dim_out, groups) if attention else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.attention(self.block(x, emb))


class Downsample(nn.Conv2d):
    """Halve the resolution with a strided 3x3 convolution."""

    def __init__(self, dim: int):
        super().__init__(dim, dim, 3, stride=2, padding=1)


class Upsample(nn.Conv2d):
    """Double the resolution: each pixel becomes four, then a 3x3 convolution."""

    def __init__(self, dim: int):
        super().__init__(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, dim, S, S].   Returns [B, dim, 2 S, 2 S]."""
        return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))


class UNet(nn.Module):
    """UNet(...)(x, t, y) -> the prediction for x_t, shaped like x.

    image_size: pixels per side, divisible by 2^(levels - 1).   dim: channels at that size.
    dim_mults: channels of each level in units of dim.   num_res_blocks: per level down, one more up.
    attention_resolutions: pixels per side at which attention follows each block; the middle always has it.
    channels: C of an image, 3 or 1.   num_classes: 0 for a network without labels.
    activation_checkpointing: keep only each block's input for the backward pass and compute the rest again.
    Raises ValueError for sizes that do not divide.
    """

    down: Any  # nn.ModuleLists, whose items a type checker cannot know
    middle: Any
    up: Any

    def __init__(
        self,
        image_size: int = 64,
        dim: int = 128,
        dim_mults: Sequence[int] = (1, 2, 3, 4),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16, 8),
        dropout: float = 0.0,
        num_classes: int = 0,
        activation_checkpointing: bool = False,
        channels: int = 3,
    ):
        super().__init__()
        groups = norm_groups(dim)
        if dim % groups:
            raise ValueError(f"dim is {dim}; the norm's {groups} groups need a multiple of {groups}")
        if image_size % 2 ** (len(dim_mults) - 1):
            raise ValueError(f"image_size {image_size} cannot be halved {len(dim_mults) - 1} times")
        self.dim, self.num_classes, self.activation_checkpointing = dim, num_classes, activation_checkpointing
        emb_dim = 4 * dim
        self.time_mlp = nn.Sequential(nn.Linear(dim, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        # One row more than classes: the last stands for "no label" (classifier-free guidance).
        self.class_embedding = nn.Embedding(num_classes + 1, emb_dim) if num_classes else None

        def block(dim_in: int, dim_out: int, attention: bool) -> Block:
            return Block(dim_in, dim_out, emb_dim, groups, dropout, attention)

        levels = [(dim * mult, image_size >> level) for level, mult in enumerate(dim_mults)]  # channels, pixels per side
        smallest = levels[-1][1]
        self.stem = nn.Conv2d(channels, dim, 3, padding=1)
        skip_dims, h_dim = [dim], dim  # what each skip connection carries, and what flows on
        self.down = nn.ModuleList()
        for level_dim, size in levels:
            blocks = nn.ModuleList()
            for _ in range(num_res_blocks):
                blocks.append(block(h_dim, level_dim, size in attention_resolutions))
                skip_dims.append(h_dim := level_dim)
            self.down.append(nn.ModuleDict({"blocks": blocks}))
            if size > smallest:
                self.down[-1]["downsample"] = Downsample(h_dim)
                skip_dims.append(h_dim)
        self.middle = nn.ModuleList([block(h_dim, h_dim, attention=True), block(h_dim, h_dim, attention=False)])
        self.up = nn.ModuleList()
        for level_dim, size in reversed(levels):
            blocks = nn.ModuleList()
            for _ in range(num_res_blocks + 1):
                blocks.append(block(h_dim + skip_dims.pop(), level_dim, size in attention_resolutions))
                h_dim = level_dim
            self.up.append(nn.ModuleDict({"blocks": blocks}))
            if size < image_size:
                self.up[-1]["upsample"] = Upsample(h_dim)
        self.head = nn.Sequential(nn.GroupNorm(groups, h_dim), nn.SiLU(), zeroed(nn.Conv2d(h_dim, channels, 3, padding=1)))

    def run(self, block: Block, h: Tensor, emb: Tensor) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, h, emb, use_reentrant=False)
        return block(h, emb)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """x: [B, C, S, S] float, x_t in units in which pixels lie in [-1, 1].   t: [B] int64 in [0, T).
        y: [B] int64 class labels, -1 where there is none, or None for no labels at all.
        Returns [B, C, S, S] float32.
        """
        emb = self.time_mlp(sinusoid(t, self.dim))  # [B, 4 dim]
        if self.class_embedding is not None:
            y = torch.full_like(t, -1) if y is None else y
            emb = emb + self.class_embedding(torch.where(y < 0, self.num_classes, y))
        emb = F.silu(emb)

        h = self.stem(x)  # [B, dim, S, S]
        skips = [h]
        for level in self.down:
            for block in level["blocks"]:
                h = self.run(block, h, emb)
                skips.append(h)
            if "downsample" in level:
                h = level["downsample"](h)
                skips.append(h)
        for block in self.middle:  # [B, dim * dim_mults[-1], S / 8, S / 8] with four levels
            h = self.run(block, h, emb)
        for level in self.up:
            for block in level["blocks"]:
                h = self.run(block, torch.cat([h, skips.pop()], dim=1), emb)
            if "upsample" in level:
                h = level["upsample"](h)
        assert not skips, f"{len(skips)} skip connections were never used"
        norm, activation, conv = self.head
        h = activation(norm(h))
        with torch.autocast(x.device.type, enabled=False):  # float32: near t = T an error here is magnified 160-fold in x_0
            return conv(h.to(conv.weight.dtype))  # [B, C, S, S]


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def forward_gflop(model: UNet, image_size: int) -> float:
    """10^9 multiplications and additions of the forward pass of one image: convolutions, linear layers and attention."""

    def multiplications(part: nn.Module, side: int) -> int:
        """side: pixels per side of what a convolution there gives."""
        found = 0
        for layer in part.modules():
            if isinstance(layer, nn.Conv2d):
                found += side**2 * layer.weight.numel()
            elif isinstance(layer, nn.Linear):  # of the embedding, once an image; those of attention follow
                found += layer.weight.numel()
            elif isinstance(layer, Attention):
                dim = layer.qkv.in_features
                found += (side**2 - 1) * 4 * dim**2 + 2 * side**4 * dim  # q, k, v, out; then q k^T, and that times v
        return found

    sides = [image_size >> level for level in range(len(model.down))]
    total = multiplications(model.time_mlp, 1) + multiplications(model.middle, sides[-1])
    total += multiplications(model.stem, image_size) + multiplications(model.head, image_size)
    for level, side in [*zip(model.down, sides), *zip(model.up, reversed(sides))]:
        for name, part in level.items():
            total += multiplications(part, {"blocks": side, "downsample": side // 2, "upsample": 2 * side}[name])
    return 2 * total / 1e9


def test_model() -> None:
    """Self-test of the default U-Net and its relatives, seconds on a CPU. Raises AssertionError where a law is broken."""
    torch.manual_seed(0)
    with torch.device("meta"):  # shapes and counts alone, no memory
        count = parameter_count(UNet())
    assert 85e6 < count < 95e6, f"the default U-Net has {count:,} parameters, not about 90M"
    print(f"default U-Net: {count:,} parameters")
    for size in (32, 64, 128, 256):
        model = UNet(size, dim=16, dim_mults=(1, 1, 2, 2), num_res_blocks=1, attention_resolutions=(16, 8))
        x, t = torch.randn(2, 3, size, size), torch.tensor([0, 999])
        assert model(x, t).shape == x.shape
        assert model(x, t).abs().max() == 0, "the last convolution starts at zero, and so must the prediction"
    print("sizes 32, 64, 128, 256: the prediction has the shape of the image and starts at zero")
    model = UNet(32, dim=16, dim_mults=(1, 2), num_res_blocks=1, attention_resolutions=(16,), num_classes=10)
    x, t, y = torch.randn(4, 3, 32, 32), torch.randint(1000, (4,)), torch.tensor([0, 3, 9, -1])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        loss = (model(x, t, y) - x).square().mean()  # easy to learn: the identity
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], f"60 steps on one batch went from {losses[0]:.3f} to {losses[-1]:.3f} only"
    print(f"60 steps on one batch: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient reaches {missing}"
    print("every parameter receives a gradient")
