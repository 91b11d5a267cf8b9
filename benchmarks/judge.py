"""How many drawn shapes have the right outline: for the demo, whose pictures a program can judge.

    python -m benchmarks.judge --checkpoint checkpoints/demo/best.pth --guidance 3 --sheet outputs/judged.png

A picture becomes a silhouette: how far each pixel is from the ground's colour, the ink being 1. Its outline is that of the six
whose nearest copy, of any size, place and tilt that src/data/shapes.py draws, has the smallest squared error as a share of the
copy's area. A picture with a share above --spoiled has none of the six. Shapes of the dataset itself have at most 0.04.
"""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import common
from benchmarks.common import Args, Table
from src.data.shapes import KINDS, distance
from src.runtime.pipeline import Pipeline
from src.utils import labelled_sheet, save_png

OUTLINES = ["circle", "square", "triangle", "ring", "cross", "star"]
TILTS = {shape: tilt for _, shape, tilt in KINDS.values()}


def silhouettes(images: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] -> [B, S, S] in [0, 1.2]. No colour is left."""
    x = images.float() / 255
    edge = torch.cat([x[..., 0, :], x[..., -1, :], x[..., :, 0], x[..., :, -1]], dim=2)
    away = (x - edge.median(dim=2).values[..., None, None]).norm(dim=1)
    ink = away.flatten(1).quantile(0.93, dim=1).clamp(min=0.1)  # every shape fills more than 7% of its picture
    return (away / ink[:, None, None]).clamp(0, 1.2)


def copies(shape: str, size: int) -> Tensor:
    """Silhouettes [N, S, S] of one outline in the middle: sizes, tilts, and quarters of a pixel."""
    found = []
    for radius in np.linspace(0.25, 0.37, 9):
        for tilt in np.linspace(-TILTS[shape], TILTS[shape], 7 if TILTS[shape] else 1):
            cos, sin = np.cos(tilt) / radius, np.sin(tilt) / radius
            for right, down in np.array([(-1, -1), (-1, 1), (1, -1), (1, 1)]) / 4:
                y, x = np.mgrid[:size, :size]
                x, y = (x + 0.5 - right) / size - 0.5, (y + 0.5 - down) / size - 0.5
                outline = distance(shape, cos * x + sin * y, cos * y - sin * x)
                found.append(np.clip(0.5 - outline * radius * size, 0, 1))
    return torch.from_numpy(np.stack(found)).float()


def errors(images: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] -> [B, 6]: the share by which the nearest copy of each outline differs, over all places."""
    pictures, size = silhouettes(images), images.shape[-1]
    transform = partial(torch.fft.rfft2, s=(2 * size, 2 * size))  # twice the size: a shift does not wrap around
    spectra, energy = transform(pictures), pictures.square().sum((1, 2))
    found = torch.full((len(pictures), len(OUTLINES)), torch.inf)
    for k, outline in enumerate(OUTLINES):
        for copy in copies(outline, size):
            overlap = torch.fft.irfft2(spectra * transform(copy).conj()).amax((1, 2))  # at the best of all shifts
            area = copy.square().sum()
            found[:, k] = torch.minimum(found[:, k], (energy + area - 2 * overlap) / area)
    return found


def measure(args: Args) -> None:
    how = dict(classes="all", sampler="dpm++", spacing="logsnr", eta=0.0, weights="ema", precision="fp32", compile="false")
    pipeline = Pipeline(SimpleNamespace(**how, **vars(args)))  # type: ignore[arg-type]  # Namespace or like it
    table = Table("judge", args, pipeline.device, steps=pipeline.steps, guidance=args.guidance, spoiled=args.spoiled)
    with tqdm(disable=True) as bar:
        drawn = pipeline.series(range(args.count), 50, bar, partial(pipeline.start, args.seed))
        images = torch.cat([batch for _, batch in drawn])
    names = [pipeline.classes[pipeline.label(i) or 0] for i in range(args.count)]
    wanted = torch.tensor([OUTLINES.index(name.split()[-1]) for name in names])
    share, seen = errors(images).min(dim=1)
    right = (seen == wanted) & (share <= args.spoiled)
    for k, outline in enumerate(OUTLINES):
        table.add(outline=outline, right=int(right[wanted == k].sum()), of=int((wanted == k).sum()))
    table.add(outline="all", right=int(right.sum()), of=args.count)
    table.print()
    if args.sheet:
        save_png(labelled_sheet(images[:100], names[:100], 10), args.sheet)


FLAGS: common.Flags = {
    "checkpoint": dict(default="checkpoints/demo/best.pth", help="of the shapes (default: checkpoints/demo/best.pth)"),
    "count": dict(type=int, default=200, help="pictures, the classes in turn (default: 200)"),
    "steps": dict(type=int, default=20, help="of dpm++ (default: 20)"),
    "guidance": dict(type=float, default=3.0, help="default: 3"),
    "seed": dict(type=int, default=0, help="which series of pictures (default: 0)"),
    "spoiled": dict(type=float, default=0.12, help="the largest share of a picture that counts (default: 0.12)"),
    "sheet": dict(type=Path, help="where to put the first 100 pictures, as PNG"),
}

if __name__ == "__main__":
    sys.exit(common.main("judge", __doc__, measure, FLAGS))
