"""What `sample` promises of every sampler: clipping, guidance, its draws of noise, the network left as it was, refusals."""

import math

import pytest
import torch
from torch import nn

from src.diffusion import SCHEDULES, GaussianDiffusion, at, posterior
from src.samplers import SAMPLERS, Step
from tests.test_samplers import DETERMINISTIC, SHAPE, generator, noises, trajectory, wavy

# --- clipping ---------------------------------------------------------------------------------------------


def test_the_predicted_image_is_clipped_before_the_mean_is_formed():
    """A network that sees x_0 = 10 everywhere leads where one that sees 1 leads; clipping the image itself would not."""
    diffusion = GaussianDiffusion(1000, prediction="x0")

    def states(value, clip):
        options = dict(steps=20, noise=noises(SHAPE, 21), clip_denoised=clip)
        return [x for x, _ in trajectory(diffusion, lambda x, t, y: torch.full_like(x, value), SHAPE, **options)]

    far, near = states(10.0, clip=True), states(1.0, clip=False)
    for x_far, x_near in zip(far, near, strict=True):
        assert torch.equal(x_far, x_near)
    assert far[0].abs().max() > 1  # x_t itself is noisy, and never clipped


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_pictures_stay_in_range_unless_told_otherwise(sampler, schedule):
    diffusion = GaussianDiffusion(1000, schedule)
    shout = lambda x, t, y: -3 * x.sign()  # noqa: E731  # noise that there is not
    options = dict(sampler=sampler, steps=15, noise=noises(SHAPE, 16))
    assert diffusion.sample(shout, SHAPE, **options).abs().max() <= 1
    assert diffusion.sample(shout, SHAPE, **options, clip_denoised=False).abs().max() > 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_clipped_prediction_still_agrees_with_x_t_about_the_noise(sampler):
    """Where x_0 is certain the image moves to it in a straight line of signal and noise: nothing else is left in x_s."""
    abar_t, abar_s = 0.3, 0.6
    x_t, x_0 = torch.tensor([0.9]), torch.tensor([1.0])
    eps = (x_t - abar_t**0.5 * x_0) / (1 - abar_t) ** 0.5
    path = [Step(0, abar_t, abar_s, *posterior(abar_t, abar_s))]
    x_s, _ = next(SAMPLERS[sampler](x_t, path, lambda x, t: x_0, lambda k: torch.zeros(1), 0.0))
    if sampler in DETERMINISTIC:
        torch.testing.assert_close(x_s, abar_s**0.5 * x_0 + (1 - abar_s) ** 0.5 * eps)
    else:  # as much of the noise as the posterior keeps
        alpha = abar_t / abar_s
        torch.testing.assert_close(x_s, abar_s**0.5 * x_0 + alpha**0.5 * (1 - abar_s) / (1 - abar_t) ** 0.5 * eps)


# --- guidance ---------------------------------------------------------------------------------------------


class Labelled:
    """A network that answers with a number of its label, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, x, t, y):
        self.asked.append(y)
        return 0.1 * x + (0.2 if y is None else 0.01 * y[:, None, None, None].float())


@pytest.mark.parametrize("y", [None, torch.tensor([3, 4])], ids=["unlabelled", "labelled"])
@pytest.mark.parametrize("guidance, calls", [(1.0, ["y"]), (0.0, [None]), (2.0, [None, "y"]), (0.5, [None, "y"])])
def test_guidance_asks_the_network_no_more_than_it_must(guidance, calls, y):
    model = Labelled()
    GaussianDiffusion(100).sample(model, SHAPE, sampler="ddim", steps=5, y=y, guidance=guidance, generator=generator())
    assert [None if asked is None else "y" for asked in model.asked] == (calls if y is not None else [None]) * 5
    assert all(asked is None or torch.equal(asked, y) for asked in model.asked)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 2.0, 4.0])
def test_guidance_goes_from_the_unlabelled_prediction_towards_and_past_the_labelled(guidance, prediction):
    """eps = (1 + w) eps(y) - w eps(none) with w = guidance - 1 (Ho & Salimans 2022, Eq. 6), in terms of x_0."""
    diffusion, y = GaussianDiffusion(100, prediction=prediction), torch.tensor([3, 4])
    x_T, t = torch.randn(SHAPE, generator=generator()), torch.full((2,), 99)
    with_label, without = (diffusion.to_eps(Labelled()(x_T, t, label), x_T, t) for label in (y, None))
    eps = guidance * with_label + (1 - guidance) * without
    expected = (x_T - at(diffusion.sigma, t) * eps) / at(diffusion.signal, t)
    _, x_0 = next(trajectory(diffusion, Labelled(), SHAPE, steps=5, noise=x_T, y=y, guidance=guidance, clip_denoised=False))
    torch.testing.assert_close(x_0, expected, rtol=1e-3, atol=1e-3)


def test_the_network_is_told_the_step_in_one_int64_per_image():
    told = []
    model = lambda x, t, y: told.append(t) or torch.zeros_like(x)  # noqa: E731
    GaussianDiffusion(100).sample(model, SHAPE, steps=4, spacing="even")
    assert [t.tolist() for t in told] == [[99, 99], [74, 74], [49, 49], [24, 24]] and told[0].dtype == torch.int64


# --- noise ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_may_come_as_a_function_a_tensor_or_a_generator(sampler):
    """A generator gives x_T and then one draw a step; the function and the tensor stand in for the same draws."""
    diffusion, options = GaussianDiffusion(100), dict(sampler=sampler, steps=7, eta=0.5)
    drawn = generator()
    table = [torch.randn(SHAPE, generator=drawn) for _ in range(8)]
    after_x_T = generator()
    torch.randn(SHAPE, generator=after_x_T)
    a = diffusion.sample(wavy, SHAPE, generator=generator(), **options)
    b = diffusion.sample(wavy, SHAPE, noise=lambda k: table[k], **options)
    c = diffusion.sample(wavy, SHAPE, noise=table[0], generator=after_x_T, **options)
    assert torch.equal(a, b) and torch.equal(a, c)
    assert not torch.equal(a, diffusion.sample(wavy, SHAPE, generator=generator(1), **options))


@pytest.mark.parametrize("sampler, asked", [("ddpm", [0, 1, 2, 3]), ("ddpm-beta", [0, 1, 2, 3]), ("ddim", [0]), ("dpm++", [0])])
def test_noise_is_asked_for_once_a_step_by_its_number_and_not_for_the_last_step(sampler, asked):
    ks = []
    GaussianDiffusion(100).sample(wavy, SHAPE, sampler=sampler, steps=4, noise=lambda k: ks.append(k) or torch.zeros(SHAPE))
    assert ks == asked


def test_the_noise_that_was_given_is_not_overwritten():
    x_T = torch.randn(SHAPE, generator=generator())
    before = x_T.clone()
    for sampler in SAMPLERS:
        GaussianDiffusion(100).sample(wavy, SHAPE, sampler=sampler, steps=3, noise=x_T)
    assert torch.equal(x_T, before)


# --- the network is left as it was found ------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.inner = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)))
        self.modes, self.grads, self.fails = [], [], False

    def forward(self, x, t, y=None):
        if self.fails:
            raise RuntimeError("out of memory")
        self.modes.append(any(module.training for module in self.modules()))
        self.grads.append(torch.is_grad_enabled())
        return self.inner(self.conv(x))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval", "mixed"])
def test_sampling_leaves_the_network_in_the_mode_it_found(mode, fails):
    model = Net().train(mode != "eval")
    if mode == "mixed":
        model.inner[1].eval()  # a part that someone froze
    before = [module.training for module in model.modules()]
    model.fails = fails
    try:
        GaussianDiffusion(100).sample(model, SHAPE, steps=3)
    except RuntimeError:
        assert fails
    assert [module.training for module in model.modules()] == before
    assert not any(model.modes), "dropout must be off inside"
    assert not any(model.grads) and torch.is_grad_enabled(), "a gradient is recorded inside, or no longer outside"


# --- what comes back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, None])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_trajectory_has_a_state_for_each_step_and_ends_in_the_sample(sampler, steps):
    diffusion, noise = GaussianDiffusion(20), noises(SHAPE, 21)
    states = list(trajectory(diffusion, wavy, SHAPE, sampler, steps, noise=noise))
    assert len(states) == (steps or 20)
    assert all(x.shape == x_0.shape == SHAPE and x_0.abs().max() <= 1 for x, x_0 in states)
    x = diffusion.sample(wavy, SHAPE, sampler=sampler, steps=steps, noise=noise)
    assert torch.equal(states[-1][0], x) and x.dtype == torch.float32 and not x.requires_grad
    assert torch.equal(*states[-1]), "the last step does not end in the clean image that it predicts"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pictures_are_float32_also_where_the_network_answers_in_bf16(sampler):
    x = GaussianDiffusion(100).sample(lambda x, t, y: wavy(x, t).bfloat16(), SHAPE, sampler=sampler, steps=3)
    assert x.dtype == torch.float32


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(sampler="euler"), "sampler is 'euler', expected one of ddpm, "),
        (dict(spacing="karras"), "spacing is 'karras', expected one of logsnr, even"),
        (dict(steps=0), "steps is 0, expected a number from 1 to 100"),
        (dict(steps=-1), "steps is -1, expected a number from 1 to 100"),
        (dict(steps=101), "steps is 101, expected a number from 1 to 100, the model's TIME_STEPS"),
        (dict(eta=1.5), "eta is 1.5, expected a number from 0 to 1"),
        (dict(eta=-0.1), "eta is -0.1, expected a number from 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        GaussianDiffusion(100).sample(wavy, SHAPE, **options)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("clip_denoised", [True, False])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_prediction_that_is_not_finite_is_an_error_that_names_the_step(sampler, clip_denoised, value):
    """Clipping would make white of infinity, and rounding black of what is no number."""

    def overflows_below_half(x, t, y):
        eps = wavy(x, t)
        eps[0, 0, 0, 0] = torch.where(t[0] < 50, value, eps[0, 0, 0, 0])
        return eps

    options = dict(sampler=sampler, steps=4, spacing="even", clip_denoised=clip_denoised)
    with pytest.raises(FloatingPointError, match=r"not finite in step 3 of 4 \(t = 49\)"):
        GaussianDiffusion(100).sample(overflows_below_half, SHAPE, **options)


def test_a_progress_bar_is_shown_where_asked_for(capsys):
    GaussianDiffusion(100).sample(wavy, SHAPE, sampler="ddim", steps=3)
    assert capsys.readouterr().err == ""
    GaussianDiffusion(100).sample(wavy, SHAPE, sampler="ddim", steps=3, progress=True)
    assert "ddim: 100%" in capsys.readouterr().err
