"""The network, the noise, the average and the pictures on a GPU, against the same on the CPU.

Skipped without CUDA. `GPU_TEST_DEVICE=cpu pytest tests/test_gpu.py` walks through the same code on the CPU instead, so that
a mistake in a test is found where minutes are cheap.
"""

import os
import shlex
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.lean import norm_silu
from src import noise
from src.diffusion import GaussianDiffusion
from src.ema import EMA
from src.model import UNet
from src.noise import PictureNoise
from src.runtime.device import InPrecision
from src.samplers import SAMPLERS
from src.utils import to_uint8
from tests.runs import ROOT

DEVICE = torch.device(os.environ.get("GPU_TEST_DEVICE", "cuda"))
CPU = torch.device("cpu")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(autouse=True)
def full_float32():
    """TF32 rounds to 10 bits, and would hide what is tested here."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def place(model, device):
    return model.to(device, memory_format=torch.channels_last)


def small(speaks=True):
    """The same weights each time, on the CPU; where it `speaks`, those that start at zero are random too."""
    torch.manual_seed(0)
    model = UNet(32, dim=32, dim_mults=(1, 2, 2), num_res_blocks=1, attention_resolutions=(16, 8), num_classes=4)
    for parameter in model.parameters() if speaks else ():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def batch(device, size=8, step=0):
    """(x_0, t, noise, y), a function of the step alone."""
    keys = noise.key(0, noise.TRAIN_NOISE, step, torch.arange(size))
    x_0 = noise.normal(keys, (3, 32, 32)).tanh()
    t = noise.randint(noise.key(0, noise.TRAIN_TIME, step, torch.arange(size)), 1000)
    eps = noise.normal(noise.key(keys, 1), (3, 32, 32))
    return x_0.to(device), t.to(device), eps.to(device), (torch.arange(size) % 4).to(device)


def distance(a, b):
    """||a - b|| / ||b||, over all tensors together."""
    a, b = (torch.cat([x.detach().cpu().double().flatten() for x in xs]) for xs in (a, b))
    return ((a - b).norm() / b.norm()).item()


def error(a, b):
    """Root mean square of a - b, in units of the noise that the network predicts."""
    return (a - b).square().mean().sqrt().item()


def forward_backward(device, dtype=torch.float32, wrap=lambda network: network):
    """(prediction, gradients, losses) of one pass over the small network."""
    model, diffusion = place(small(), device), GaussianDiffusion().to(device)
    network = wrap(InPrecision(model, device, dtype))
    x_0, t, eps, y = batch(device)
    prediction = network(diffusion.q_sample(x_0, t, eps), t, y)
    losses = diffusion.training_losses(lambda x_t, t, y: prediction, x_0, t, eps, y)
    losses.mean().backward()
    return [prediction], [parameter.grad for parameter in model.parameters()], [losses]


def train(device, dtype=torch.float32, steps=20):
    """(losses, EMA weights, prediction) after some steps of Adam with clipping and the average, as train.py takes them."""
    model, diffusion = place(small(speaks=False), device), GaussianDiffusion().to(device)
    network, ema, losses = InPrecision(model, device, dtype), EMA(model, 0.99), []
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    for step in range(steps):
        x_0, t, eps, y = batch(device, step=step)
        loss = diffusion.training_losses(network, x_0, t, eps, y).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step)
        losses.append(loss.detach())
    x_0, t, eps, y = batch(device, step=steps)
    with torch.no_grad():
        prediction = network(diffusion.q_sample(x_0, t, eps), t, y)
    return losses, list(ema.model.parameters()), [prediction]


def draw(diffusion, network, seed, indices, size, **options):
    noise = PictureNoise(seed, list(indices), (3, size, size), diffusion.signal.device)
    return diffusion.sample(network, (len(indices), 3, size, size), noise=noise, **options)


# --- the network ------------------------------------------------------------------------------------------


def test_forward_and_backward_are_those_of_the_cpu():
    for part, here, there in zip(("prediction", "gradients", "losses"), forward_backward(DEVICE), forward_backward(CPU)):
        assert distance(here, there) < 1e-4, part


def test_twenty_training_steps_are_those_of_the_cpu():
    for part, here, there in zip(("losses", "average", "prediction"), train(DEVICE), train(CPU)):
        assert distance(here, there) < {"prediction": 1e-3}.get(part, 1e-4), part  # it starts at 0: the error is of the change


def in_one_graph(network):
    return torch.compile(network, fullgraph=True)


@pytest.mark.parametrize("wrap", [lambda network: network, in_one_graph], ids=["eager", "compiled"])
def test_bf16_is_near_float32(wrap):
    half, full = forward_backward(DEVICE, torch.bfloat16, wrap), forward_backward(DEVICE)
    assert half[0][0].dtype == half[2][0].dtype == torch.float32
    assert error(half[0][0], full[0][0]) < 1e-2, "prediction"
    assert distance(half[2], full[2]) < 1e-2, "losses"
    assert distance(half[1], full[1]) < 5e-2, "gradients"


def test_twenty_training_steps_in_bf16_have_the_losses_of_float32():
    assert distance(train(DEVICE, torch.bfloat16)[0], train(DEVICE)[0]) < 1e-2


def test_compiled_is_eager():
    compiled, eager = forward_backward(DEVICE, wrap=in_one_graph), forward_backward(DEVICE)
    for part, fast, plain in zip(("prediction", "gradients", "losses"), compiled, eager):
        assert distance(fast, plain) < 1e-4, part


@pytest.mark.skipif(DEVICE.type != "cuda", reason="measures the memory of a GPU")
def test_the_default_network_trains_at_batch_16_in_under_8_gb():
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held_before = torch.cuda.memory_allocated()
    model, diffusion = place(UNet(), DEVICE), GaussianDiffusion().to(DEVICE)
    network, ema = InPrecision(model, DEVICE, torch.bfloat16), EMA(model, 0.9999)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    for step in range(3):
        x_0, t = torch.randn(16, 3, 64, 64, device=DEVICE), torch.randint(1000, (16,), device=DEVICE)
        diffusion.training_losses(network, x_0, t).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(step)
    peak = (torch.cuda.max_memory_reserved() - held_before) / 1e9
    print(f"peak {peak:.2f} GB reserved, {torch.cuda.max_memory_allocated() / 1e9:.2f} GB allocated")
    assert peak < 8


# --- noise, average, pictures -----------------------------------------------------------------------------


def test_noise_is_that_of_the_cpu():
    keys = noise.key(3, noise.PICTURE, torch.arange(64))
    there = noise.normal(keys, (3, 64, 64))
    torch.testing.assert_close(noise.normal(keys.to(DEVICE), (3, 64, 64)).cpu(), there, atol=1e-6, rtol=1e-6)
    here, there = (PictureNoise(3, range(64), (3, 64, 64), device)(7).cpu() for device in (DEVICE, CPU))
    torch.testing.assert_close(here, there, atol=1e-6, rtol=1e-6)


def test_hashes_integers_and_chances_are_exactly_those_of_the_cpu():
    keys = noise.key(3, noise.TRAIN_TIME, torch.arange(100_000))
    here = keys.to(DEVICE)
    assert torch.equal(noise.key(3, noise.TRAIN_TIME, torch.arange(100_000, device=DEVICE)).cpu(), keys)
    assert torch.equal(noise.bits(here[:100], 100).cpu(), noise.bits(keys[:100], 100))
    assert torch.equal(noise.randint(here, 1000).cpu(), noise.randint(keys, 1000))
    assert torch.equal(noise.bernoulli(here, 0.1).cpu(), noise.bernoulli(keys, 0.1))


def test_a_row_of_noise_is_the_same_bits_in_any_batch():
    keys = noise.key(0, noise.PICTURE, torch.arange(33, device=DEVICE))
    whole = noise.normal(keys, (3, 5, 7))
    for size in (1, 2, 16):
        assert torch.equal(torch.cat([noise.normal(part, (3, 5, 7)) for part in keys.split(size)]), whole)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_pictures_do_not_depend_on_the_batch_they_are_drawn_in(sampler):
    model, diffusion = place(small(), DEVICE).eval(), GaussianDiffusion().to(DEVICE)

    def series(size):
        parts = torch.arange(16).split(size)
        options = dict(sampler=sampler, steps=10, eta=0.5, guidance=2.0)
        drawn = [draw(diffusion, model, 1, part.tolist(), 32, y=part.to(DEVICE) % 4, **options) for part in parts]
        return to_uint8(torch.cat(drawn))

    whole = series(16).int()
    assert whole.float().std(dim=0).mean() > 10  # they are sixteen different pictures
    for size in (1, 3):
        assert (series(size).int() - whole).abs().max() <= 1


def test_pictures_are_those_of_the_cpu():
    pictures = []
    for device in (DEVICE, CPU):
        model, diffusion = place(small(), device).eval(), GaussianDiffusion().to(device)
        pictures.append(to_uint8(draw(diffusion, model, 1, range(4), 32, sampler="dpm++", steps=10)).int())
    assert (pictures[0] - pictures[1]).abs().max() <= 1


# --- a fault of the compiler that is known ----------------------------------------------------------------


@pytest.mark.parametrize("is_lean", [False, True])
def test_a_compiled_norm_in_channels_last_at_the_size_of_pytorch_issue_140913(is_lean):
    """128 channels, 32 groups, 64x64, batch 256, as --preset h100 has them: values and all gradients, against the CPU."""
    size, norm = (256 if DEVICE.type == "cuda" else 2, 128, 64, 64), nn.GroupNorm(32, 128)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    results = []
    for device in (DEVICE, CPU):
        layer = deepcopy(norm).to(device)
        lean, usual = (lambda x, n=layer: norm_silu(n, x)), (lambda x, n=layer: F.silu(n(x)))
        function = torch.compile(lean if is_lean else usual) if device == DEVICE else usual
        x = torch.linspace(-2, 2, 256 * 128 * 64 * 64)[: torch.Size(size).numel()].sin_().view(size).to(device)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        y = function(x)
        results.append([y, *torch.autograd.grad(y.square().mean(), [x, layer.weight, layer.bias])])
    for here, there in zip(*results):
        assert distance([here], [there]) < 1e-4


def test_a_run_that_goes_on_is_the_run_that_never_stopped(tmp_path):
    """Real processes. To 1e-4: kernels on a GPU may add up in another order each time."""
    words = "--dataset shapes --image_size 16 --unet_dim 16 --dim_mults 1,2 --num_res_blocks 1 --compile false --precision fp32"
    words += f" --device {DEVICE.type} --batch_size 8 --warmup_steps 5 --val_images 8 --num_samples 2 --preview_steps 2"
    for run, steps in (("whole", 8), ("parts", 5), ("parts", 8)):
        command = [sys.executable, ROOT / "train.py", *shlex.split(words), "--run", run, "--max_steps", str(steps)]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    paths = [tmp_path / "checkpoints" / run / "latest.pth" for run in ("whole", "parts")]
    whole, parts = (torch.load(path, weights_only=True, map_location="cpu") for path in paths)
    assert parts["step"] == 8
    torch.testing.assert_close(parts["ema"], whole["ema"], atol=1e-4, rtol=1e-4)
