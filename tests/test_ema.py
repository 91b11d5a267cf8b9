"""The running average of the weights, against its closed form."""

import time

import pytest
import torch
from torch import nn

from src.ema import EMA


def net(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Linear(3, 1)).double()
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


def average(ema: EMA) -> float:
    values = torch.cat([parameter.flatten() for parameter in ema.model.parameters()])
    assert (values == values[0]).all()
    return values[0].item()


def set_weights(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def test_after_the_warm_up_the_average_is_the_geometric_sum():
    """w_n = d^n w_0 + (1 - d) sum_i d^(n - i) x_i. Past step 9 d / (1 - d) the decay is what was asked for."""
    decay, n, model = 0.9, 50, net(5.0)
    ema = EMA(model, decay)
    for i in range(1, n + 1):
        set_weights(model, float(i * i))
        ema.update(step=100 + i)
    expected = decay**n * 5 + (1 - decay) * sum(decay ** (n - i) * i * i for i in range(1, n + 1))
    assert average(ema) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("decay", [0.9999, 0.5])
def test_during_the_warm_up_the_decay_is_1_plus_step_over_10_plus_step_up_to_the_one_asked_for(decay):
    """From 1 towards 0: what is left is the product of the decays."""
    model, left = net(1.0), 1.0
    ema = EMA(model, decay)
    set_weights(model, 0.0)
    for step in [*range(20), 1000]:
        ema.update(step)
        left *= min(decay, (1 + step) / (10 + step))
        assert average(ema) == pytest.approx(left, rel=1e-12)
    assert average(ema) < 1e-6  # the random start is soon forgotten


def test_decay_0_follows_the_raw_weights():
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    ema = EMA(model, 0.0)
    for step in (0, 1, 5, 10_000):
        nn.init.normal_(model.weight)
        ema.update(step)
        assert torch.equal(ema.model.weight, model.weight)


def test_the_average_is_never_trained_and_drops_nothing_out():
    model = net(1.0).train()
    ema = EMA(model, 0.9)
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    assert not any(module.training for module in ema.model.modules())
    ema.update(0)
    assert all(parameter.grad_fn is None for parameter in ema.model.parameters())
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())  # the network is as it was


def test_buffers_follow_the_network_and_constants_stay():
    """Statistics of a BatchNorm that somebody adds would stay those of the first step; an average of a table would spoil it."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model.register_buffer("table", torch.tensor([1, 2, 3]))
    ema = EMA(model, 0.999)
    for step in range(5):
        model(torch.randn(8, 2))
        ema.update(step)
    norm, averaged = model[1], ema.model[1]
    assert torch.equal(averaged.running_mean, norm.running_mean) and averaged.num_batches_tracked == 5
    assert not torch.equal(averaged.running_mean, torch.zeros(3)) and ema.model.table.tolist() == [1, 2, 3]
    assert averaged.running_mean.data_ptr() != norm.running_mean.data_ptr()


def test_an_update_costs_no_more_than_its_one_foreach_call():
    """300 small tensors, so that the host's time is all there is. In turns, and the best of many: neighbours only slow down."""
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(150)))
    ema = EMA(model, 0.9999)
    averages, weights = list(ema.model.parameters()), list(model.parameters())

    def seconds(call) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            call()
        return time.perf_counter() - start

    calls = (lambda: ema.update(9), lambda: torch._foreach_lerp_(averages, weights, 0.5))
    ours, bare = map(min, zip(*([seconds(call) for call in calls] for _ in range(300))))
    assert ours < 1.3 * bare
