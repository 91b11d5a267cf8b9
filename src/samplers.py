"""From noise to pictures: each sampler is one function that reads like its paper, and one line in SAMPLERS.

A sampler is a generator: sampler(x_t, steps, predict_x_0, noise, eta) yields (x_s, x_0) after each step, the
image it moved to and the clean image it predicted on the way; the last x_s is the picture. It receives

    x_t          [B, 3, S, S] float32, standard normal
    steps        the path, from the noisiest step to the clean image; each is a Step
    predict_x_0  (x_t, t: int) -> [B, 3, S, S], the network's idea of the clean image, clipped where wanted
    noise        (k: int) -> [B, 3, S, S], fresh standard normal noise for step number k = 1, 2, ...
    eta          how random the path is; only ddim reads it

and needs nothing else. The numbers abar are Python floats from float64 tables: nothing waits for the GPU.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor


class Step(NamedTuple):
    """From x_t to x_s, s < t. The last step of a path goes to the clean image, where abar_s = 1."""

    t: int  # what the network is told, in [0, T)
    abar_t: float  # share of the signal's variance in x_t
    abar_s: float  # the same in x_s

    @property
    def is_last(self) -> bool:
        return self.abar_s == 1.0


Denoiser = Callable[[Tensor, int], Tensor]
Noise = Callable[[int], Tensor]
Path = Sequence[Step]
Trajectory = Iterator[tuple[Tensor, Tensor]]


def posterior(abar_t, abar_s):
    """Weights of q(x_s | x_t, x_0) = N(w_0 x_0 + w_t x_t, var I), DDPM Eqs. (6), (7), for any s < t: the step's
    alpha is abar_t / abar_s. Floats or float64 tensors in, the same out: (w_0, w_t, var)."""
    alpha = abar_t / abar_s
    beta = 1 - alpha
    return (
        abar_s**0.5 * beta / (1 - abar_t),
        alpha**0.5 * (1 - abar_s) / (1 - abar_t),
        beta * (1 - abar_s) / (1 - abar_t),
    )


def ddpm(
    x_t: Tensor, steps: Path, predict_x_0: Denoiser, noise: Noise, eta: float = 0.0, variance: str = "beta_tilde"
) -> Trajectory:
    """Ancestral sampling (Ho et al. 2020, Alg. 2, by way of x_0). On fewer than T steps this is the respaced chain of
    Nichol & Dhariwal 2021 (arXiv:2102.09672, sec. 4). variance: of the fresh noise, "beta_tilde", right for data that
    are a single image, or "beta", right for data that are normal noise themselves (sec. 3.2)."""
    for k, step in enumerate(steps, start=1):
        x_0 = predict_x_0(x_t, step.t)
        w_0, w_t, var = posterior(step.abar_t, step.abar_s)
        x_t = w_0 * x_0 + w_t * x_t  # Eq. (7)
        if variance == "beta":
            var = 1 - step.abar_t / step.abar_s
        if not step.is_last:  # the last step adds no noise
            x_t = x_t + var**0.5 * noise(k)
        yield x_t, x_0


def ddim(x_t: Tensor, steps: Path, predict_x_0: Denoiser, noise: Noise, eta: float = 0.0) -> Trajectory:
    """Song et al. 2021 (arXiv:2010.02502), Eq. (12). eta = 0 is deterministic, eta = 1 is as random as ddpm."""
    for k, step in enumerate(steps, start=1):
        x_0 = predict_x_0(x_t, step.t)
        eps = (x_t - step.abar_t**0.5 * x_0) / (1 - step.abar_t) ** 0.5  # of the clipped x_0: the two agree on x_t
        var = eta**2 * posterior(step.abar_t, step.abar_s)[2]  # Eq. (16)
        x_t = step.abar_s**0.5 * x_0 + max(0.0, 1 - step.abar_s - var) ** 0.5 * eps
        if var > 0:
            x_t = x_t + var**0.5 * noise(k)
        yield x_t, x_0


def dpm_solver_pp(x_t: Tensor, steps: Path, predict_x_0: Denoiser, noise: Noise, eta: float = 0.0) -> Trajectory:
    """DPM-Solver++(2M), Lu et al. 2022 (arXiv:2211.01095), Alg. 2: second order in the half log-SNR lambda, one
    network call per step, deterministic. The first step and the last, to the clean image, are of first order."""

    def half_log_snr(abar: float) -> float:
        return 0.5 * (math.log(abar) - math.log1p(-abar)) if abar < 1 else math.inf

    x_0_before, h_before = None, math.nan
    for step in steps:
        x_0 = predict_x_0(x_t, step.t)
        h = half_log_snr(step.abar_s) - half_log_snr(step.abar_t)
        if x_0_before is None or step.is_last:
            slope = x_0
        else:
            slope = x_0 + h / (2 * h_before) * (x_0 - x_0_before)
        sigma_ratio = ((1 - step.abar_s) / (1 - step.abar_t)) ** 0.5
        x_t = sigma_ratio * x_t - step.abar_s**0.5 * math.expm1(-h) * slope
        x_0_before, h_before = x_0, h
        yield x_t, x_0


SAMPLERS: dict[str, Callable[..., Trajectory]] = {
    "ddpm": ddpm,
    "ddpm-beta": partial(ddpm, variance="beta"),
    "ddim": ddim,
    "dpm++": dpm_solver_pp,
}
