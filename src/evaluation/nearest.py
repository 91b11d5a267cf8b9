"""The nearest training pictures: to see whether a sample was drawn or remembered."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CHUNK = 2048  # rows of the pool compared at a time: 100 MB as float32 at 64x64


class Neighbours(NamedTuple):
    distances: Tensor  # [K, n] float64, ascending
    rows: Tensor  # [K, n] int64, places in the pool
    mirrored: Tensor  # [K, n] bool: it was the mirrored query that lies this near


def nearest(queries: Tensor, pool: np.ndarray, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The `count` nearest rows of the pool by Euclidean distance, for each query.

    queries: [K, ...] uint8 or float.   pool: [N, ...], mapped from a file or not, read once in chunks.
    Returns distances [K, n] float64, ascending, and rows [K, n] int64, n = min(count, N).
    """
    n = min(count, len(pool))
    centre = queries.double().mean()  # near 0 the squares that cancel below are small
    q = (queries.flatten(1).double() - centre).float().to(device)
    best, rows = torch.empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.int64)
    for start in range(0, len(pool), CHUNK):
        chunk = torch.from_numpy(np.array(pool[start : start + CHUNK])).to(device).flatten(1).float() - centre.float().item()
        squares = chunk.square().sum(1) - 2 * q @ chunk.T  # |q - c|^2 but for |q|^2, the same for all c
        squares, places = squares.topk(min(2 * n, len(chunk)), dim=1, largest=False)
        best, rows = torch.cat([best, squares.cpu()], 1), torch.cat([rows, places.cpu() + start], 1)
        best, order = best.topk(min(2 * n, best.shape[1]), dim=1, largest=False)
        rows = rows.gather(1, order)
    distances = torch.stack(  # again, exactly: near 0 the difference of squares above has lost its digits
        [(torch.from_numpy(pool[r.numpy()]).double() - x.double()).flatten(1).norm(dim=1) for x, r in zip(queries, rows)]
    )
    distances, order = distances.sort(dim=1)
    return distances[:, :n], rows.gather(1, order)[:, :n]


def nearest_mirrored(
    queries: Tensor, mirrored: Tensor | None, pool: np.ndarray, count: int, device: torch.device
) -> Neighbours:
    """As `nearest`, to the query or its mirror image, whichever is nearer, as training saw both. mirrored: like
    queries, or None."""
    both = queries if mirrored is None else torch.cat([queries, mirrored])
    distances, rows = nearest(both, pool, count, device)
    is_mirror = torch.zeros_like(rows, dtype=torch.bool)
    if mirrored is not None:
        is_mirror[len(queries) :] = True
        distances, rows, is_mirror = (torch.cat(x.chunk(2), 1) for x in (distances, rows, is_mirror))
        distances, order = distances.sort(dim=1)
        rows, is_mirror = rows.gather(1, order), is_mirror.gather(1, order)
        # a picture may be near as it is and mirrored: keep the first time that it comes
        seen = torch.stack([(rows[:, :i] == rows[:, i : i + 1]).any(1) for i in range(rows.shape[1])], 1)
        order = (seen.to(torch.int8)).sort(dim=1, stable=True).indices[:, : min(count, len(pool))]
        distances, rows, is_mirror = (x.gather(1, order) for x in (distances, rows, is_mirror))
    return Neighbours(distances, rows, is_mirror)
