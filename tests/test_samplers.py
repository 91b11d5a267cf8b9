"""From noise to pictures: every sampler against laws that are known in closed form, and against diffusers step by step."""

import math
from itertools import pairwise

import diffusers
import pytest
import torch

from src.diffusion import SCHEDULES, GaussianDiffusion, at, posterior
from src.samplers import SAMPLERS, SPACINGS, ddim, dpm_solver_pp
from tests.test_diffusion import THEIR_SCHEDULE, say

DETERMINISTIC = ("ddim", "dpm++")


class Gaussian:
    """Data from N(mean, std^2), every pixel for itself, and the best network there can be for them."""

    def __init__(self, mean, std):
        self.mean, self.std = mean, std

    def moments(self, abar):
        """Mean and variance of x_t."""
        return abar**0.5 * self.mean, abar * self.std**2 + 1 - abar

    def x_0(self, x, abar):
        """E[x_0 | x_t]: the regression line."""
        mean, variance = self.moments(abar)
        return self.mean + abar**0.5 * self.std**2 / variance * (x - mean)

    def exact(self, x, abar_t, abar_s):
        """Where the probability-flow ODE carries x from t to s: to the same quantile."""
        (mean_t, var_t), (mean_s, var_s) = self.moments(abar_t), self.moments(abar_s)
        return mean_s + (var_s / var_t) ** 0.5 * (x - mean_t)


class Mixture:
    """Data from one of several narrow Gaussians, and the best network there can be for them."""

    def __init__(self, weights, means, std):
        self.weights, self.parts = torch.tensor(weights), [Gaussian(mean, std) for mean in means]

    def x_0(self, x, abar):
        scores, guesses = [], []
        for weight, part in zip(self.weights, self.parts):
            mean, variance = part.moments(abar)
            scores.append(weight.log() - (x - mean) ** 2 / (2 * variance))
            guesses.append(part.x_0(x, abar))
        return (torch.stack(scores).softmax(0) * torch.stack(guesses)).sum(0)


def trajectory(
    diffusion, model, shape, sampler="ddpm", steps=None, spacing="logsnr", eta=0.0, noise=None, generator=None, **options
):
    """The states of a sampler: what `sample` runs through."""

    def fresh(k):
        return noise(k) if callable(noise) else torch.randn(shape, generator=generator)

    x_T = noise if isinstance(noise, torch.Tensor) else fresh(0)
    return SAMPLERS[sampler](x_T, diffusion.path(steps, spacing), diffusion.denoiser(model, **options), fresh, eta)


def network(diffusion, data):
    """The best network for `data`, in the language of `diffusion.prediction`."""

    def model(x, t, y=None):
        return say(diffusion, data.x_0(x, at(diffusion.alphas_cumprod, t).to(x.dtype)), x, t)

    return model


def wavy(x, t, y=None):
    """Some smooth function of the image and the step: no diffusion knows it, every sampler must follow it."""
    return 0.5 * torch.sin(3 * x + t[:, None, None, None] / 100) + 0.3 * x


class Wavy:
    """Data of no known law, and a network that is as crooked as one may be: every sampler must follow it all the same."""

    def x_0(self, x, abar):
        return 0.9 * torch.sin(2 * x + 6 * abar)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def noises(shape, count, seed=0):
    """noise(k), the same each time it is asked."""
    table = torch.randn(count, *shape, generator=generator(seed))
    return lambda k: table[k]


SHAPE = (2, 3, 4, 4)

# --- the path ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("time_steps", [2, 10, 97])
def test_a_path_of_any_length_runs_down_from_the_last_step_to_the_clean_image(time_steps, schedule, spacing):
    diffusion = GaussianDiffusion(time_steps, schedule)
    assert diffusion.path(None, spacing) == diffusion.path(time_steps, spacing)
    for steps in range(1, time_steps + 1):
        path = diffusion.path(steps, spacing)
        times = [step.t for step in path]
        assert len(path) == steps and times[0] == time_steps - 1 and times[-1] >= 0
        assert all(t > s for t, s in pairwise(times))
        assert [step.abar_t for step in path] == diffusion.alphas_cumprod[times].tolist()
        assert [step.abar_s for step in path] == [*diffusion.alphas_cumprod[times[1:]].tolist(), 1.0]
        assert [step.is_last for step in path] == [False] * (steps - 1) + [True]


def test_steps_are_evenly_spaced_to_within_rounding():
    for steps in (3, 7, 20, 400, 999):
        times = [step.t + 1 for step in GaussianDiffusion(1000).path(steps, "even")]
        assert all(abs(t - 1000 * (1 - i / steps)) <= 0.5 for i, t in enumerate(times))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_steps_are_evenly_spaced_in_the_log_snr_to_within_a_step_of_the_table(schedule):
    """From ln 160, or the noise of T - 1 if that is less, to ln 0.02, where the clean image stands. The first step is T - 1."""
    diffusion = GaussianDiffusion(1000, schedule)
    first = {"linear": math.log(157.407), "cosine": math.log(160)}[schedule]
    log_noise = ((1 - diffusion.alphas_cumprod) / diffusion.alphas_cumprod).log() / 2
    for steps in (3, 10, 20):
        for i, step in enumerate(diffusion.path(steps, "logsnr")[1:], start=1):
            aim = first * (1 - i / steps) + math.log(0.02) * i / steps
            nearest = log_noise[max(step.t - 1, 0) : step.t + 2]
            assert (log_noise[step.t] - aim).abs() == (nearest - aim).abs().min()


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_steps_that_are_even_in_the_log_snr_come_closer_to_the_exact_solution(schedule, sampler):
    """Normal data whose probability-flow ODE has a closed form, 20 steps: less than half the error of even steps."""
    diffusion, data = GaussianDiffusion(1000, schedule, prediction="x0"), Gaussian(0.3, 0.1)
    x_T = torch.linspace(-2, 2, 96).view(SHAPE)
    exact = data.exact(x_T.double(), diffusion.alphas_cumprod[-1].item(), 1.0)

    def error(spacing):
        how = dict(sampler=sampler, steps=20, spacing=spacing, noise=x_T, clip_denoised=False)
        *_, (end, _) = trajectory(diffusion, network(diffusion, data), SHAPE, **how)
        return (end - exact).square().mean().sqrt().item()

    assert error("logsnr") < error("even") / 2


def test_the_respaced_posterior_is_the_product_of_two_gaussians():
    """Bayes, for a step over several t at once: alpha = abar_t / abar_s."""
    abar_t, abar_s = 0.2, 0.7
    alpha = abar_t / abar_s
    precision = alpha / (1 - alpha) + 1 / (1 - abar_s)
    expected = (abar_s**0.5 / (1 - abar_s) / precision, alpha**0.5 / (1 - alpha) / precision, 1 / precision)
    assert posterior(abar_t, abar_s) == pytest.approx(expected)


# --- the law that comes out -------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_gaussian_data_come_out_with_their_mean_and_variance(sampler, prediction, schedule):
    diffusion, data = GaussianDiffusion(1000, schedule, prediction), Gaussian(0.3, 0.2)
    options = dict(sampler=sampler, steps=200 if sampler in DETERMINISTIC else 1000, clip_denoised=False, generator=generator())
    x = diffusion.sample(network(diffusion, data), (100, 3, 8, 8), **options)
    assert abs(x.mean() - 0.3) < 0.01 and abs(x.std() - 0.2) < 0.01


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_mixture_comes_out_with_its_weights_and_means_and_ever_closer(sampler):
    diffusion, data = GaussianDiffusion(1000), Mixture((0.3, 0.7), (-0.6, 0.5), 0.1)
    distances = []
    target = torch.cat([-0.6 + 0.1 * quantiles(9_000), 0.5 + 0.1 * quantiles(21_000)]).sort().values
    for steps in (5, 20, 100):
        options = dict(sampler=sampler, steps=steps, clip_denoised=False, generator=generator())
        x = diffusion.sample(network(diffusion, data), (100, 3, 10, 10), **options)
        distances.append((x.flatten().sort().values - target).abs().mean().item())  # earth mover's
    assert distances[2] < distances[1] < distances[0] and distances[2] < 0.02, distances
    low = x < -0.05
    assert abs(low.float().mean() - 0.3) < 0.02
    assert abs(x[low].mean() + 0.6) < 0.02 and abs(x[~low].mean() - 0.5) < 0.02
    assert abs(x[low].std() - 0.1) < 0.02 and abs(x[~low].std() - 0.1) < 0.02


def quantiles(count):
    """`count` numbers that lie as the normal distribution does, without chance."""
    return torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count).float()


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("dpm++", 2)])
def test_order_of_convergence(sampler, order):
    """Against the exact solution of the probability-flow ODE at t = T / 4, where paths of 16 to 256 steps all pass:
    twice the steps, half the error for DDIM and a quarter of it for DPM-Solver++(2M)."""
    time_steps, data = 1024, Gaussian(0.3, 0.5)
    diffusion = GaussianDiffusion(time_steps, prediction="x0")
    x_T = torch.linspace(-2, 2, 96).view(SHAPE)
    errors = []
    for steps in (16, 32, 64, 128):
        options = dict(sampler=sampler, steps=steps, spacing="even", noise=x_T, clip_denoised=False)
        states = [x for x, _ in trajectory(diffusion, network(diffusion, data), SHAPE, **options)]
        reached = diffusion.path(steps, "even")[steps * 3 // 4]
        assert reached.t == time_steps // 4 - 1
        exact = data.exact(x_T.double(), diffusion.alphas_cumprod[-1].item(), reached.abar_t)
        errors.append((states[steps * 3 // 4 - 1] - exact).abs().max().item())
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15), errors


@pytest.mark.parametrize("steps", [1000, 37])
def test_ddim_with_eta_1_is_ddpm(steps):
    """Song et al. 2021, sec. 4.1: the same law of every step; with the same noise the same pictures."""
    diffusion = GaussianDiffusion(1000)
    noise = noises(SHAPE, steps + 1)
    a, b = (trajectory(diffusion, wavy, SHAPE, sampler, steps, eta=1.0, noise=noise) for sampler in ("ddpm", "ddim"))
    for (x_a, _), (x_b, _) in zip(a, b, strict=True):
        torch.testing.assert_close(x_a, x_b, atol=1e-4, rtol=0)


def test_one_step_of_dpm_solver_is_one_step_of_ddim():
    """Lu et al. 2022, sec. 4.1: at first order the two are the same, and the first step is of first order."""
    path = GaussianDiffusion(1000).path(10)[:1]
    x = torch.randn(SHAPE, generator=generator())
    (a, _), (b, _) = (next(sampler(x, path, lambda x, t: x.tanh(), None, 0.0)) for sampler in (ddim, dpm_solver_pp))
    torch.testing.assert_close(a, b)


# --- the same steps as diffusers --------------------------------------------------------------------------

THEIR_PREDICTION = {"eps": "epsilon", "v": "v_prediction"}


def settings(prediction, schedule):
    names = dict(beta_schedule=THEIR_SCHEDULE[schedule], prediction_type=THEIR_PREDICTION[prediction])
    return dict(num_train_timesteps=1000, timestep_spacing="trailing", **names)


def assert_same_steps(scheduler, diffusion, sampler, steps, their_step=None, **options):
    """Walk ours and theirs from the same noise with the same network; compare the image after each step.
    their_step: the options of scheduler.step, given the fresh noise of the step."""
    model = network(diffusion, Wavy())
    abar = scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)  # theirs are float32 from here on:
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "sigmas"):  # 1 / signal is 2e4 where cosine begins, and their rounding would show
        scheduler.sigmas = torch.cat([((1 - abar) / abar).sqrt()[scheduler.timesteps], torch.zeros(1)])
    assert scheduler.timesteps.tolist() == [step.t for step in diffusion.path(steps, "even")]
    noise = noises(SHAPE, steps + 1)
    ours = trajectory(diffusion, model, SHAPE, sampler, steps, "even", noise=noise, **options)
    x = noise(0)
    for k, (t, (x_s, _)) in enumerate(zip(scheduler.timesteps, ours, strict=True), start=1):
        x = scheduler.step(model(x, t.repeat(2)), t, x, **(their_step(noise(k)) if their_step else {})).prev_sample
        if sampler == "ddpm-beta" and k == steps and t > 0:
            return  # with "fixed_large" theirs adds noise to the finished picture, unless it comes from t = 0
        torch.testing.assert_close(x_s, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", THEIR_PREDICTION)
class TestStepByStepAgainstDiffusers:
    @pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("steps", [10, 50])  # of other counts theirs takes another path
    def test_ddim(self, prediction, schedule, steps, eta):
        scheduler = diffusers.DDIMScheduler(**settings(prediction, schedule), clip_sample=False, set_alpha_to_one=True)
        diffusion = GaussianDiffusion(1000, schedule, prediction)
        their_step = lambda noise: dict(eta=eta, variance_noise=noise if eta else None)  # noqa: E731
        assert_same_steps(scheduler, diffusion, "ddim", steps, their_step, eta=eta, clip_denoised=False)

    @pytest.mark.parametrize("steps", [2, 10, 20, 33])
    def test_dpm_solver_pp(self, prediction, schedule, steps):
        method = dict(algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", lower_order_final=True)
        theirs = diffusers.DPMSolverMultistepScheduler
        scheduler = theirs(**settings(prediction, schedule), **method, final_sigmas_type="zero")
        diffusion = GaussianDiffusion(1000, schedule, prediction)
        assert_same_steps(scheduler, diffusion, "dpm++", steps, clip_denoised=False)

    @pytest.mark.parametrize("sampler, theirs", [("ddpm", "fixed_small"), ("ddpm-beta", "fixed_large")])
    @pytest.mark.parametrize("steps, clip", [(10, False), (10, True), (33, False), (100, True)])
    def test_ddpm(self, prediction, schedule, steps, clip, sampler, theirs, monkeypatch):
        scheduler = diffusers.DDPMScheduler(**settings(prediction, schedule), variance_type=theirs, clip_sample=clip)
        noise, ks = noises(SHAPE, steps + 1), iter(range(1, steps + 1))
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **options: noise(next(ks)))
        diffusion = GaussianDiffusion(1000, schedule, prediction)
        assert_same_steps(scheduler, diffusion, sampler, steps, clip_denoised=clip)
