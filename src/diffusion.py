"""The diffusion process of Ho et al. 2020 (arXiv:2006.11239), in the order of the paper.

Symbols are the paper's: x_0 is a clean image with pixels in [-1, 1], x_t the same image after step t, eps the noise, abar the
product of all alpha = 1 - beta so far. Index t = 0 in code is the paper's t = 1, the first and least noisy step; what the
paper calls t = 0 is the clean image, where abar = 1. Nothing below shifts an index again.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from src.samplers import SAMPLERS, SPACINGS, Denoiser, Noise, Step, Trajectory

Model = Callable[..., Tensor]  # model(x_t, t, y) -> [B, C, S, S]; t: [B] int64; y: [B] int64 or None

# --- the schedule: Eq. (2), sec. 4 ----------------------------------------------------------------------


def linear_betas(time_steps: int) -> Tensor:
    """beta from 1e-4 to 0.02 in equal steps (sec. 4) for T = 1000. For another T they scale by 1000 / T, so that the
    noise adds up to the same; a beta of 0.999 is the largest. Returns [T] float64."""
    scale = 1000 / time_steps
    return torch.linspace(1e-4 * scale, 0.02 * scale, time_steps, dtype=torch.float64).clamp(max=0.999)


def cosine_betas(time_steps: int) -> Tensor:
    """abar falls as a squared cosine (Nichol & Dhariwal 2021, arXiv:2102.09672, Eq. 17), beta is at most 0.999.
    Returns [T] float64."""
    time = torch.linspace(0, 1, time_steps + 1, dtype=torch.float64)
    abar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)


SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}
PREDICTIONS = ("eps", "v", "x0")


def posterior(abar_t, abar_s):
    """q(x_s | x_t, x_0) = N(w_0 x_0 + w_t x_t, var I), Eqs. (6), (7), for any s < t.
    Takes floats or float64 tensors and returns (w_0, w_t, var) of the same kind."""
    alpha = abar_t / abar_s  # of the step from s to t
    beta = 1 - alpha
    w_0, w_t, var = abar_s**0.5 * beta, alpha**0.5 * (1 - abar_s), beta * (1 - abar_s)
    return w_0 / (1 - abar_t), w_t / (1 - abar_t), var / (1 - abar_t)


def at(table: Tensor, t: Tensor) -> Tensor:
    """One entry per image, shaped to multiply a batch. table: [T], t: [B] int64. Returns [B, 1, 1, 1]."""
    return table.to(t.device)[t][:, None, None, None]


class GaussianDiffusion(nn.Module):
    """Tables of the forward process and its posterior, the loss, and sampling.

    time_steps: T, at least 2.   schedule: "linear" or "cosine".   prediction: what the network gives, "eps", "v" or
    "x0".   min_snr_gamma: caps the loss weight of low-noise steps (arXiv:2303.09556), 0 is off.

    `betas` and `alphas_cumprod` are [T] float64 on the CPU; the tables used on images are their float32 roundings.
    Raises ValueError for a value that is not allowed.
    """

    def __init__(self, time_steps: int = 1000, schedule: str = "linear", prediction: str = "eps", min_snr_gamma: float = 0.0):
        super().__init__()
        for name, value, known in (("schedule", schedule, SCHEDULES), ("prediction", prediction, PREDICTIONS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
        if time_steps < 2:
            raise ValueError(f"time_steps is {time_steps}, expected at least 2")
        if min_snr_gamma < 0:
            raise ValueError(f"min_snr_gamma is {min_snr_gamma}, expected at least 0, which is off")
        self.time_steps, self.prediction = time_steps, prediction
        self.betas = SCHEDULES[schedule](time_steps)
        self.alphas_cumprod = abar = (1 - self.betas).cumprod(0)
        abar_before = F.pad(abar[:-1], (1, 0), value=1.0)  # the clean image carries no noise
        w_0, w_t, var = posterior(abar, abar_before)
        snr = abar / (1 - abar)
        # By `to_x_0`: the squared error of x_0 where that of the prediction is 1 (arXiv:2303.09556, sec. 3.4).
        x_0_error = {"eps": 1 / snr, "v": 1 / (snr + 1), "x0": torch.ones_like(snr)}[prediction]

        def table(values: Tensor) -> nn.Buffer:
            return nn.Buffer(values.float(), persistent=False)  # follows from the settings: not checkpointed

        self.signal, self.sigma = table(abar.sqrt()), table((1 - abar).sqrt())  # of q(x_t | x_0), Eq. (4)
        self.w_0, self.w_t, self.var = table(w_0), table(w_t), table(var)  # of q(x_{t-1} | x_t, x_0), Eqs. (6), (7)
        self.log_var = table(var.clamp(min=var[1]).log())  # var is 0 at t = 0: the logarithm takes its neighbour's
        self.weight = table(snr.clamp(max=min_snr_gamma) * x_0_error if min_snr_gamma else torch.ones_like(snr))
        self.val_weight = table((5 / snr).clamp(max=1))  # of an error of eps: min-SNR with gamma 5, see validation_losses

    # --- forward process: Eq. (4) -----------------------------------------------------------------------

    def q_sample(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Noise clean images straight to step t, Eq. (4).
        x_0: [B, C, S, S] float, pixels in [-1, 1].   t: [B] int64 in [0, T); 0 means one step of noise.
        noise: like x_0, standard normal.   Returns x_t, like x_0.
        """
        return at(self.signal, t) * x_0 + at(self.sigma, t) * noise

    # --- posterior: Eqs. (6), (7) -----------------------------------------------------------------------

    def q_posterior(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q(x_{t-1} | x_t, x_0): its mean, like x_0; its variance beta_tilde, [B, 1, 1, 1], 0 at t = 0; and the logarithm
        of the variance, [B, 1, 1, 1], which at t = 0 has the value of t = 1."""
        mean = at(self.w_0, t) * x_0 + at(self.w_t, t) * x_t
        return mean, at(self.var, t), at(self.log_var, t)

    # --- what the network predicts ----------------------------------------------------------------------

    def target(self, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should give for x_t: the noise, x_0, or v = signal noise - sigma x_0 (arXiv:2202.00512, app. D)."""
        if self.prediction in ("eps", "x0"):
            return noise if self.prediction == "eps" else x_0
        return at(self.signal, t) * noise - at(self.sigma, t) * x_0

    def to_x_0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean image that belongs to the network's prediction for x_t, not clipped. Eq. (15) for eps."""
        if self.prediction == "eps":
            return (x_t - at(self.sigma, t) * prediction) / at(self.signal, t)
        if self.prediction == "x0":
            return prediction
        return at(self.signal, t) * x_t - at(self.sigma, t) * prediction

    def to_eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that belongs to the network's prediction for x_t."""
        if self.prediction == "eps":
            return prediction
        if self.prediction == "x0":
            return (x_t - at(self.signal, t) * prediction) / at(self.sigma, t)
        return at(self.sigma, t) * x_t + at(self.signal, t) * prediction

    # --- loss: L_simple, Eq. (14) -----------------------------------------------------------------------

    def training_losses(
        self, model: Model, x_0: Tensor, t: Tensor, noise: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        """Squared error of the prediction, mean over pixels, times the min-SNR weight. Shapes as in q_sample; noise is
        drawn if none is given.   y: [B] int64 labels, -1 for none, or None.   Returns [B] float32."""
        noise = torch.randn_like(x_0) if noise is None else noise
        prediction = model(self.q_sample(x_0, t, noise), t, y).float()
        losses = (prediction - self.target(x_0, t, noise)).square().flatten(1).mean(1)
        return losses * self.weight.to(t.device)[t]

    @torch.no_grad()
    def eps_losses(self, model: Model, x_0: Tensor, t: Tensor, noise: Tensor, y: Tensor | None = None) -> Tensor:
        """Squared error of the noise without weights, whatever the network predicts: comparable between runs. Returns [B]."""
        x_t = self.q_sample(x_0, t, noise)
        eps = self.to_eps(model(x_t, t, y).float(), x_t, t)
        return (eps - noise).square().flatten(1).mean(1)

    def validation_losses(self, model: Model, x_0: Tensor, t: Tensor, noise: Tensor, y: Tensor | None = None) -> Tensor:
        """The same times min(1, 5 / SNR), so that the least noisy steps do not rule the mean: there a small error of x_0 is a
        large one of eps (the min-SNR weight with gamma 5, whatever the run trains with). Returns [B]."""
        return self.eps_losses(model, x_0, t, noise, y) * self.val_weight.to(t.device)[t]

    # --- reverse process: Alg. 2 and its faster relatives in samplers.py ---------------------------------

    def path(self, steps: int | None = None, spacing: str | None = None) -> list[Step]:
        """`steps` steps from pure noise to the clean image; the first is T - 1. Any number from 1 to T; None is all T.
        spacing: a name in SPACINGS, None is "logsnr"; it makes a difference for fewer steps than T."""
        steps, spacing = self.time_steps if steps is None else steps, spacing or "logsnr"
        if not 1 <= steps <= self.time_steps:
            raise ValueError(f"steps is {steps}, expected a number from 1 to {self.time_steps}, the model's TIME_STEPS")
        if spacing not in SPACINGS:
            raise ValueError(f"spacing is {spacing!r}, expected one of {', '.join(SPACINGS)}")
        times = SPACINGS[spacing](self.alphas_cumprod, steps)
        abar = [*self.alphas_cumprod[times].tolist(), 1.0]
        return [Step(t, abar_t, abar_s, *posterior(abar_t, abar_s)) for t, abar_t, abar_s in zip(times, abar, abar[1:])]

    def denoiser(self, model: Model, y: Tensor | None = None, guidance: float = 1.0, clip_denoised: bool = True) -> Denoiser:
        """What a sampler asks: predict_x_0(x_t, t), the clean image by the network's prediction. Arguments as in `sample`."""

        def predict_x_0(x_t: Tensor, t: int) -> Tensor:
            ts = torch.full((len(x_t),), t, device=x_t.device)
            if guidance == 1 or y is None:
                prediction = model(x_t, ts, y)
            elif guidance == 0:
                prediction = model(x_t, ts, None)
            else:  # arXiv:2207.12598, Eq. (6) with w = guidance - 1; the same for v and x_0, linear in eps at a given x_t
                unconditional = model(x_t, ts, None)
                prediction = unconditional + guidance * (model(x_t, ts, y) - unconditional)
            x_0 = self.to_x_0(prediction.float(), x_t, ts)
            if clip_denoised:  # before the mean: afterwards it would change nothing
                x_0 = torch.where(x_0.isfinite(), x_0.clamp(-1, 1), math.nan)  # and infinity stays a fault
            return x_0

        return predict_x_0

    def trajectory(
        self, sampler: str, x_T: Tensor, path: list[Step], denoiser: Denoiser, noise: Noise, eta: float
    ) -> Trajectory:
        """The states (x_s, x_0) of a sampler, step by step. FloatingPointError at its end if a prediction was not finite."""
        finite = []  # on the device: the loop does not wait for it
        for x, x_0 in SAMPLERS[sampler](x_T, path, denoiser, noise, eta):
            finite.append(x_0.isfinite().all())
            yield x, x_0
        if False in (was_finite := torch.stack(finite).tolist()):
            k = was_finite.index(False)
            raise FloatingPointError(f"The network's prediction is not finite in step {k + 1} of {len(path)} (t = {path[k].t})")

    @torch.no_grad()
    def sample(
        self,
        model: Model,
        shape: tuple[int, ...],
        sampler: str = "ddpm",
        steps: int | None = None,
        eta: float = 0.0,
        noise: Tensor | Callable[[int], Tensor] | None = None,
        generator: torch.Generator | None = None,
        y: Tensor | None = None,
        guidance: float = 1.0,
        clip_denoised: bool = True,
        progress: bool = False,
        spacing: str | None = None,
    ) -> Tensor:
        """Draw images by Alg. 2 or a faster sampler.

        model: (x_t, t, y) -> prediction; a module is put into eval mode and back.   shape: (B, C, S, S).
        sampler: a name in SAMPLERS.   steps, spacing: as in `path`.   eta: randomness of ddim, 0 to 1.
        noise: x_T, or a function whose value at k = 0 is x_T and at k = 1, 2, ... the fresh noise of step k.
        generator: for the noise that `noise` does not give.   y: [B] int64 labels or None.   guidance: 1 follows the label,
        0 ignores it, more than 1 exaggerates it and needs two network calls a step.   clip_denoised: clip each predicted
        x_0 to [-1, 1].   Returns [B, C, S, S] float32.
        Raises ValueError for an option that is not allowed, FloatingPointError if a prediction is not finite.
        """
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler is {sampler!r}, expected one of {', '.join(SAMPLERS)}")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}, expected a number from 0 to 1")
        device = self.signal.device

        def fresh(k: int) -> Tensor:
            if callable(noise):
                return noise(k)
            return torch.randn(shape, generator=generator, device=generator.device if generator else device).to(device)

        path, x = self.path(steps, spacing), noise if isinstance(noise, Tensor) else fresh(0)
        states = self.trajectory(sampler, x, path, self.denoiser(model, y, guidance, clip_denoised), fresh, eta)
        with eval_mode(model):
            for x, _ in tqdm(states, total=len(path), desc=sampler, unit="step", disable=not progress):  # noqa: B007
                pass
        return x


@contextmanager
def eval_mode(model: Model) -> Iterator[None]:
    """Dropout off inside the block; afterwards each module is back in its mode. Plain functions pass through."""
    modules = [module for module in model.modules() if module.training] if isinstance(model, nn.Module) else []
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


def test_diffusion() -> None:
    """Self-test, seconds on a CPU. Raises AssertionError."""
    torch.manual_seed(0)
    for schedule in SCHEDULES:
        abar = GaussianDiffusion(1000, schedule).alphas_cumprod
        assert (abar.diff() < 0).all() and abar[-1] < 1e-4, f"{schedule}: abar ends at {abar[-1]:.1e}"
    print("linear and cosine: abar falls to nearly 0")

    x_0, noise, t = torch.rand(8, 3, 4, 4) * 2 - 1, torch.randn(8, 3, 4, 4), torch.arange(0, 1000, 125)
    for prediction in PREDICTIONS:
        diffusion = GaussianDiffusion(prediction=prediction)
        target = diffusion.target(x_0, t, noise)
        torch.testing.assert_close(diffusion.to_x_0(target, diffusion.q_sample(x_0, t, noise), t), x_0, atol=2e-3, rtol=0)
        assert diffusion.training_losses(lambda *_: target, x_0, t, noise).max() < 1e-10  # noqa: B023 (used at once)
    print("eps, v, x0: a perfect predictor has loss 0 and gives back x_0")

    diffusion, mean, std = GaussianDiffusion(prediction="x0"), 0.3, 0.2

    def best(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """E[x_0 | x_t] for data from N(mean, std^2), in closed form."""
        signal, sigma = at(diffusion.signal, t), at(diffusion.sigma, t)
        return mean + signal * std**2 / (signal**2 * std**2 + sigma**2) * (x - signal * mean)

    for sampler, steps in (("ddpm", 1000), ("ddim", 200), ("dpm++", 50)):
        x = diffusion.sample(best, (64, 3, 8, 8), sampler=sampler, steps=steps, clip_denoised=False)
        assert abs(x.mean() - mean) < 0.02 and abs(x.std() - std) < 0.02, f"{sampler}: {x.mean():.3f} +- {x.std():.3f}"
        print(f"{sampler}, {steps} steps: data from N({mean}, {std}^2) come out as {x.mean():.3f} +- {x.std():.3f}")
