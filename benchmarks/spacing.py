"""Which steps a sampler takes: the error of few steps, even in the log-SNR and even in t, as a Markdown table.

    python -m benchmarks.spacing                                       # mixtures of Gaussians, whose best network is known
    python -m benchmarks.spacing --checkpoint docs/shapes.pth --guidance 1

The error is the distance per pixel to the exact end from the same noise: for mixtures the end of 600 steps of dpm++ that go far
below the last t, for a checkpoint the end of ddim in all its steps. "ring" is 8 narrow Gaussians in 2 dimensions, "clusters" 10
in 64, "image" 8 in 64 dimensions that stand for the frequencies of a picture, with most of the power in the lowest.
"""

import math
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Args, Table
from src.diffusion import SCHEDULES, GaussianDiffusion, posterior
from src.runtime.build import build_diffusion, build_model
from src.runtime.checkpoint import TO_DRAW, load_checkpoint, load_weights
from src.runtime.device import pick_device
from src.samplers import SAMPLERS, SPACINGS, Step

SAMPLED = ("dpm++", "ddim")


class Mixture:
    """means, stds: [K, D] of Gaussians of equal weight.   power: [D], what each dimension counts in the error."""

    def __init__(self, means: Tensor, stds: Tensor, power: Tensor):
        self.means, self.variances, self.power = means.double(), stds.double() ** 2, power.double() / power.sum()

    def x_0(self, x: Tensor, abar: float) -> Tensor:
        """E[x_0 | x_t], for x_t: [B, D]."""
        variances = abar * self.variances + 1 - abar
        away = x[:, None] - abar**0.5 * self.means  # [B, K, D]
        parts = (-0.5 * (away**2 / variances + variances.log()).sum(2)).softmax(1)
        return (parts[..., None] * (self.means + abar**0.5 * self.variances / variances * away)).sum(1)

    def error(self, x: Tensor, exact: Tensor) -> float:
        return ((x - exact) ** 2 @ self.power).sqrt().mean().item()


def mixtures() -> dict[str, Mixture]:
    random, angle = torch.Generator().manual_seed(7), torch.arange(8) * torch.pi / 4
    ring = Mixture(0.7 * torch.stack([angle.cos(), angle.sin()], 1), torch.full((8, 2), 0.05), torch.ones(2))
    clusters = Mixture(torch.rand(10, 64, generator=random) * 1.6 - 0.8, torch.full((10, 64), 0.1), torch.ones(64))
    frequency = torch.logspace(0, 4.09, 64)  # 1 to 12,288, as a picture of 64x64 has
    std = 14 / frequency**0.6
    means = std * torch.randn(8, 64, generator=random) - 8.0 * (frequency == 1)
    image = Mixture(means, std * (0.4 + 0.6 * torch.rand(8, 1, generator=random)), frequency)
    return {"ring": ring, "clusters": clusters, "image": image}


def denoise(mixture: Mixture, abar: list[float], x: Tensor, t: int) -> Tensor:
    return mixture.x_0(x, abar[t])


def walk(sampler: str, path: list[Step], x: Tensor, x_0: Callable[[Tensor, int], Tensor]) -> Tensor:
    *_, (end, _) = SAMPLERS[sampler](x, path, x_0, lambda k: torch.randn_like(x), 0.0)
    return end


def measure_mixtures(args: Args, table: Table) -> None:
    for schedule in SCHEDULES:
        diffusion = GaussianDiffusion(schedule=schedule)
        abar = diffusion.alphas_cumprod.tolist()
        for data, mixture in mixtures().items():
            x = torch.randn(args.count, mixture.means.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            ratios = torch.linspace(math.log(1 / abar[-1] - 1) / 2, math.log(1e-4), 600, dtype=torch.float64).exp()
            fine = [*(1 / (1 + ratios**2)).tolist(), 1.0]
            ideal = [Step(i, t, s, *posterior(t, s)) for i, (t, s) in enumerate(pairwise(fine))]
            exact = walk("dpm++", ideal, x, partial(denoise, mixture, fine))
            for sampler in SAMPLED:
                for steps in args.steps:
                    paths = {spacing: diffusion.path(steps, spacing) for spacing in SPACINGS}
                    ends = {name: walk(sampler, path, x, partial(denoise, mixture, abar)) for name, path in paths.items()}
                    errors = {spacing: mixture.error(end, exact) for spacing, end in ends.items()}
                    row = dict(data=data, schedule=schedule, sampler=sampler, steps=steps)
                    table.add(**row, **errors, ratio=errors["logsnr"] / errors["even"])


@torch.no_grad()
def measure_checkpoint(args: Args, table: Table) -> None:
    state = load_checkpoint(args.checkpoint, TO_DRAW)
    s, classes = state["config"], len(state["classes"])
    model, diffusion = build_model(s, classes).eval(), build_diffusion(s)
    load_weights(model, state["ema"])
    shape = (args.count, 3, s.IMAGE_SIZE, s.IMAGE_SIZE)
    noise, y = torch.randn(shape, generator=torch.Generator().manual_seed(3)), torch.arange(args.count) % classes
    options = dict(noise=noise, y=y if s.CLASS_CONDITIONAL else None, guidance=args.guidance)
    exact = diffusion.sample(model, shape, "ddim", **options)
    for sampler in SAMPLED:
        for steps in args.steps:
            ends = {spacing: diffusion.sample(model, shape, sampler, steps, spacing=spacing, **options) for spacing in SPACINGS}
            errors = {spacing: (end - exact).square().mean((1, 2, 3)).sqrt().mean().item() for spacing, end in ends.items()}
            brighter = {f"brighter_{spacing}": (end - exact).mean().item() for spacing, end in ends.items()}
            table.add(sampler=sampler, steps=steps, **errors, ratio=errors["logsnr"] / errors["even"], **brighter)


def measure(args: Args) -> None:
    about = dict(checkpoint=args.checkpoint.name, guidance=args.guidance) if args.checkpoint else {}
    args.steps, args.count = ([3], 4) if args.tiny else (args.steps, args.count)
    table = Table("spacing", args, pick_device("cpu"), count=args.count, **about)
    (measure_checkpoint if args.checkpoint else measure_mixtures)(args, table)
    table.print()


FLAGS: common.Flags = {
    "checkpoint": dict(type=Path, help="a trained one, instead of mixtures"),
    "guidance": dict(type=float, default=1.0, help="of the checkpoint (default: 1)"),
    "steps": dict(type=int, nargs="+", default=[5, 10, 20, 50], help="default: 5 10 20 50"),
    "count": dict(type=int, default=200, help="starting points (default: 200)"),
}

if __name__ == "__main__":
    sys.exit(common.main("spacing", __doc__, measure, FLAGS))
