"""A program that judges drawn pictures: the outlines of shapes, or, of any other dataset, what a classifier sees.

    python -m benchmarks.judge --checkpoint docs/shapes.pth --guidance 2
    python -m benchmarks.judge --checkpoint docs/nature.pth --guidance 2 --count 500

Shapes. A picture becomes a silhouette: how far each pixel is from the ground's colour, the ink being 1. Its outline is that of
the six whose nearest copy, of any size, place and tilt that src/data/shapes.py draws, has the smallest squared error as a share
of the copy's area. Shapes of the dataset itself have at most 0.04.

Other datasets. A small classifier learns the training pictures of the checkpoint's classes once: it is kept beside the cache.
Of real validation pictures, which it never sees, and of drawn ones: in_their_class is the share that it puts into the class
they were drawn as; frechet is the distance of its last features to those of the training pictures (two Gaussians, as in FID;
lower is better); variety is the mean distance of two pictures of a class in these features, over that of training pictures.
"""

import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchvision.ops import Conv2dNormActivation as unit
from tqdm import tqdm

import sample
from benchmarks import common
from benchmarks.common import Args, Table
from src.data.shapes import KINDS, distance
from src.dataset import Images, normalise
from src.runtime.build import open_images
from src.runtime.checkpoint import TO_DRAW, load_checkpoint
from src.runtime.device import pick_device
from src.runtime.settings import Settings
from src.utils import atomic_file

STEPS, BATCH = 2000, 50  # of the classifier
VIEW = 10_000  # pictures of a set, at most, that the figures look at
SPOILED = 0.12  # a picture with a larger error has none of the shapes
TILTS = {shape: tilt for _, shape, tilt in KINDS.values()}
OUTLINES = list(TILTS)


def silhouettes(images: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] -> [B, S, S] in [0, 1.2]. No colour is left."""
    x = images.float() / 255
    edge = torch.cat([x[..., 0, :], x[..., -1, :], x[..., :, 0], x[..., :, -1]], dim=2)
    away = (x - edge.median(dim=2).values[..., None, None]).norm(dim=1)
    ink = away.flatten(1).quantile(0.93, dim=1).clamp(min=0.1)  # every shape fills more than 7% of its picture
    return (away / ink[:, None, None]).clamp(0, 1.2)


def copies(shape: str, size: int) -> Tensor:
    """Silhouettes [N, S, S] of one outline in the middle: sizes, tilts, and quarters of a pixel."""
    tilts, quarters = np.linspace(-TILTS[shape], TILTS[shape], 7 if TILTS[shape] else 1), (-0.25, 0.25)
    found = []
    for radius, tilt, right, down in product(np.linspace(0.25, 0.37, 9), tilts, quarters, quarters):
        cos, sin = np.cos(tilt) / radius, np.sin(tilt) / radius
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


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def batch_of(images: Any, rows: Tensor) -> Tensor:
    """Images, or uint8 [N, C, S, S] -> [B, C, S, S] in [-1, 1]."""
    return normalise(torch.as_tensor(images[rows.numpy()])).contiguous(memory_format=torch.channels_last)


def augmented(x: Tensor) -> Tensor:
    """Mirrored at random, moved by up to a tenth of the side, contrast up to a fifth higher or lower."""
    x, size = torch.where((torch.rand(len(x)) < 0.5)[:, None, None, None], x.flip(-1), x), x.shape[-1]
    top, left = torch.randint(2 * (size // 10) + 1, (2,)).tolist()
    moved = F.pad(x, [size // 10] * 4, mode="reflect")[..., top : top + size, left : left + size]
    return moved * (0.8 + 0.4 * torch.rand(len(x), 1, 1, 1))


def trained_classifier(images: Images, folder: str, steps: int) -> nn.Sequential:
    """The classifier of these training pictures, kept in the folder under their fingerprint: [B, C, S, S] in [-1, 1] -> logits.
    All but its last layer give 128 features."""
    file = Path(folder, f"judge-{images.fingerprint}-{steps}.pth")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        levels = [unit(images.shape[1], 32, 3, 2), unit(32, 32)]
        for dim in (64, 128):
            levels += [unit(dim // 2, dim, 3, 2), Residual(unit(dim, dim), unit(dim, dim))]
        model = nn.Sequential(*levels, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, len(images.classes)))
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if file.exists():
            model.load_state_dict(torch.load(file, weights_only=True))
            return model.eval()
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.2)
        order = torch.empty(0, dtype=torch.int64)
        for _ in tqdm(range(steps), desc="classifier", unit="step", disable=None):
            if len(order) < BATCH:
                order = torch.cat([order, torch.randperm(len(images))])
            rows, order = order[:BATCH], order[BATCH:]
            guesses = model(augmented(batch_of(images, rows)))
            F.cross_entropy(guesses, images.labels[rows], label_smoothing=0.1).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    with atomic_file(file) as out:
        torch.save(model.state_dict(), out)
    return model.eval()


class Judge:
    """The figures of a set of pictures, beside the training pictures of the settings. tiny: hardly trained."""

    def __init__(self, s: Settings, tiny: bool):
        train = open_images(s, "train")
        self.model = trained_classifier(train, s.CACHE_PATH, 20 if tiny else STEPS)
        self.features, rows = self.look(train)
        self.spread = spread_within(self.features, train.labels[rows])

    @torch.no_grad()
    def look(self, images: Any) -> tuple[Tensor, Tensor]:
        """Features [N, 128] of at most VIEW pictures, spread over the set, and which ones these are."""
        rows = torch.linspace(0, len(images) - 1, min(VIEW, len(images))).round().long()
        return torch.cat([self.model[:-1](batch_of(images, part)) for part in rows.split(100)]), rows

    def __call__(self, images: Any, labels: Tensor | None = None) -> dict[str, Any]:
        """images: Images, or uint8 [N, C, S, S].   labels: None for those of a network without classes: a distance alone."""
        features, rows = self.look(images)
        both = [fid_features_to_statistics(x) for x in (features, self.features)]
        found: dict[str, Any] = {"pictures": len(features)}
        if labels is not None:
            found |= {"in_their_class": (self.model[-1](features).argmax(1) == labels[rows]).float().mean().item()}
            found |= {"variety": spread_within(features, labels[rows]) / self.spread}
        return found | {"frechet": fid_statistics_to_metric(*both, verbose=False)["frechet_inception_distance"]}


def spread_within(features: Tensor, labels: Tensor) -> float:
    """The mean distance between two pictures of a class, over the classes."""
    return torch.stack([torch.pdist(features[labels == label][:1000]).mean() for label in labels.unique()]).mean().item()


def drawn(args: Args) -> tuple[Tensor, Tensor]:
    """The pictures of --npz, or --count that sample.py draws, uint8 [N, C, S, S], and the labels that they were drawn as."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"--checkpoint={args.checkpoint}", f"--num_samples={args.count}", f"--guidance={args.guidance}"]
        words += ["--precision=fp32", f"--device={args.device}", "--npz", f"--output_dir={folder}"]
        if not args.npz and (code := sample.main(words)):
            sys.exit(code)  # it has said why
        with np.load(args.npz or Path(folder, "samples.npz")) as kept:
            pixels = torch.from_numpy(kept["arr_0"]).permute(0, 3, 1, 2)
            return pixels, torch.from_numpy(kept["arr_1"]) if "arr_1" in kept else torch.zeros(len(pixels)).long()


def measure(args: Args) -> None:
    state = load_checkpoint(Path(args.checkpoint), TO_DRAW)
    s, (pixels, labels) = state["config"], drawn(args)
    table = Table("judge", args, pick_device(args.device), guidance=args.guidance, step=state.get("step"))
    if s.DATASET == "shapes":
        wanted = torch.tensor([OUTLINES.index(state["classes"][label].split()[-1]) for label in labels])
        share, seen = errors(pixels).min(dim=1)
        right = (seen == wanted) & (share <= SPOILED)
        for k, outline in enumerate(OUTLINES):
            table.add(outline=outline, right=int(right[wanted == k].sum()), of=int((wanted == k).sum()))
        table.add(outline="all", right=int(right.sum()), of=len(pixels))
    else:
        judge, val = Judge(s, args.tiny), open_images(s, "val")
        table.add(what="real validation", **judge(val, val.labels))
        table.add(what="drawn", **judge(pixels, labels if s.CLASS_CONDITIONAL else None))


FLAGS = {
    "checkpoint": dict(default="checkpoints/demo/best.pth", help="default: checkpoints/demo/best.pth"),
    "count": dict(type=int, default=200, help="pictures, one class after the other (default: 200)"),
    "npz": dict(type=Path, help="judge these instead: samples.npz of sample.py, by this checkpoint's data"),
    "guidance": dict(type=float, default=3.0, help="default: 3"),
}

if __name__ == "__main__":
    sys.exit(common.main("judge", __doc__, measure, FLAGS))
