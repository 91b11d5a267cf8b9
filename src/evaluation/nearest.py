"""The nearest training pictures: to see whether a sample was drawn or remembered."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from src import noise
from src.evaluation.picture_set import PictureSet
from src.evaluation.report import Evaluation, optional, say
from src.progress import Bar
from src.runtime.sheets import sheet
from src.utils import count, save_png

CHUNK = 2048  # rows of the pool compared at a time: 100 MB as float32 at 64x64
SHEET_ROWS, SHEET_NEIGHBOURS = 32, 5


class Neighbours(NamedTuple):
    distances: Tensor  # [K, n] float64, ascending
    rows: Tensor  # [K, n] int64, positions in the pool
    mirrored: Tensor  # [K, n] bool: the mirrored query is the one that lies this near


def nearest(views: np.ndarray, pool: Any, count: int, device: torch.device) -> Neighbours:
    """The `count` nearest rows of the pool by Euclidean distance, for each query.

    views: [V, K, ...] uint8 or float, the K queries and, if V is 2, the same mirrored: the nearer of the two counts, because
    training sees both.   pool: [N, ...], an array or Images, read once in chunks.   n = min(count, N).
    """
    n = min(count, len(pool))
    exact = torch.from_numpy(views).flatten(2).double()
    centre = exact.mean()  # near 0 the squares that cancel below are small
    queries = (exact - centre).float().to(device)
    best, rows = torch.empty(views.shape[1], 0), torch.empty(views.shape[1], 0, dtype=torch.int64)
    for start in Bar(range(0, len(pool), CHUNK), desc="comparing", unit="chunk", leave=False):
        chunk = torch.from_numpy(np.array(pool[start : start + CHUNK])).to(device).flatten(1).float() - centre.float().item()
        squares = chunk.square().sum(1) - 2 * queries @ chunk.T + queries.square().sum(2, keepdim=True)
        squares, positions = squares.amin(0).topk(min(2 * n, len(chunk)), dim=1, largest=False)
        best, rows = torch.cat([best, squares.cpu()], 1), torch.cat([rows, positions.cpu() + start], 1)
        best, order = best.topk(min(2 * n, best.shape[1]), dim=1, largest=False)
        rows = rows.gather(1, order)
    found = []
    for k, candidates in enumerate(rows):  # again, exactly: near 0 the difference of squares above has lost its digits
        near = torch.from_numpy(pool[candidates.numpy()]).flatten(1).double()
        distances, view = (near - exact[:, k, None]).norm(dim=2).min(0)
        order = distances.argsort(stable=True)[:n]
        found.append((distances[order], candidates[order], view[order] == 1))
    return Neighbours(*map(torch.stack, zip(*found)))


def nearest_sheet(samples: np.ndarray, pool: Any, found: Neighbours, unit: float) -> Tensor:
    """A row for each sample: itself, then its nearest pictures, mirrored if that is nearer, with distances in this unit.
    samples, pool: uint8 [N, C, S, S]."""
    pictures, names = [], []
    for i, (distances, rows, mirrored) in enumerate(zip(*(x[:SHEET_ROWS].tolist() for x in found))):
        pictures += [samples[i], *(pool[row][..., ::-1] if mirror else pool[row] for row, mirror in zip(rows, mirrored))]
        names += [f"sample {i}", *(f"{d / unit:.3g}" + " mirrored" * mirror for d, mirror in zip(distances, mirrored))]
    return sheet(torch.from_numpy(np.stack(pictures)), names, columns=1 + found.rows.shape[1])


def measure_nearest(ev: Evaluation) -> dict[str, Any]:
    """How far the first samples are from the training pictures, beside how far validation pictures are, and a sheet."""
    flags, network, samples = ev.flags, ev.network, ev.samples(ev.flags.nearest)
    if not ev.world.is_main:  # all processes draw, the main one does the rest
        return {}
    train, val = ev.pictures("train"), ev.pictures("val")
    samples = samples.with_channels(ev.settings.CHANNELS)
    some = torch.randperm(len(val), generator=torch.Generator().manual_seed(noise.VALIDATION))[: len(samples)]
    others = PictureSet("validation pictures", val.pixels[some.numpy()])
    found: dict[str, Any] = {"samples": len(samples), "held_out": len(others), "drawing": ev.drawing()}

    def features(pictures: PictureSet) -> np.ndarray:
        kept = ev.cache / "fidelity" if pictures is train else None
        return network.features(pictures, flags.batch_size, kept)[network.layers["fid"]].numpy()

    views: dict[str, Callable[[PictureSet], Any]] = {"pixels": lambda pictures: pictures.pixels}
    if network:
        found["network"], views["features"] = network.name, features
    for view, represent in views.items():
        pool = represent(train)
        both = f"{count(len(samples), 'sample')} and {count(len(others), 'validation picture')}"
        say("nearest", f"{both} among {count(len(pool), 'training picture')}, by {view}")
        hits, usual = (
            nearest(np.stack([represent(p) for p in looks]), pool, SHEET_NEIGHBOURS, ev.device)
            for looks in ([p, p.mirrored()][: 1 + ev.settings.HORIZONTAL_FLIP] for p in (samples, others))
        )
        unit = math.prod(pool.shape[1:]) ** 0.5 if view == "pixels" else 1.0  # root mean square, in grey levels
        near, far = hits.distances[:, 0] / unit, usual.distances[:, 0] / unit
        sheet = ev.out.with_name(f"{ev.out.stem}-nearest-{view}.png")
        if len(samples) > SHEET_ROWS:
            say("note", f"{sheet.name} shows the first {SHEET_ROWS} of {len(samples):,} samples")
        with optional(sheet, "--output_dir"):
            save_png(nearest_sheet(samples.pixels, train.pixels, hits, unit), sheet)
        found[view] = {
            "mean_distance": near.mean().item(),
            "smallest_distance": near.min().item(),
            "mean_distance_of_held_out": far.mean().item(),
            "smallest_distance_of_held_out": far.min().item(),
            "ratio": (near.mean() / far.mean()).item() if far.any() else None,
            "nearest_rows": hits.rows[:, 0].tolist(),
            "sheet": str(sheet),
        }
    return found
