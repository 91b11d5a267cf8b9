"""From noise to images: each sampler is one function that reads like its paper, and one entry in SAMPLERS. At the end, which
steps t a sampler takes where it takes fewer than all: SPACINGS.

A sampler is a generator. sampler(x_T, path, predict_x_0, noise, eta) yields (x_s, x_0) after each step: the image that it
moved to, and the clean image predicted on the way. The last x_s is the result. It receives

    x_T          [B, C, S, S] float32, standard normal
    path         the steps, from the noisiest to the clean image; each is a Step
    predict_x_0  (x_t, t: int) -> [B, C, S, S], the network's prediction of the clean image, clipped if wanted
    noise        (k: int) -> [B, C, S, S], fresh standard normal noise for step number k = 1, 2, ...
    eta          how random the path is; only ddim reads it

and needs nothing else. All numbers in a Step are Python floats: nothing waits for the GPU.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor


class Step(NamedTuple):
    """One step from x_t to x_s, s < t. The last step of a path goes to the clean image, where abar_s = 1."""

    t: int  # what the network is told, in [0, T)
    abar_t: float  # share of the signal's variance in x_t
    abar_s: float  # the same in x_s
    w_0: float  # q(x_s | x_t, x_0) = N(w_0 x_0 + w_t x_t, var I): DDPM, Eqs. (6), (7)
    w_t: float
    var: float  # beta_tilde; 0 in the last step

    @property
    def is_last(self) -> bool:
        return self.abar_s == 1


Denoiser = Callable[[Tensor, int], Tensor]
Noise = Callable[[int], Tensor]
Path = Sequence[Step]
Trajectory = Iterator[tuple[Tensor, Tensor]]


def ddpm(
    x_t: Tensor, path: Path, predict_x_0: Denoiser, noise: Noise, eta: float = 0.0, variance: str = "beta_tilde"
) -> Trajectory:
    """Ancestral sampling (Ho et al. 2020, Alg. 2, by way of x_0). On fewer than T steps this is the respaced chain of
    Nichol & Dhariwal 2021 (arXiv:2102.09672, sec. 4). variance of the fresh noise: "beta_tilde" is right for data that
    are one single image, "beta" for data that are normal noise themselves (sec. 3.2)."""
    for k, step in enumerate(path, start=1):
        x_0 = predict_x_0(x_t, step.t)
        x_t = step.w_0 * x_0 + step.w_t * x_t  # Eq. (7)
        if not step.is_last:  # the last step adds no noise
            var = step.var if variance == "beta_tilde" else 1 - step.abar_t / step.abar_s
            x_t = x_t + var**0.5 * noise(k)
        yield x_t, x_0


def ddim(x_t: Tensor, path: Path, predict_x_0: Denoiser, noise: Noise, eta: float = 0.0) -> Trajectory:
    """Song et al. 2021 (arXiv:2010.02502), Eq. (12). eta = 0 is deterministic, eta = 1 is as random as ddpm."""
    for k, step in enumerate(path, start=1):
        x_0 = predict_x_0(x_t, step.t)
        eps = (x_t - step.abar_t**0.5 * x_0) / (1 - step.abar_t) ** 0.5  # of the clipped x_0: the two agree on x_t
        var = eta**2 * step.var  # Eq. (16)
        x_t = step.abar_s**0.5 * x_0 + max(0.0, 1 - step.abar_s - var) ** 0.5 * eps
        if var > 0:
            x_t = x_t + var**0.5 * noise(k)
        yield x_t, x_0


def dpm_solver_pp(x_t: Tensor, path: Path, predict_x_0: Denoiser, noise: Noise, eta: float = 0.0) -> Trajectory:
    """DPM-Solver++(2M), Lu et al. 2022 (arXiv:2211.01095), Alg. 2: second order in the half log-SNR lambda, one network
    call per step, deterministic. The first step is of first order, and so is the last, which goes to the clean image."""

    def half_log_snr(abar: float) -> float:
        return 0.5 * (math.log(abar) - math.log1p(-abar)) if abar < 1 else math.inf

    x_0_before, h_before = None, math.nan
    for step in path:
        x_0 = predict_x_0(x_t, step.t)
        h = half_log_snr(step.abar_s) - half_log_snr(step.abar_t)
        slope = x_0
        if x_0_before is not None and not step.is_last:
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


def even(abar: Tensor, steps: int) -> list[int]:
    """Evenly spaced in t (the "trailing" spacing of Lin et al. 2023, arXiv:2305.08891, sec. 3.3)."""
    return [round(len(abar) * (1 - i / steps)) - 1 for i in range(steps)]


def logsnr(abar: Tensor, steps: int) -> list[int]:
    """Evenly spaced in the log-SNR, as Lu et al. 2022 (arXiv:2206.00927) take them, from the noise of T - 1, at most 160 times
    as strong as the signal, to 0.02 times, which stands for the clean image. The linear schedule ends at 157; the cosine
    schedule has a third of its log-SNR beyond 160, in its last four t. docs/recipes.md has the measurements. abar: [T]."""
    log_noise = (1 / abar - 1).log() / 2  # ln(sigma / signal) at each t, rising
    first, last = min(math.log(160), log_noise[-1].item()), math.log(0.02)
    times = [len(abar) - 1]
    for i in range(1, steps):
        nearest = int((log_noise - (first + (last - first) * i / steps)).abs().argmin())
        fewest, most = steps - 1 - i, times[-1] - 1  # each t once, with enough of them left for the other steps
        times.append(max(fewest, min(most, nearest)))
    return times


# name -> function of (abar [T] float64, steps 1 to T) that gives the t of each step, falling, from T - 1.
SPACINGS: dict[str, Callable[[Tensor, int], list[int]]] = {"logsnr": logsnr, "even": even}
