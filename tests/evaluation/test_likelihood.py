"""The variational bound: against closed forms, against the paper written out slowly, and as an estimate that is honest."""

import math
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from src import noise
from src.diffusion import GaussianDiffusion, at
from src.evaluation.likelihood import (
    bits_per_dimension,
    decoder_term,
    log_normal_mass,
    mean_and_error,
    prior_term,
    step_terms,
    strata,
    stratum_terms,
)

LEVELS = torch.arange(256) / 127.5 - 1  # what a pixel can be


def grey_levels(*shape, seed=0):
    return LEVELS[torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))]


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the paper, pixel by pixel --------------------------------------------------------------------------


def slow_bound(x_0, noises, model, time_steps):
    """Ho et al. 2020, Eq. (5) for one image, one noise a step: [L_T, L_0, L_1, ..., L_{T-1}] in nats, with the paper's t."""
    betas = [(1e-4 + (0.02 - 1e-4) * i / (time_steps - 1)) * 1000 / time_steps for i in range(time_steps)]
    abar, product = [1.0], 1.0  # abar[t], the paper's t from 0 to T
    for beta in betas:
        product *= 1 - min(beta, 0.999)
        abar.append(product)
    alpha = [math.nan] + [b / a for a, b in pairwise(abar)]

    def beta_tilde(t):
        return (1 - abar[t - 1]) / (1 - abar[t]) * (1 - alpha[t])

    pixels = x_0.double().flatten().tolist()
    noisiest, normal = Normal(abar[-1] ** 0.5 * x_0.double(), (1 - abar[-1]) ** 0.5), Normal(torch.zeros(()).double(), 1.0)
    terms = [kl_divergence(noisiest, normal).sum().item()]
    for t in range(1, time_steps + 1):
        x_t = abar[t] ** 0.5 * x_0.double() + (1 - abar[t]) ** 0.5 * noises[t - 1].double()
        eps = model(x_t[None].float(), torch.tensor([t - 1]), None)[0].double()
        guess = ((x_t - (1 - abar[t]) ** 0.5 * eps) / abar[t] ** 0.5).clamp(-1, 1).flatten().tolist()
        total = 0.0
        for x, now, x_hat in zip(pixels, x_t.flatten().tolist(), guess):
            if t == 1:  # Eq. (13)
                decoder = NormalDist(x_hat, beta_tilde(2) ** 0.5)
                low = 0.0 if x <= -1 else decoder.cdf(x - 1 / 255)
                high = 1.0 if x >= 1 else decoder.cdf(x + 1 / 255)
                total -= math.log(high - low)
            else:  # Eqs. (6), (7)
                w_0 = abar[t - 1] ** 0.5 * (1 - alpha[t]) / (1 - abar[t])
                w_t = alpha[t] ** 0.5 * (1 - abar[t - 1]) / (1 - abar[t])
                q, p = (Normal(torch.tensor(w_0 * clean + w_t * now).double(), beta_tilde(t) ** 0.5) for clean in (x, x_hat))
                total += kl_divergence(q, p).item()
        terms.append(total)
    return torch.tensor(terms, dtype=torch.float64)


@pytest.mark.parametrize("time_steps", [10, 30])
def test_every_term_is_that_of_the_paper_written_out_pixel_by_pixel(time_steps):
    diffusion, x_0 = GaussianDiffusion(time_steps), grey_levels(3, 2, 2)
    x_0[0, 0, :2] = torch.tensor([-1.0, 1.0])  # the two open bins
    noises = normals(time_steps, 3, 2, 2)

    def model(x, t, y):  # no good denoiser, but not so far off that the slow decoder's mass rounds to 0
        sigma = diffusion.sigma[t].view(-1, 1, 1, 1)
        return (x - diffusion.signal[t].view(-1, 1, 1, 1) * (x_0 + 0.03 * torch.sin(7 * x))) / sigma

    terms = step_terms(diffusion, model, x_0.expand(time_steps, -1, -1, -1), torch.arange(time_steps), noises)
    slow = slow_bound(x_0, noises, model, time_steps)
    torch.testing.assert_close(prior_term(diffusion, x_0[None])[0], slow[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(terms, slow[1:], rtol=2e-4, atol=1e-4)
    assert terms.sum().item() == pytest.approx(slow[1:].sum().item(), rel=1e-4)


# --- an analytic model ----------------------------------------------------------------------------------

MEAN, STD = 0.1, 0.2  # pixels from N(MEAN, STD^2): 4.5 deviations from white


def gaussian_denoiser(diffusion):
    """E[eps | x_t] for such pixels."""

    def model(x, t, y):
        signal, sigma = at(diffusion.signal, t), at(diffusion.sigma, t)
        return sigma * (x - signal * MEAN) / (signal**2 * STD**2 + sigma**2)

    return model


def gaussian_bound(diffusion):
    """The expected bound in nats per pixel. What is left unknown of x_0 at step t has the variance v_t of a product of two
    Gaussians; the decoder's term is a one-dimensional integral over the normal error of variance v_0."""
    abar = diffusion.alphas_cumprod
    v = 1 / (1 / STD**2 + abar / (1 - abar))
    snr = abar / (1 - abar)
    steps = ((snr[:-1] - snr[1:]) / 2 * v[1:]).sum()  # Kingma et al. 2021 (arXiv:2107.00630), Eq. (13)
    prior = 0.5 * (abar[-1] * (MEAN**2 + STD**2 - 1) - torch.log1p(-abar[-1]))
    beta_tilde = (1 - abar[0]) / (1 - abar[1]) * diffusion.betas[1]
    z = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    error, density = z * v[0].sqrt(), torch.exp(-z.square() / 2) / (2 * math.pi) ** 0.5
    edge, scale = 1 / 255, (2 * beta_tilde).sqrt()  # of the bin around x_0; erfc keeps the digits of a far tail
    mass = 0.5 * (torch.erfc((error.abs() - edge) / scale) - torch.erfc((error.abs() + edge) / scale))
    return prior + steps + torch.trapezoid(density * -mass.log(), z)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("draws", [8, 25])
def test_for_gaussian_data_the_estimate_is_the_closed_form_within_its_standard_error(schedule, draws):
    diffusion, images = GaussianDiffusion(200, schedule), 400
    x_0 = MEAN + STD * normals(images, 3, 4, 4, seed=1).clamp(-4.4, 4.4)
    keys, parts = noise.key(0, torch.arange(images)), strata(200, draws)
    model = gaussian_denoiser(diffusion)
    total = prior_term(diffusion, x_0)
    for part in parts:
        total = total + stratum_terms(diffusion, model, x_0, part, keys, clip=False)
    mean, error = mean_and_error(bits_per_dimension(total, 48))
    expected = (gaussian_bound(diffusion) / math.log(2)).item()
    assert abs(mean - expected) < 3 * error
    assert error < 0.02 * expected


# --- its parts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time_steps, count", [(1000, 20), (1000, 1), (1000, 999), (10, 7), (2, 2), (1000, 1000)])
def test_the_parts_are_consecutive_and_cover_every_step_once(time_steps, count):
    parts = strata(time_steps, count)
    assert len(parts) == count and [t for part in parts for t in part] == list(range(time_steps))
    assert all(len(a) <= len(b) + 1 for a, b in pairwise(parts))  # growing, up to rounding


def test_the_decoders_masses_over_all_grey_levels_add_up_to_one():
    for mean, std in ((0.0, 0.01), (0.999, 0.3), (-1.0, 0.002), (0.35, 2.0)):
        x_0 = LEVELS.view(-1, 1, 1, 1)
        masses = torch.exp(-decoder_term(x_0, torch.full_like(x_0, mean), std))
        assert masses.sum().item() == pytest.approx(1, abs=1e-5)  # x_0 is float32: the edges meet to 1e-7


def test_the_decoder_stays_finite_where_the_model_is_sure_and_wrong():
    x_0 = torch.tensor([-1.0, 1.0, 0.2]).view(3, 1, 1, 1)
    terms = decoder_term(x_0, -x_0, 0.005)
    assert terms.isfinite().all()
    assert terms[0].item() == pytest.approx(((2 - 1 / 255) / 0.005) ** 2 / 2, rel=1e-3)  # a squared distance, far out


def test_the_mass_between_two_points_is_the_same_mirrored_and_right_where_plain_subtraction_is():
    low, high = torch.tensor([-0.3, 1.0, 2.0, 35.0]).double(), torch.tensor([0.1, 1.5, 2.01, 35.5]).double()
    masses = log_normal_mass(low, high)
    torch.testing.assert_close(masses, log_normal_mass(-high, -low))
    plain = [math.log(NormalDist().cdf(b) - NormalDist().cdf(a)) for a, b in zip(low[:3].tolist(), high[:3].tolist())]
    assert masses[:3].tolist() == pytest.approx(plain, rel=1e-9)


def test_an_image_has_the_same_terms_in_any_batch():
    diffusion, x_0, keys = GaussianDiffusion(100), grey_levels(5, 3, 4, 4), noise.key(3, torch.arange(5))
    model = gaussian_denoiser(diffusion)
    for part in strata(100, 6):
        together = stratum_terms(diffusion, model, x_0, part, keys)
        alone = [stratum_terms(diffusion, model, x_0[i : i + 1], part, keys[i : i + 1]) for i in range(5)]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)
