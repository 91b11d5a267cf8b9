"""The forward process, its posterior and the loss, against closed forms, Bayes, and diffusers as a second author."""

import math

import diffusers
import pytest
import torch
from torch import nn

from src.diffusion import PREDICTIONS, SCHEDULES, GaussianDiffusion, at, cosine_betas, linear_betas

LENGTHS = (10, 50, 100, 250, 1000, 4000)
THEIR_SCHEDULE = {"linear": "linear", "cosine": "squaredcos_cap_v2"}  # the names of diffusers


def draw_batch(diffusion, size=6, seed=0):
    """(x_0, t, noise), with t from the first step to the last."""
    generator = torch.Generator().manual_seed(seed)
    x_0 = torch.rand(size, 3, 4, 4, generator=generator) * 2 - 1
    return x_0, torch.linspace(0, diffusion.time_steps - 1, size).long(), torch.randn(size, 3, 4, 4, generator=generator)


def tables(diffusion):
    """(beta, alpha, abar, abar one step earlier), in float64."""
    beta = diffusion.betas
    abar = diffusion.alphas_cumprod
    return beta, 1 - beta, abar, torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])


# --- schedules --------------------------------------------------------------------------------------------


def test_linear_betas_run_in_equal_steps_from_1e_4_to_0_02():
    beta = linear_betas(1000)
    expected = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
    torch.testing.assert_close(beta, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert GaussianDiffusion().alphas_cumprod[-1].item() == pytest.approx(4.0e-5, rel=0.02)  # Ho et al. 2020, sec. 4


@pytest.mark.parametrize("time_steps", [50, 100, 250, 1000, 4000])
def test_linear_noise_adds_up_to_the_same_for_any_length(time_steps):
    assert linear_betas(time_steps).sum().item() == pytest.approx(1000 * (1e-4 + 0.02) / 2)


@pytest.mark.parametrize("time_steps", LENGTHS)
def test_cosine_abar_is_a_squared_cosine(time_steps):
    def f(t):  # Nichol & Dhariwal 2021, Eq. (17)
        return math.cos((t / time_steps + 0.008) / 1.008 * math.pi / 2) ** 2

    abar = GaussianDiffusion(time_steps, "cosine").alphas_cumprod
    expected = torch.tensor([f(t) / f(0) for t in range(1, time_steps)], dtype=torch.float64)
    uncapped = cosine_betas(time_steps)[:-1] < 0.999
    assert uncapped.all()  # the cap is for the last step alone, where abar would be 0
    torch.testing.assert_close(abar[:-1], expected, rtol=1e-9, atol=0)
    assert abar[-1].item() == pytest.approx(0.001 * f(time_steps - 1) / f(0))


@pytest.mark.parametrize("time_steps", LENGTHS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_ends_in_nearly_pure_noise(schedule, time_steps):
    diffusion = GaussianDiffusion(time_steps, schedule)
    assert diffusion.betas.dtype == diffusion.alphas_cumprod.dtype == torch.float64
    assert diffusion.betas.shape == diffusion.alphas_cumprod.shape == (time_steps,)
    assert (diffusion.betas > 0).all() and (diffusion.betas < 1).all()
    assert (diffusion.alphas_cumprod.diff() < 0).all() and 0 < diffusion.alphas_cumprod[-1] < 1e-4


@pytest.mark.parametrize("schedule, theirs", THEIR_SCHEDULE.items())
def test_the_schedule_q_sample_and_v_are_those_of_diffusers(schedule, theirs):
    oracle, diffusion = diffusers.DDPMScheduler(1000, beta_schedule=theirs), GaussianDiffusion(1000, schedule, "v")
    torch.testing.assert_close(diffusion.betas.float(), oracle.betas, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(diffusion.alphas_cumprod.float(), oracle.alphas_cumprod, rtol=1e-3, atol=1e-8)
    x_0, t, noise = draw_batch(diffusion)
    torch.testing.assert_close(diffusion.q_sample(x_0, t, noise), oracle.add_noise(x_0, noise, t), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(diffusion.target(x_0, t, noise), oracle.get_velocity(x_0, noise, t), atol=1e-5, rtol=1e-4)


def test_tables_follow_from_the_settings_and_stay_out_of_checkpoints():
    assert GaussianDiffusion().state_dict() == {}


# --- q(x_t | x_0) -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_q_sample_has_the_moments_of_one_noising_step_after_another(schedule):
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps, Eq. (2): a recursion for the mean and the variance."""
    diffusion = GaussianDiffusion(100, schedule)
    t, ones, zeros = torch.arange(100), torch.ones(100, 1, 1, 1), torch.zeros(100, 1, 1, 1)
    mean, variance, means, variances = 1.0, 0.0, [], []
    for beta in diffusion.betas.tolist():
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        means.append(mean), variances.append(variance)
    torch.testing.assert_close(diffusion.q_sample(ones, t, zeros).flatten(), torch.tensor(means))
    torch.testing.assert_close(diffusion.q_sample(zeros, t, ones).flatten().square(), torch.tensor(variances))


def test_q_sample_is_float32_also_where_images_are_bf16():
    diffusion = GaussianDiffusion()
    x_0, t, noise = draw_batch(diffusion)
    assert diffusion.q_sample(x_0.bfloat16(), t, noise).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert diffusion.q_sample(x_0, t, noise).dtype == torch.float32


# --- q(x_{t-1} | x_t, x_0) --------------------------------------------------------------------------------


@pytest.mark.parametrize("time_steps", [10, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior_is_the_product_of_two_gaussians(schedule, time_steps):
    """Bayes: q(x_t | x_{t-1}) as a function of x_{t-1} has precision alpha / beta, q(x_{t-1} | x_0) has 1 / (1 - abar)."""
    diffusion = GaussianDiffusion(time_steps, schedule)
    beta, alpha, _, before = tables(diffusion)
    t = torch.arange(1, time_steps)  # at t = 0 the posterior is the point x_0
    beta, alpha, before = beta[t], alpha[t], before[t]
    precision = alpha / beta + 1 / (1 - before)
    ones, zeros = torch.ones(len(t), 1, 1, 1), torch.zeros(len(t), 1, 1, 1)
    weight_0, variance, _ = diffusion.q_posterior(ones, zeros, t)
    weight_t, _, _ = diffusion.q_posterior(zeros, ones, t)
    torch.testing.assert_close(variance.flatten(), (1 / precision).float())
    torch.testing.assert_close(weight_t.flatten(), (alpha.sqrt() / beta / precision).float())
    torch.testing.assert_close(weight_0.flatten(), (before.sqrt() / (1 - before) / precision).float())


def test_the_posterior_of_the_first_step_is_the_clean_image():
    diffusion = GaussianDiffusion()
    x_0, _, x_t = draw_batch(diffusion)
    mean, variance, _ = diffusion.q_posterior(x_0, x_t, torch.zeros(6, dtype=torch.int64))
    assert torch.equal(mean, x_0) and (variance == 0).all()


@pytest.mark.parametrize("time_steps", [2, 10, 1000, 4000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_log_variance_is_the_logarithm_with_its_neighbours_value_at_the_first_step(schedule, time_steps):
    diffusion = GaussianDiffusion(time_steps, schedule)
    t, x = torch.arange(time_steps), torch.zeros(time_steps, 1, 1, 1)
    _, variance, log_variance = diffusion.q_posterior(x, x, t)
    assert variance.shape == log_variance.shape == (time_steps, 1, 1, 1)
    torch.testing.assert_close(log_variance[1:], variance[1:].log())
    assert log_variance[0] == log_variance[1]


# --- what the network predicts ----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_prediction_gives_back_x_0_and_the_noise(prediction, schedule):
    diffusion = GaussianDiffusion(100, schedule, prediction)
    x_0, t, noise = draw_batch(diffusion)
    x_t, target = diffusion.q_sample(x_0, t, noise), diffusion.target(x_0, t, noise)
    rounding = 1e-6 / diffusion.signal[t].min().item() if prediction == "eps" else 1e-5  # eps is divided by the signal
    torch.testing.assert_close(diffusion.to_x_0(target, x_t, t), x_0, atol=rounding, rtol=0)
    torch.testing.assert_close(diffusion.to_eps(target, x_t, t), noise, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x_0_and_eps_of_any_prediction_make_up_x_t(prediction):
    diffusion = GaussianDiffusion(100, prediction=prediction)
    x_t, t, output = draw_batch(diffusion)
    x_0, eps = diffusion.to_x_0(output, x_t, t), diffusion.to_eps(output, x_t, t)
    torch.testing.assert_close(diffusion.q_sample(x_0, t, eps), x_t, atol=1e-5, rtol=0)


def test_v_is_the_velocity_on_the_circle_from_x_0_to_noise():
    """x(phi) = cos(phi) x_0 + sin(phi) eps; v is its derivative in phi (Salimans & Ho 2022, app. D)."""
    diffusion = GaussianDiffusion(prediction="v")
    x_0, t, noise = (value.double() if value.is_floating_point() else value for value in draw_batch(diffusion))
    phi = at(diffusion.alphas_cumprod, t).sqrt().acos()
    step = 1e-6
    ahead, behind = ((phi + h).cos() * x_0 + (phi + h).sin() * noise for h in (step, -step))
    torch.testing.assert_close(diffusion.target(x_0, t, noise), (ahead - behind) / (2 * step), atol=1e-6, rtol=0)


# --- the loss ---------------------------------------------------------------------------------------------


def test_the_network_is_shown_x_t_t_and_y_and_its_error_is_averaged_over_pixels():
    diffusion = GaussianDiffusion()
    x_0, t, noise = draw_batch(diffusion)
    shown = []
    losses = diffusion.training_losses(lambda *args: shown.append(args) or noise + 3, x_0, t, noise, y=t % 7)
    torch.testing.assert_close(losses, torch.full((6,), 9.0))
    ((x_t, shown_t, shown_y),) = shown
    assert torch.equal(x_t, diffusion.q_sample(x_0, t, noise)) and torch.equal(shown_t, t) and torch.equal(shown_y, t % 7)


@pytest.mark.parametrize("method", ["training_losses", "eps_losses"])
def test_the_loss_is_float32_also_where_the_network_answers_in_bf16(method):
    diffusion = GaussianDiffusion()
    x_0, t, noise = draw_batch(diffusion)
    answer = (noise + 1).bfloat16()
    losses = getattr(diffusion, method)(lambda x_t, t, y: answer, x_0, t, noise)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, (answer.float() - noise).square().mean((1, 2, 3)))


def test_the_best_constant_predictor_loses_the_variance_of_its_target():
    """Predicting 0: 1 for the noise, E[x_0^2] for x_0, and abar + (1 - abar) E[x_0^2] for v."""
    x_0 = torch.rand(2000, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1  # mean 0, variance 1 / 3
    torch.manual_seed(0)
    t = torch.full((2000,), 300)
    for prediction in PREDICTIONS:
        diffusion = GaussianDiffusion(prediction=prediction)
        abar = diffusion.alphas_cumprod[300].item()
        expected = {"eps": 1.0, "x0": 1 / 3, "v": abar + (1 - abar) / 3}[prediction]
        losses = diffusion.training_losses(lambda x_t, t, y: torch.zeros_like(x_t), x_0, t)  # draws its own noise
        assert losses.mean().item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights_are_those_of_hang_et_al(prediction):
    """arXiv:2303.09556, sec. 3.4 and app.: min(SNR, 5) on x_0; over SNR for eps; over SNR + 1 for v."""
    diffusion = GaussianDiffusion(prediction=prediction, min_snr_gamma=5)
    t = torch.arange(1000)
    x_0 = torch.zeros(1000, 3, 1, 1)
    noise = torch.zeros_like(x_0)
    losses = diffusion.training_losses(lambda x_t, t, y: torch.ones_like(x_t), x_0, t, noise)  # an error of 1 in the target
    snr = diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod)
    capped = torch.minimum(snr, torch.tensor(5.0, dtype=torch.float64))
    expected = {"eps": capped / snr, "v": capped / (snr + 1), "x0": capped}[prediction]
    torch.testing.assert_close(losses, expected.float())


def say(diffusion, x_0, x_t, t):
    """What a network answers that holds the clean image to be x_0: eps, v or x_0."""
    signal, sigma = at(diffusion.signal, t), at(diffusion.sigma, t)
    eps = (x_t - signal * x_0) / sigma
    return {"eps": eps, "x0": x_0, "v": signal * eps - sigma * x_0}[diffusion.prediction]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method, cap", [("training_losses", 5.0), ("eps_losses", math.inf)])
def test_networks_that_say_the_same_in_three_languages_have_the_same_loss(method, cap, prediction):
    """On x_0 weighted with min(SNR, 5) in training, and with the SNR, as eps has it, in comparisons."""
    diffusion = GaussianDiffusion(100, prediction=prediction, min_snr_gamma=5)
    x_0, t, noise = draw_batch(diffusion)
    guess = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    losses = getattr(diffusion, method)(lambda x_t, t, y: say(diffusion, guess, x_t, t), x_0, t, noise)
    snr = diffusion.alphas_cumprod[t] / (1 - diffusion.alphas_cumprod[t])
    expected = snr.clamp(max=cap).float() * (guess - x_0).square().mean((1, 2, 3))
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_no_step_rules_the_validation_loss(prediction, schedule):
    """A network that errs by a tenth everywhere: unweighted, the first 1% of the steps would be nearly all of x0's loss."""
    diffusion, t = GaussianDiffusion(1000, schedule, prediction), torch.arange(1000)
    x_0, noise = torch.rand(1000, 3, 2, 2) * 2 - 1, torch.randn(1000, 3, 2, 2)

    def network(x_t, t, y):
        return diffusion.target(x_0, t, noise) + 0.1

    weighted, plain = (losses(network, x_0, t, noise) for losses in (diffusion.validation_losses, diffusion.eps_losses))
    assert weighted[:10].sum() < 0.08 * weighted.sum() and weighted.max() < 0.01 * weighted.sum()
    assert prediction != "x0" or plain[:10].sum() > 0.7 * plain.sum()
    snr = diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod)
    torch.testing.assert_close(weighted, plain * torch.minimum(torch.ones(1000).double(), 5 / snr).float())


def test_the_gradient_reaches_the_network_from_the_training_loss_alone():
    diffusion, network = GaussianDiffusion(), nn.Conv2d(3, 3, 1)
    x_0, t, noise = draw_batch(diffusion)

    def model(x_t, t, y):
        return network(x_t)

    diffusion.training_losses(model, x_0, t, noise).mean().backward()
    x_t = diffusion.q_sample(x_0, t, noise)
    by_hand = 2 * (network(x_t) - noise).mean((0, 2, 3)).detach() / 3  # d loss / d bias
    torch.testing.assert_close(network.bias.grad, by_hand)
    assert not diffusion.eps_losses(model, x_0, t, noise).requires_grad


# --- refusals and the self-test ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(schedule="sigmoid"), "schedule is 'sigmoid', expected one of linear, cosine"),
        (dict(prediction="epsilon"), "prediction is 'epsilon', expected one of eps, v, x0"),
        (dict(time_steps=1), "time_steps is 1, expected at least 2"),
        (dict(min_snr_gamma=-1.0), "min_snr_gamma is -1.0, expected at least 0"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        GaussianDiffusion(**options)
