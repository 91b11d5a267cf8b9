"""The variational bound on -log p(x_0), Ho et al. 2020 (arXiv:2006.11239), Eq. (5), term by term and in nats:

    L_T         the prior, KL(q(x_T | x_0) || N(0, I)): what the noisiest image still tells; no network in it
    L_{t-1}     one step, KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), both of variance beta_tilde (sec. 3.2)
    L_0         the decoder, -log p(x_0 | x_1) of whole grey levels, Eq. (13)

As everywhere, t = 0 in code is the paper's t = 1: step 0 is the decoder, steps 1 to T - 1 are L_1 to L_{T-1}.
The sums are taken in float64 on the CPU, whatever the network computes in.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from src import noise
from src.diffusion import GaussianDiffusion, Model, posterior

HALF_BIN = 1 / 255  # grey levels are 2 / 255 apart in [-1, 1]


def bits_per_dimension(nats: Tensor, dimensions: int) -> Tensor:
    return nats / (dimensions * math.log(2))


def prior_term(diffusion: GaussianDiffusion, x_0: Tensor) -> Tensor:
    """L_T. x_0: [B, C, S, S] in [-1, 1]. Returns [B] float64 nats."""
    abar = diffusion.alphas_cumprod[-1]
    return 0.5 * (abar * (x_0.cpu().double().square() - 1) - torch.log1p(-abar)).flatten(1).sum(1)


def step_weights(diffusion: GaussianDiffusion) -> Tensor:
    """[T] float64: L_{t-1} is this times the squared error of the predicted x_0. Both Gaussians have variance var, and their
    means differ by w_0 times that error, Eqs. (7), (8). 0 at t = 0, which is the decoder's."""
    abar = diffusion.alphas_cumprod
    w_0, _, var = posterior(abar[1:], abar[:-1])
    return torch.cat([torch.zeros(1, dtype=torch.float64), w_0**2 / (2 * var)])


def log_normal_mass(low: Tensor, high: Tensor) -> Tensor:
    """log(Phi(high) - Phi(low)) of the standard normal distribution, low < high, float64. Both are mirrored to the lower
    tail first, where the difference does not cancel: it stays finite hundreds of deviations out."""
    mirrored = low + high > 0
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return log_high + torch.log1p(-torch.exp(log_low - log_high))


def decoder_term(x_0: Tensor, mean: Tensor, std: float) -> Tensor:
    """L_0, Eq. (13): -log of the mass that N(mean, std^2) puts on each grey level's bin. The bins of black and white are open
    to the outside. x_0, mean: [B, C, S, S]. Returns [B] float64 nats."""
    x_0, mean = x_0.cpu().double(), mean.cpu().double()
    low = torch.where(x_0 < -1 + HALF_BIN, -math.inf, (x_0 - HALF_BIN - mean) / std)
    high = torch.where(x_0 > 1 - HALF_BIN, math.inf, (x_0 + HALF_BIN - mean) / std)
    return -log_normal_mass(low, high).flatten(1).sum(1)


@torch.no_grad()
def step_terms(
    diffusion: GaussianDiffusion, model: Model, x_0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None = None, clip: bool = True
) -> Tensor:
    """The term of step t for each image, from one draw of x_t: L_{t-1}, or L_0 where t = 0.

    x_0: [B, C, S, S] grey levels in [-1, 1].   t: [B] int64 in [0, T).   eps: like x_0, standard normal.
    y: [B] int64 labels or None.   clip: as in sampling, the model's mean comes from x_0 clipped to [-1, 1].
    Returns [B] float64 nats on the CPU.
    """
    x_t = diffusion.q_sample(x_0, t, eps)
    x_0_hat = diffusion.to_x_0(model(x_t, t, y).float(), x_t, t)
    if clip:
        x_0_hat = torch.where(x_0_hat.isfinite(), x_0_hat.clamp(-1, 1), math.nan)  # infinity stays a fault
    t = t.cpu()
    terms = step_weights(diffusion)[t] * (x_0 - x_0_hat).square().flatten(1).sum(1).cpu().double()
    if (is_decoder := t == 0).any():  # its mean is x_0_hat itself, its variance that of the step before (sec. 3.2)
        std = math.exp(0.5 * diffusion.log_var[0].item())
        rows = is_decoder.to(x_0.device)
        terms[is_decoder] = decoder_term(x_0[rows], x_0_hat[rows], std)
    return terms


def strata(time_steps: int, count: int) -> list[range]:
    """[0, T) in `count` parts that grow geometrically, because the terms fall steeply with t (Nichol & Dhariwal 2021,
    arXiv:2102.09672, Fig. 2). One t drawn in each, times the part's length, adds up to all T terms in expectation; with
    count = T the parts are the steps themselves and the sum is exact."""
    edges = [0]
    for left in range(count, 0, -1):
        start = edges[-1] + 1
        edges.append(max(start, round(start * ((time_steps + 1) / start) ** (1 / left)) - 1))
    return [range(low, high) for low, high in pairwise(edges)]


def stratum_terms(
    diffusion: GaussianDiffusion, model: Model, x_0: Tensor, part: range, keys: Tensor, y: Tensor | None = None, **options
) -> Tensor:
    """What the steps in `part` add to the bound, by one t for each image and one x_t: [B] float64 nats, right in expectation.
    keys: [B] int64 noise addresses, one an image: t and noise hang on them and on `part` alone, not on the batch."""
    t = part.start + noise.randint(noise.key(keys, -1 - part.start), len(part))  # negative: no key of the noise at some t
    eps = noise.normal(noise.key(keys, t).to(x_0.device), x_0.shape[1:])
    return len(part) * step_terms(diffusion, model, x_0, t.to(x_0.device), eps, y, **options)


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of independent values and its standard error. values: [N, ...], N at least 2."""
    return values.mean(0), values.std(0) / len(values) ** 0.5


def summary(bits: Tensor, parts: list[range]) -> tuple[dict[str, float], list[dict[str, float]]]:
    """The bound with its standard error over images and its terms, and what each part of [0, T) adds.
    bits: [N, 1 + len(parts)] bits per dimension, of the prior and then of each part."""
    total, error = mean_and_error(bits.sum(1))
    means, errors = (column.tolist() for column in mean_and_error(bits))
    figures = {"total": total.item(), "standard_error": error.item(), "prior": means[0]}
    if parts[0] == range(1):  # otherwise one part holds the decoder and some steps
        figures |= {"steps": sum(means[2:]), "decoder": means[1]}
    rows = zip(parts, means[1:], errors[1:])
    return figures, [{"t_from": t[0], "t_to": t[-1], "sum": mean, "standard_error": error} for t, mean, error in rows]
