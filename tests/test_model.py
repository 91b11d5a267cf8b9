"""The U-Net: its shapes, what reaches what, what it costs, and that it learns."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

from src.diffusion import GaussianDiffusion
from src.model import Attention, UNet, norm_groups, parameter_count, sinusoid


def tiny(image_size=16, speaks=True, **options):
    """A small network; where it `speaks`, every weight is random, also those that start at zero."""
    torch.manual_seed(0)
    options = dict(dim=16, dim_mults=(1, 2), num_res_blocks=1, attention_resolutions=(8,)) | options
    model = UNet(image_size, **options)
    if speaks:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
    return model


def batch(size=3, image_size=16, num_classes=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 3, image_size, image_size, generator=generator)
    return x, torch.linspace(0, 999, size).long(), torch.arange(size) % num_classes


def gradients(model, x, t, y=None):
    model.zero_grad(set_to_none=True)
    model(x, t, y).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# --- shapes, sizes, costs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_res_blocks", [1, 3])
@pytest.mark.parametrize("dim_mults", [(1,), (2,), (2, 4), (1, 1, 1), (3, 2, 1)])
@pytest.mark.parametrize("dim", [8, 24])
def test_any_width_any_levels_and_any_number_of_blocks_fit_together(dim, dim_mults, num_res_blocks):
    x, t, _ = batch()
    model = tiny(dim=dim, dim_mults=dim_mults, num_res_blocks=num_res_blocks)
    out = model(x, t)
    assert out.shape == x.shape and out.isfinite().all() and out.std() > 0
    assert all(gradient is not None for gradient in gradients(model, x, t).values())


def test_the_default_network_has_92_million_parameters():
    with torch.device("meta"):
        assert parameter_count(UNet()) == 92_025_731


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_the_default_network_takes_and_gives_images_of_other_sizes(size):
    with FakeTensorMode():
        x, t = torch.empty(2, 3, size, size), torch.zeros(2, dtype=torch.int64)
        assert UNet(size)(x, t).shape == x.shape


def test_attention_stands_at_the_named_resolutions_and_in_the_middle_alone():
    def sides(**options):
        model, seen = tiny(32, dim_mults=(1, 1, 2, 2), **options), []
        for module in model.modules():
            if isinstance(module, Attention):
                module.register_forward_hook(lambda module, args, out: seen.append(out.shape[-1]))
        x, t, _ = batch(1, 32)
        model(x, t)
        return seen

    # Down: one block a level; middle: once; up: one block more a level.
    assert sides(attention_resolutions=(16, 8)) == [16, 8] + [4] + [8] * 2 + [16] * 2
    assert sides(attention_resolutions=(4,)) == [4] + [4] + [4] * 2
    assert sides(attention_resolutions=()) == sides(attention_resolutions=(0,)) == [4]


@pytest.mark.parametrize("dim, heads", [(8, 1), (32, 1), (64, 1), (96, 1), (128, 2), (192, 3), (256, 4), (384, 6), (512, 8)])
def test_attention_heads_have_64_channels_or_more_where_64_does_not_divide(dim, heads):
    assert Attention(dim, 8).heads == heads


def test_attention_is_softmax_of_scaled_products_over_all_pixels():
    """Written out for one head: out = softmax(q k^T / sqrt(d)) v, as a residual."""
    torch.manual_seed(0)
    layer, x = Attention(8, 8), torch.randn(2, 8, 3, 3)
    nn.init.normal_(layer.out.weight)
    tokens = layer.norm(x).flatten(2).mT  # [B, pixels, channels]
    q, k, v = layer.qkv(tokens).chunk(3, dim=-1)
    weights = torch.einsum("bid,bjd->bij", q, k).div(8**0.5).softmax(-1)
    expected = x + layer.out(weights @ v).mT.reshape(x.shape)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_the_step_is_embedded_in_sines_and_cosines_of_falling_frequency():
    """Vaswani et al. 2017, sec. 3.5: frequencies 10000^(-i / half)."""
    t, half = torch.tensor([0, 1, 500, 999]), 8
    angles = t[:, None].double() * torch.tensor([10_000 ** (-i / half) for i in range(half)], dtype=torch.float64)
    expected = torch.cat([angles.cos(), angles.sin()], dim=1).float()
    torch.testing.assert_close(sinusoid(t, 2 * half), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(dim=20), "dim is 20; the norm's 8 groups need a multiple of 8"),
        (dict(dim=144), "dim is 144; the norm's 32 groups need a multiple of 32"),
        (dict(image_size=36), "image_size 36 cannot be halved 3 times"),
        (dict(image_size=63), "image_size 63 cannot be halved 3 times"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        UNet(**options)


def test_norm_groups_are_few_where_channels_are():
    assert [norm_groups(dim) for dim in (8, 32, 96, 128, 256)] == [8, 8, 8, 32, 32]


# --- what reaches what ------------------------------------------------------------------------------------


def test_a_fresh_network_predicts_zero():
    x, t, _ = batch()
    out = tiny(speaks=False)(x, t)
    assert out.dtype == torch.float32 and (out == 0).all()


def test_every_parameter_gets_a_gradient():
    model = tiny(num_classes=4)
    for name, gradient in gradients(model, *batch()).items():
        assert gradient is not None and gradient.abs().sum() > 0, name


def test_a_block_starts_as_the_identity():
    model = tiny(speaks=False)
    x = torch.randn(2, 16, 8, 8)
    block = model.down[0]["blocks"][0]
    assert torch.equal(block(x, torch.randn(2, 64)), x)


def test_the_step_changes_the_prediction():
    model, (x, t, _) = tiny(), batch()
    assert (model(x, t) - model(x, t + 1)).abs().max() > 1e-5


def test_the_prediction_for_a_picture_does_not_depend_on_its_neighbours():
    model, (x, t, y) = tiny(num_classes=4), batch(5)
    whole = model(x, t, y)
    for i in range(5):
        torch.testing.assert_close(model(x[i : i + 1], t[i : i + 1], y[i : i + 1]), whole[i : i + 1], atol=1e-5, rtol=1e-4)
    changed = x.clone()
    changed[0] = 100.0
    torch.testing.assert_close(model(changed, t, y)[1:], whole[1:], atol=1e-5, rtol=1e-4)


def test_a_step_of_training_makes_the_label_count():
    """A fresh network is zero whatever its label. Its first step moves the last convolution, and then the label can enter."""
    model, (x, t, y) = tiny(num_classes=4, speaks=False), batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    assert torch.equal(model(x, t, y), model(x, t, (y + 1) % 4))
    for _ in range(3):
        F.mse_loss(model(x, t, y), x).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (model(x, t, y) - model(x, t, (y + 1) % 4)).abs().max() > 1e-4


def test_no_label_is_minus_1_and_is_learnt_apart_from_the_classes():
    model, (x, t, y) = tiny(num_classes=4), batch()
    none = model(x, t)
    assert torch.equal(none, model(x, t, torch.full_like(y, -1)))
    assert all((none - model(x, t, torch.full_like(y, label))).abs().max() > 1e-4 for label in range(4))
    mixed = model(x, t, torch.tensor([2, -1, 0]))  # some with, some without
    torch.testing.assert_close(mixed[1], none[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[0], model(x, t, torch.full_like(y, 2))[0], atol=1e-5, rtol=1e-4)


def test_dropout_is_random_in_training_and_off_in_eval():
    model, (x, t, _) = tiny(dropout=0.5), batch()
    assert not torch.equal(model(x, t), model(x, t))
    model.eval()
    assert torch.equal(model(x, t), model(x, t))


def test_the_state_dict_loads_strictly_and_gives_the_same_network():
    model, (x, t, y) = tiny(num_classes=4), batch()
    other = tiny(num_classes=4, speaks=False)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(x, t, y), other(x, t, y))
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}  # no buffers: the average needs none


# --- the same numbers by another road ---------------------------------------------------------------------


def test_activation_checkpointing_gives_the_same_gradients():
    plain, (x, t, y) = tiny(num_classes=4, dropout=0.2), batch()
    thrifty = tiny(num_classes=4, dropout=0.2, activation_checkpointing=True)
    results = []
    for model in (plain, thrifty):
        torch.manual_seed(5)  # the same dropout, which the second pass must repeat
        results.append(gradients(model, x, t, y))
    torch.testing.assert_close(results[1], results[0], atol=0, rtol=0)


def test_activation_checkpointing_keeps_less():
    def kept(model):
        numbers = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: numbers.append(x.numel()), lambda packed: None):
            model(*batch(8)[:2])
        return sum(numbers)

    assert kept(tiny(num_res_blocks=3, activation_checkpointing=True)) < 0.5 * kept(tiny(num_res_blocks=3))


def test_channels_last_gives_what_contiguous_gives():
    model, (x, t, y) = tiny(num_classes=4), batch()
    expected, expected_gradients = model(x, t, y), gradients(model, x, t, y)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last), t, y), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradients(model, x, t, y), expected_gradients, atol=1e-4, rtol=1e-3)


def test_under_bf16_autocast_the_prediction_is_float32_and_nearly_the_same():
    model, (x, t, y) = tiny(num_classes=4), batch()
    expected = model(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, y)
    assert out.dtype == torch.float32
    assert (out - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_last_convolution_runs_in_float32_because_x_0_magnifies_its_error(schedule):
    """At t = T - 1 an error of eps is magnified 158-fold in x_0 (linear) or more: rounded to bf16 it is a visible one."""
    diffusion, model, (x, _, _), inputs = GaussianDiffusion(schedule=schedule), tiny(), batch(2), []
    conv, t = model.head[2], torch.full((2,), 999)
    hook = conv.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        ours = model(x, t)
        hook.remove()
        rounded = conv(inputs[0]).float()
    exact = F.conv2d(inputs[0].double(), conv.weight.double(), conv.bias.double(), padding=1)
    magnified = [(diffusion.sigma[999] / diffusion.signal[999] * (eps - exact)).abs().max().item() for eps in (ours, rounded)]
    assert magnified[0] < 0.01 * magnified[1] and magnified[1] > 0.1, magnified


def test_a_compiled_network_gives_what_the_eager_one_gives():
    """And is one graph: nothing in it makes the compiler give up half-way. Inductor itself: test_kernels."""
    model, (x, t, y) = tiny(8, dim=8, attention_resolutions=(), num_classes=4), batch(image_size=8)
    expected, expected_gradients = model(x, t, y), gradients(model, x, t, y)
    model.zero_grad()
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(x, t, y)
    out.square().mean().backward()
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected_gradients[name], atol=1e-4, rtol=1e-3)


# --- learning ---------------------------------------------------------------------------------------------


def test_one_batch_is_learnt_by_heart():
    """Four images at fixed t and noise: 150 steps take the loss to a twentieth."""
    diffusion, model = GaussianDiffusion(), tiny(8, dim=32, attention_resolutions=(4,), speaks=False)
    torch.manual_seed(0)
    x_0, t, noise = torch.rand(4, 3, 8, 8) * 2 - 1, torch.tensor([50, 300, 600, 900]), torch.randn(4, 3, 8, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(150):
        loss = diffusion.training_losses(model, x_0, t, noise).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0], (losses[0], losses[-1])
