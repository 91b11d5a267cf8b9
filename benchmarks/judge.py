"""A program that judges drawn pictures: the outlines of shapes, or, of any other dataset, what a classifier sees.

    python -m benchmarks.judge --checkpoint docs/shapes.pth --guidance 2
    python -m benchmarks.judge --checkpoint docs/nature.pth --guidance 2 --count 500 --sheet outputs/judged.png

Shapes. A picture becomes a silhouette: how far each pixel is from the ground's colour, the ink being 1. Its outline is that of
the six whose nearest copy, of any size, place and tilt that src/data/shapes.py draws, has the smallest squared error as a share
of the copy's area. A picture with a share above 0.12 has none of the six. Shapes of the dataset itself have at most 0.04.

Other datasets. A small classifier learns the training pictures of the checkpoint's classes, in 2,000 steps of 50, once: it is
kept beside the cache. It never sees validation pictures. Then, of real validation pictures and of drawn ones: in_their_class is
the share that it puts into the class they were drawn as; frechet is the distance of its last features to those of the training
pictures (two Gaussians, as in FID; lower is better); variety is the mean distance between two pictures of a class in these
features, over that of training pictures.
"""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from tqdm import tqdm

from benchmarks import common
from benchmarks.common import Args, Table
from src.data.shapes import KINDS, distance
from src.dataset import Images
from src.runtime.build import open_images
from src.runtime.pipeline import Pipeline
from src.runtime.sheets import sheet
from src.utils import atomic_file, save_png

STEPS, BATCH = 2000, 50  # of the classifier
VIEW = 10_000  # pictures of a set, at most, that the figures look at

SPOILED = 0.12  # the largest error of a shape that counts
OUTLINES = ["circle", "square", "triangle", "ring", "cross", "star"]
TILTS = {shape: tilt for _, shape, tilt in KINDS.values()}


# --- shapes ---------------------------------------------------------------------------------------------


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


# --- other datasets ---------------------------------------------------------------------------------------


def unit(dim_in: int, dim_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(dim_in, dim_out, 3, stride, 1, bias=False), nn.BatchNorm2d(dim_out), nn.ReLU())


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def new_classifier(channels: int, classes: int) -> nn.Sequential:
    """[B, channels, S, S] in [-1, 1] -> logits. All but the last layer give the 128 features."""
    levels = [unit(channels, 32, 2), unit(32, 32)]
    for dim in (64, 128):
        levels += [unit(dim // 2, dim, 2), Residual(unit(dim, dim), unit(dim, dim))]
    return nn.Sequential(*levels, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes))


def batch_of(images: Images, rows: Tensor) -> tuple[Tensor, Tensor]:
    u8 = torch.from_numpy(images[rows.numpy()])
    return (u8.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last), images.labels[rows]


def augmented(x: Tensor) -> Tensor:
    """Mirrored at random, moved by up to a tenth of the side, contrast up to a fifth higher or lower."""
    x, size = torch.where((torch.rand(len(x)) < 0.5)[:, None, None, None], x.flip(-1), x), x.shape[-1]
    top, left = torch.randint(2 * (size // 10) + 1, (2,)).tolist()
    moved = F.pad(x, [size // 10] * 4, mode="reflect")[..., top : top + size, left : left + size]
    return moved * (0.8 + 0.4 * torch.rand(len(x), 1, 1, 1))


def trained_classifier(images: Images, folder: Path, steps: int = STEPS) -> nn.Sequential:
    """The classifier of these training pictures, kept in the folder under their fingerprint."""
    file = folder / f"judge-{images.fingerprint}-{steps}.pth"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = new_classifier(images.shape[1], len(images.classes)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if file.exists():
            model.load_state_dict(torch.load(file, weights_only=True))
            return model.eval()
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.2)
        order = torch.empty(0, dtype=torch.int64)
        for _ in tqdm(range(steps), desc="classifier", unit="step", disable=None):
            if len(order) < BATCH:
                order = torch.cat([order, torch.randperm(len(images))])
            (x, y), order = batch_of(images, order[:BATCH]), order[BATCH:]
            F.cross_entropy(model(augmented(x)), y, label_smoothing=0.1).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    with atomic_file(file) as out:
        torch.save(model.state_dict(), out)
    return model.eval()


class Judge:
    """The figures of a set of pictures, beside the training pictures `train`. folder: where the classifier is kept."""

    def __init__(self, train: Images, folder: Path, steps: int = STEPS):
        self.model = trained_classifier(train, folder, steps)
        self.features, _, labels = self.look(train)
        self.spread = spread_within(self.features, labels)

    @torch.no_grad()
    def look(self, images: Images) -> tuple[Tensor, Tensor, Tensor]:
        """Features [N, 128], logits and labels of at most VIEW pictures, spread over the set."""
        rows = torch.linspace(0, len(images) - 1, min(VIEW, len(images))).round().long()
        seen = torch.cat([self.model[:-1](batch_of(images, part)[0]) for part in rows.split(100)])
        return seen, self.model[-1](seen), images.labels[rows]

    def __call__(self, images: Images, has_labels: bool = True) -> dict[str, Any]:
        """has_labels: false for pictures of a network without classes, which have a distance alone."""
        features, logits, labels = self.look(images)
        both = [fid_features_to_statistics(x) for x in (features, self.features)]
        found: dict[str, Any] = {"pictures": len(features)}
        if has_labels:
            found |= {"in_their_class": (logits.argmax(1) == labels).float().mean().item()}
            found |= {"variety": spread_within(features, labels) / self.spread}
        return found | {"frechet": fid_statistics_to_metric(*both, verbose=False)["frechet_inception_distance"]}


def spread_within(features: Tensor, labels: Tensor) -> float:
    """The mean distance between two pictures of a class, over the classes."""
    return torch.stack([torch.pdist(features[labels == label][:1000]).mean() for label in labels.unique()]).mean().item()


# --- both -------------------------------------------------------------------------------------------------


def draw(args: Args) -> tuple[Pipeline, Images]:
    """--count pictures of the checkpoint by 20 steps of dpm++, their labels being those that they were drawn as."""
    how: dict[str, Any] = dict(run="", classes="all", sampler="dpm++", steps=20, spacing="logsnr", eta=0.0, weights="ema")
    how |= dict(precision="fp32", compile="false", typed=())
    pipeline = Pipeline(SimpleNamespace(**how, **vars(args)))  # type: ignore[arg-type]  # Namespace or like it
    if args.npz:
        with np.load(args.npz) as kept:
            pixels, labels = torch.from_numpy(kept["arr_0"]).permute(0, 3, 1, 2), torch.from_numpy(kept["arr_1"])
    else:
        drawn = pipeline.series(range(args.count), 50, partial(pipeline.start, 0))
        pixels = torch.cat([batch for _, batch in drawn])
        labels = torch.tensor([pipeline.label(i) or 0 for i in range(args.count)])
    return pipeline, Images(pixels.numpy(), labels, pipeline.classes, pipeline.class_ids, Path())


def measure(args: Args) -> None:
    pipeline, drawn = draw(args)
    table = Table("judge", args, pipeline.device, steps=pipeline.steps, guidance=args.guidance, step=pipeline.step)
    names = [drawn.classes[label] for label in drawn.labels]
    if pipeline.settings.DATASET == "shapes":
        wanted = torch.tensor([OUTLINES.index(name.split()[-1]) for name in names])
        share, seen = errors(torch.from_numpy(drawn[:])).min(dim=1)
        right = (seen == wanted) & (share <= SPOILED)
        for k, outline in enumerate(OUTLINES):
            table.add(outline=outline, right=int(right[wanted == k].sum()), of=int((wanted == k).sum()))
        table.add(outline="all", right=int(right.sum()), of=len(drawn))
    else:
        train, val = (open_images(pipeline.settings, split) for split in ("train", "val"))
        judge = Judge(train, Path(pipeline.settings.CACHE_PATH), 20 if args.tiny else STEPS)
        table.add(what="real validation", **judge(val))
        table.add(what="drawn", **judge(drawn, bool(pipeline.labels)))
    if args.sheet:
        save_png(sheet(torch.from_numpy(drawn[:100]), names[:100], 10), args.sheet)


FLAGS: common.Flags = {
    "checkpoint": dict(default="checkpoints/demo/best.pth", help="default: checkpoints/demo/best.pth"),
    "count": dict(type=int, default=200, help="pictures, one class after the other (default: 200)"),
    "npz": dict(type=Path, help="judge these instead: samples.npz of sample.py, by this checkpoint's data"),
    "guidance": dict(type=float, default=3.0, help="default: 3"),
    "sheet": dict(type=Path, help="where to put the first 100 pictures, as PNG"),
}

if __name__ == "__main__":
    sys.exit(common.main("judge", __doc__, measure, FLAGS))
