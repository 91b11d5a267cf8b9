"""Random numbers that follow from where they are used, never from what was drawn before.

A generator with a state gives numbers that depend on every draw since its seed, and so on the batch size,
the number of processes and the step at which a run was resumed. Here a number is a hash of its address:
(seed, purpose, step, row, position). Any process, on any device, can ask for any row of any step, in any
order, and gets the same value (on another device up to rounding in the logarithm, sine and cosine).

The hash is SplitMix64 (Steele, Lea, Flood 2014, doi:10.1145/2714064.2660195), used as a counter-based
generator in the sense of Salmon et al. 2011 (doi:10.1145/2063384.2063405).
"""

import torch
from torch import Tensor

GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, odd, as a signed 64-bit number: the stride of SplitMix64

# Purposes: the second part of an address, so that no two uses of a seed share numbers.
TRAIN_NOISE, TRAIN_TIME, TRAIN_FLIP, TRAIN_LABEL, DATA_ORDER, WEIGHTS, DROPOUT, VALIDATION, PICTURE = range(9)


def mix(x: Tensor) -> Tensor:
    """Scramble int64 numbers one to one (SplitMix64's finalizer). Products wrap; the masks make the shifts logical."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def address(*parts: int | Tensor) -> Tensor:
    """Fold the parts, ints or int64 tensors that broadcast, into int64 keys. address(seed, PICTURE, rows) -> [B]."""
    key = torch.zeros((), dtype=torch.int64)
    for part in parts:
        key = mix(key + part + GOLDEN)
    return key


def hashes(keys: Tensor, count: int) -> Tensor:
    """`count` independent int64 hashes under each key. keys: [B] int64. Returns [B, count]."""
    counter = torch.arange(1, count + 1, device=keys.device)
    return mix(keys[:, None] + counter * GOLDEN)


def normal(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, `shape` of them under each key. keys: [B] int64. Returns [B, *shape] float32.

    Box and Muller: each 64-bit hash gives two uniforms of 24 bits and so two normals, |z| <= 5.8.
    """
    size = torch.Size(shape).numel()
    bits = hashes(keys, (size + 1) // 2)
    radius = (((bits >> 40) & 0xFFFFFF) + 1).float().mul(2**-24).log().mul(-2).sqrt()  # + 1: log(0) never happens
    angle = ((bits >> 16) & 0xFFFFFF).float().mul(2 * torch.pi * 2**-24)
    z = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return z[:, :size].unflatten(1, shape)


def integers(keys: Tensor, high: int) -> Tensor:
    """One integer in [0, high) under each key, each as likely to within high / 2^53. keys: [B]. Returns [B] int64."""
    return ((hashes(keys, 1)[:, 0] >> 11) & 0x1FFFFFFFFFFFFF) % high


def chance(keys: Tensor, probability: float) -> Tensor:
    """True with the given probability under each key. keys: [B] int64. Returns [B] bool."""
    return integers(keys, 1 << 24) < round(probability * (1 << 24))


def integer_seed(*parts: int) -> int:
    """A seed in [0, 2^63) for a library that keeps its own generator (weight initialisation, permutations)."""
    return int(address(*parts)) & 0x7FFFFFFFFFFFFFFF
