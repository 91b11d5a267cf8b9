"""Random numbers that depend on where they are used, and never on what was drawn before.

A generator with a state gives numbers that depend on every draw since its seed: on the batch size, on the number of
processes, and on the step at which a run was resumed. Here a number is a hash of its key (seed, purpose, step, row) and its
position. Any process, on any device, can ask for any row of any step in any order, and gets the same value (on another
device up to rounding in the logarithm, sine and cosine).

The hash is SplitMix64 (Steele, Lea, Flood 2014, doi:10.1145/2714064.2660195), used as a counter-based generator in the sense
of Salmon et al. 2011 (doi:10.1145/2063384.2063405).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, odd, as a signed 64-bit number: the stride of SplitMix64

# Purposes: the second part of a key, so that no two uses of a seed share numbers.
TRAIN_NOISE, TRAIN_TIME, TRAIN_FLIP, TRAIN_LABEL, DATA_ORDER, WEIGHTS, DROPOUT, VALIDATION, PICTURE = range(9)


def mix(x: Tensor) -> Tensor:
    """Scramble int64 numbers one to one (SplitMix64's finalizer). Products wrap; the masks make the shifts logical."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def key(*parts: int | Tensor) -> Tensor:
    """Fold the parts, ints or int64 tensors that broadcast, into int64 keys. key(seed, PICTURE, rows) -> [B]."""
    folded = torch.zeros((), dtype=torch.int64)
    for part in parts:
        folded = mix(folded + part + GOLDEN)
    return folded


def bits(keys: Tensor, count: int) -> Tensor:
    """`count` independent int64 hashes for each key. keys: [B] int64. Returns [B, count]."""
    counter = torch.arange(1, count + 1, device=keys.device)
    return mix(keys[:, None] + counter * GOLDEN)


def normal(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, `shape` of them for each key. keys: [B] int64. Returns [B, *shape] float32.

    Box-Muller: each 64-bit hash gives two uniform numbers of 24 bits and so two normal ones, |z| <= 5.8.
    """
    size = torch.Size(shape).numel()
    random = bits(keys, (size + 1) // 2)
    radius = (((random >> 40) & 0xFFFFFF) + 1).float().mul(2**-24).log().mul(-2).sqrt()  # + 1: log(0) never happens
    angle = ((random >> 16) & 0xFFFFFF).float().mul(2 * torch.pi * 2**-24)
    z = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return z[:, :size].unflatten(1, shape)


def randint(keys: Tensor, high: int) -> Tensor:
    """One integer in [0, high) for each key, all equally likely to within high / 2^53. keys: [B]. Returns [B] int64."""
    return ((bits(keys, 1)[:, 0] >> 11) & 0x1FFFFFFFFFFFFF) % high


def bernoulli(keys: Tensor, probability: float) -> Tensor:
    """True with the given probability for each key. keys: [B] int64. Returns [B] bool."""
    return randint(keys, 1 << 24) < round(probability * (1 << 24))


def seed(*parts: int) -> int:
    """A seed in [0, 2^63) for a library that has its own generator (weight initialisation, permutations)."""
    return int(key(*parts)) & 0x7FFFFFFFFFFFFFFF


class PictureNoise:
    """All the noise of some images. It depends on (seed, number of the image, step) alone: an image is the same in any batch.

    Called with k = 0 it gives x_T, with k = 1, 2, ... the fresh noise of a sampler's step k; each [B, *shape] float32.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, int, int], device: torch.device | str):
        self.keys = key(seed, PICTURE, torch.tensor(list(indices))).to(device)
        self.shape = shape

    def __call__(self, k: int) -> Tensor:
        return normal(key(self.keys, k), self.shape)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Walk from a (share 0) to b (share 1) along the great circle. Every point has the norm of a normal sample; on a
    straight line the points between would hold too little noise. a, b: of one shape."""
    cosine = F.cosine_similarity(a.flatten(), b.flatten(), dim=0).double().clamp(-1, 1)
    angle = cosine.acos()
    if angle < 1e-6 or share in (0, 1):  # the two have the same direction: the circle is a line. And the ends are exact
        return torch.lerp(a, b, share)
    return ((((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()).to(a.dtype)
