"""Tensors to pictures on disk, and the noise that a picture starts from."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from src import noise
from src.diffusion import GaussianDiffusion, Model
from src.utils import atomic_file


class PictureNoise:
    """All the noise of some pictures, from (seed, index of the picture, step) alone: the same for any batch they are drawn in.

    Called with k = 0 it gives x_T, with k = 1, 2, ... the fresh noise of a sampler's step k; each [B, *shape] float32.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, int, int], device: torch.device):
        self.keys = noise.address(seed, noise.PICTURE, torch.tensor(list(indices))).to(device)
        self.shape = shape

    def __call__(self, k: int) -> Tensor:
        return noise.normal(noise.address(self.keys, k), self.shape)


def draw(diffusion: GaussianDiffusion, model: Model, seed: int, indices: Sequence[int], image_size: int, **options) -> Tensor:
    """Pictures number `indices` of the series `seed`, all at once. options: of GaussianDiffusion.sample.
    Returns [len(indices), 3, image_size, image_size] float32 in [-1, 1], on the diffusion's device."""
    shape = (3, image_size, image_size)
    start = PictureNoise(seed, indices, shape, diffusion.signal.device)
    return diffusion.sample(model, (len(indices), *shape), noise=start, **options)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Walk from a (share 0) to b (share 1) along the great circle, so that every point has the norm of a sample of the
    normal distribution; a straight line would pass through images with too little noise."""
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).double().clamp(-1, 1)
    angle = cosine.acos()
    if angle < 1e-6:  # the two are the same direction: the circle is a line
        return torch.lerp(a, b, share)
    return ((((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()).to(a.dtype)


def to_uint8(x: Tensor) -> Tensor:
    """[B, 3, S, S] float in [-1, 1] to uint8 in [0, 255], rounded to the nearest, on the CPU."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def grid(pictures: Tensor, columns: int | None = None) -> Tensor:
    """[B, 3, S, S] uint8 to one picture [3, H, W], two dark pixels between: near a square, in full rows if that can be."""
    root = math.ceil(math.sqrt(len(pictures)))
    full = (width for width in range(root, 3 * root // 2) if len(pictures) % width == 0)
    columns = min(columns or next(full, root), len(pictures))
    rows = -(-len(pictures) // columns)
    places = F.pad(pictures, (2, 0, 2, 0, 0, 0, 0, rows * columns - len(pictures)), value=32)  # empty ones at the end
    sheet = places.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)  # [3, rows x H, columns x W]
    return F.pad(sheet, (0, 2, 0, 2), value=32)


def to_image(picture: Tensor) -> Image.Image:
    """[3, H, W] uint8 to a PIL image."""
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def save_png(picture: Tensor, path: Path) -> None:
    """Write [3, H, W] uint8 as a PNG that is whole or not there."""
    with atomic_file(path) as file:
        to_image(picture).save(file, format="PNG")


def save_gif(frames: Sequence[Tensor], path: Path, seconds: float = 4.0) -> None:
    """Write [3, H, W] uint8 frames as an endless GIF of about `seconds`, resting on the last one."""
    pause = max(20, round(1000 * seconds / len(frames)))  # ms; browsers slow down anything under 20
    images = [to_image(frame) for frame in frames]
    with atomic_file(path) as file:
        durations = [pause] * (len(frames) - 1) + [1500]
        images[0].save(file, format="GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)
