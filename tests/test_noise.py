"""Counter-based noise: a number follows from its address alone, and the numbers are as good as random."""

import math

import pytest
import torch

from src import noise

MASK = 2**64 - 1


def splitmix64(seed: int, count: int) -> list[int]:
    """Vigna's splitmix64.c, in unsigned Python integers."""
    state, outputs = seed & MASK, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        outputs.append(z ^ (z >> 31))
    return outputs


def unsigned(hashes: torch.Tensor) -> list[int]:
    return [number & MASK for number in hashes.tolist()]


def rows(count: int, *parts: int) -> torch.Tensor:
    return noise.key(*(parts or (0, noise.PICTURE)), torch.arange(count))


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of two sets of numbers with mean 0 and variance 1, in units of its standard error."""
    return (a.double() * b.double()).mean().item() * math.sqrt(a.numel())


def is_uncorrelated(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Neither the numbers nor their squares."""
    squares = (x.double().square().sub(1) / 2**0.5 for x in (a, b))
    return abs(correlation(a, b)) < 4 and abs(correlation(*squares)) < 4


def is_even(counts: torch.Tensor) -> bool:
    """Pearson's chi-squared of counts that should be equal, within four standard deviations of its mean."""
    expected, freedom = counts.double().mean(), counts.numel() - 1
    return ((counts - expected) ** 2 / expected).sum() < freedom + 4 * math.sqrt(2 * freedom)


# --- the hash ---------------------------------------------------------------------------------------------


def test_the_hash_gives_the_published_outputs_of_splitmix64():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert splitmix64(1234567, 5) == published
    assert unsigned(noise.bits(torch.tensor([1234567]), 5)[0]) == published


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63), 0x9E3779B9])
def test_the_hash_is_splitmix64_for_any_key(key):
    assert unsigned(noise.bits(torch.tensor([key]), 50)[0]) == splitmix64(key, 50)


def test_an_address_is_a_fold_of_splitmix64_over_its_parts():
    parts, key = (7, noise.PICTURE, 123_456_789, -5), 0
    for part in parts:
        key = splitmix64(key + part, 1)[0]
    assert unsigned(noise.key(*parts)[None]) == [key]
    assert noise.seed(*parts) == key & (2**63 - 1)


def test_a_part_may_be_a_number_or_a_tensor_of_them():
    table = noise.key(3, torch.arange(4)[:, None], torch.arange(5))
    assert table.shape == (4, 5) and table[2, 4] == noise.key(3, 2, 4)


def test_no_two_addresses_share_a_key():
    keys = noise.key(torch.arange(10)[:, None, None], torch.arange(10)[:, None], torch.arange(1000))
    assert len(keys.unique()) == keys.numel()


def test_every_purpose_has_a_number_of_its_own():
    purposes = [value for name, value in vars(noise).items() if name.isupper() and name != "GOLDEN"]
    assert len(purposes) >= 9 and len(set(purposes)) == len(purposes)


# --- the same address, the same numbers -------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 5, 7), (1,), (3, 32, 32)])
def test_a_row_is_the_same_bits_in_any_batch_and_order(shape):
    whole = noise.normal(rows(33), shape)
    for batch in (1, 2, 3, 16):
        pieces = [noise.normal(keys, shape) for keys in rows(33).split(batch)]
        assert torch.equal(torch.cat(pieces), whole)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0))
    assert torch.equal(noise.normal(rows(33)[order], shape), whole[order])


def test_integers_and_chances_do_not_depend_on_the_batch():
    keys = rows(100)
    assert torch.equal(torch.cat([noise.randint(key[None], 1000) for key in keys]), noise.randint(keys, 1000))
    assert torch.equal(torch.cat([noise.bernoulli(key[None], 0.3) for key in keys]), noise.bernoulli(keys, 0.3))


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    noise.normal(rows(3), (4,)), noise.randint(rows(3), 5), noise.bernoulli(rows(3), 0.5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("other", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)])
def test_another_seed_purpose_step_or_row_gives_other_numbers(other):
    z, w = (noise.normal(noise.key(*parts)[None], (10_000,)) for parts in ((0, 0, 0, 0), other))
    assert (z == w).sum() <= 2 and abs(correlation(z, w)) < 4


# --- normal -----------------------------------------------------------------------------------------------


def test_normal_is_the_transform_of_box_and_muller():
    """Radius from the upper 24 bits of a hash, angle from the 24 below; cosines first, sines after."""
    z = noise.normal(torch.tensor([99]), (20,))[0].double()
    expected = []
    for turn in (math.cos, math.sin):
        for bits in splitmix64(99, 10):
            radius = math.sqrt(-2 * math.log(((bits >> 40) + 1) / 2**24))
            expected.append(radius * turn(2 * math.pi * ((bits >> 16 & 0xFFFFFF) / 2**24)))
    torch.testing.assert_close(z, torch.tensor(expected, dtype=torch.float64), atol=2e-6, rtol=0)


def test_normal_has_shape_dtype_and_bounds():
    z = noise.normal(rows(1000), (3, 5, 7))  # an odd count: one of a pair is left over
    assert z.shape == (1000, 3, 5, 7) and z.dtype == torch.float32
    assert z.isfinite().all() and z.abs().max() <= 5.8


def test_the_extreme_hashes_give_finite_numbers(monkeypatch):
    monkeypatch.setattr(noise, "bits", lambda keys, count: torch.tensor([[0, -1]]))
    z = noise.normal(torch.zeros(1, dtype=torch.int64), (4,))
    assert z.isfinite().all() and z.abs().max() == pytest.approx(math.sqrt(48 * math.log(2)))


def test_normal_is_normal():
    """A million numbers: the first four moments, the tails, and the distance of Kolmogorov and Smirnov (0.1% level: 1.95)."""
    z = noise.normal(rows(1000), (1000,)).flatten().double()
    n = z.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - moment) < 4 * math.sqrt(variance / n)
    for sigmas in (2, 3, 4):
        share = math.erfc(sigmas / math.sqrt(2))
        assert abs((z.abs() > sigmas).double().mean() - share) < 4 * math.sqrt(share / n)
    cdf = torch.special.ndtr(z.sort().values)
    ranks = torch.arange(n + 1, dtype=torch.float64) / n
    assert torch.maximum(ranks[1:] - cdf, cdf - ranks[:-1]).max() * math.sqrt(n) < 1.95


def test_neighbouring_pixels_rows_steps_and_seeds_are_uncorrelated():
    keys = noise.key(torch.arange(5)[:, None, None], torch.arange(20)[:, None], torch.arange(20))
    z = noise.normal(keys.flatten(), (512,))
    z = z.view(5, 20, 20, 512)  # seed, step, row, pixel
    for axis in range(4):
        for lag in (1, 2):
            size = z.shape[axis] - lag
            assert is_uncorrelated(z.narrow(axis, 0, size), z.narrow(axis, lag, size))
    assert abs(correlation(z[:, 1:, :-1], z[:, :-1, 1:])) < 4  # the next step of one row is not the next row of one step


def test_the_two_of_a_box_muller_pair_are_independent():
    cosines, sines = noise.normal(rows(500), (2000,)).double().chunk(2, dim=1)
    assert is_uncorrelated(cosines, sines)
    ranks = torch.special.erf(torch.stack([cosines, sines], dim=-1).flatten(0, 1) / 2**0.5)
    assert is_even(torch.histogramdd(ranks, 8, range=[-1, 1, -1, 1])[0]), "they are not uniform on the square of their ranks"


# --- integers and chances ---------------------------------------------------------------------------------


@pytest.mark.parametrize("high", [2, 10, 1000])
def test_integers_are_uniform(high):
    draws = noise.randint(rows(200_000), high)
    counts = draws.bincount(minlength=high)
    assert len(counts) == high and draws.dtype == torch.int64 and is_even(counts)


def test_integers_of_neighbouring_rows_are_independent():
    a, b = noise.randint(rows(200_001), 10)[:-1], noise.randint(rows(200_001), 10)[1:]
    assert is_even((10 * a + b).bincount(minlength=100))


@pytest.mark.parametrize("probability", [0, 0.1, 0.5, 0.99, 1])
def test_chance_comes_true_as_often_as_it_says(probability):
    share = noise.bernoulli(rows(200_000), probability).double().mean().item()
    assert abs(share - probability) <= 4 * math.sqrt(probability * (1 - probability) / 200_000)
