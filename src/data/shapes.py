"""Pictures drawn by code: ten classes of one coloured shape each. Needs no network and no files."""

from typing import ClassVar

import numpy as np
from torch.utils.data import Dataset

COUNTS = {"train": 10_000, "val": 2_000}

# Class -> colour (RGB in [0, 1]), shape, and the largest tilt in radians that leaves the shape nameable.
KINDS = {
    "red circle": ((0.90, 0.13, 0.13), "circle", 0.0),
    "blue circle": ((0.20, 0.42, 1.00), "circle", 0.0),
    "green square": ((0.16, 0.78, 0.26), "square", 0.2),
    "orange square": ((1.00, 0.52, 0.06), "square", 0.2),
    "yellow triangle": ((1.00, 0.90, 0.16), "triangle", 0.3),
    "purple triangle": ((0.66, 0.26, 0.94), "triangle", 0.3),
    "cyan ring": ((0.16, 0.90, 0.96), "ring", 0.0),
    "pink ring": ((1.00, 0.50, 0.74), "ring", 0.0),
    "white cross": ((0.97, 0.97, 0.97), "cross", 0.2),
    "red star": ((0.90, 0.13, 0.13), "star", 0.3),
}


def distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the outline, negative inside, for a shape of radius about 1 around 0. y points down."""
    if shape == "circle":
        return np.hypot(x, y) - 0.95
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.75) - 0.25
    x = np.abs(x)  # the rest are mirror images of themselves
    if shape == "square":
        return np.maximum(x, np.abs(y)) - 0.82
    if shape == "cross":
        return np.minimum(np.maximum(x - 1.0, np.abs(y) - 0.32), np.maximum(x - 0.32, np.abs(y) - 1.0))
    if shape == "triangle":  # two slanted half-planes, folded into one by |x|, and the base
        return np.maximum(y, 0.866 * x - 0.5 * y) - 0.58
    # A star: fold the plane into one tenth of it, then the line from its tip to its notch.
    angle = np.arctan2(x, -y)  # 0 at the upper tip, in [0, pi]
    angle = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    radius = np.hypot(x, y)
    tip, notch = np.array([1.12, 0.0]), 0.5 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    along = (notch - tip) / np.linalg.norm(notch - tip)
    return (radius * np.cos(angle) - tip[0]) * along[1] - radius * np.sin(angle) * along[0]


class Shapes(Dataset):
    """Item i is (uint8 [S, S, 3], label): one shape on a dark, muted background.

    Everything about item i follows from (split, i), so it is the same at every start and on every machine,
    and the splits share no picture. Labels run 0, 1, ..., 9, 0, 1, ...
    """

    classes: ClassVar[list[str]] = list(KINDS)
    fingerprint = "shapes 2"  # count up when a picture changes

    def __init__(self, split: str, image_size: int):
        self.split = list(COUNTS).index(split)  # 0 train, 1 val; the first word of each picture's seed
        self.count = COUNTS[split]
        self.size = image_size
        self.y, self.x = (np.indices((image_size, image_size), dtype=np.float32) + 0.5) / image_size  # centres of pixels

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        label = index % len(KINDS)
        colour, shape, max_tilt = KINDS[self.classes[label]]
        random = np.random.default_rng((self.split, index)).uniform(-1, 1, 13).astype(np.float32)

        radius = 0.31 + 0.05 * random[0]  # in units of the picture's side
        room = 0.12  # how far from the middle; little, so that the demo learns in minutes
        tilt = max_tilt * random[3]
        cos, sin = np.cos(tilt) / radius, np.sin(tilt) / radius
        x, y = self.x - (0.5 + room * random[1]), self.y - (0.5 + room * random[2])
        outline = distance(shape, cos * x + sin * y, cos * y - sin * x)
        inside = np.clip(0.5 - outline * (radius * self.size), 0, 1)[..., None]  # share of each pixel's area

        ink = np.clip(np.array(colour, np.float32) + 0.04 * random[4:7], 0, 1)
        ground = 0.20 + 0.10 * random[7] + 0.05 * random[8:11]  # at most 0.35: darker than every ink
        slope = 0.06 * (random[11] * (self.x - 0.5) + random[12] * (self.y - 0.5))[..., None]
        picture = (ground + slope) * (1 - inside) + ink * inside
        return (picture * 255 + 0.5).astype(np.uint8), label
