"""On a CUDA device train.py's own loop neither waits nor copies back. The device is not there: see fake_cuda.py."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import config
import train
from src.data.cache import Images
from src.dataset import DeviceImages, TrainBatches
from src.runtime.build import build_diffusion, build_model, build_validation
from src.runtime.device import InPrecision, place
from src.runtime.distributed import World
from src.runtime.kernels import speed_up
from src.runtime.monitor import Meter
from src.runtime.settings import resolve
from src.runtime.signals import StopRequest
from src.samplers import SAMPLERS
from tests.runtime.fake_cuda import CUDA, Copy, Wait, fake_cuda

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_gpu.py asks the real one"),
    pytest.mark.skipif(torch.__version__ < "2.11", reason="the fake tensors of torch 2.9 ask for the driver of a GPU"),
]
FLAGS = "--dataset shapes --image_size 16 --unet_dim 16 --dim_mults 1,2 --num_res_blocks 1 --attention_resolutions 8 "
FLAGS += "--batch_size 4 --val_images 8 --precision bf16 --compile false --log_every 1000 --save_minutes 0 "


@pytest.fixture(scope="module")
def device():
    with fake_cuda() as watch:
        yield watch


def images() -> Images:
    pixels = np.random.default_rng(0).integers(0, 256, (400, 3, 16, 16), dtype=np.uint8)
    return Images(pixels, torch.arange(400) % 10, list("0123456789"), list("0123456789"), Path())


class Enough(Exception):
    """The steps to be watched are done."""


@pytest.fixture
def copies_of_a_step(device, tmp_path, monkeypatch):
    """copies_of_a_step(flags, spoil) runs train.py's loop for three steps and returns the copies of the third. The first makes
    the optimizer's moments. spoil(losses) is called in the third, as if somebody had added a line."""

    def run(flags: str = "", spoil=lambda losses: None) -> list[Copy]:
        folders = f"--checkpoint_path {tmp_path}/c --output_path {tmp_path}/o --log_path {tmp_path}/l "
        draw, add = TrainBatches.__call__, Meter.add

        def watched(batches, step, micro):
            if micro == 0:
                if step == 3:
                    raise Enough
                device.forget()
            return draw(batches, step, micro)

        def spoiled(meter, losses, t):
            add(meter, losses, t)
            spoil(losses.detach())

        monkeypatch.setattr(train, "pick_device", lambda *_: CUDA)
        monkeypatch.setattr("src.runtime.plan.describe", str)
        monkeypatch.setattr(train, "open_data", lambda *_: (None, {"train": images(), "val": images()}))
        monkeypatch.setattr(TrainBatches, "__call__", watched)
        monkeypatch.setattr(Meter, "add", spoiled)
        with pytest.raises(Enough), StopRequest() as stop:
            train.train(resolve(config, f"{FLAGS}{folders}{flags}".split()), World(), stop)
        assert device.ops > 1000, "forward and backward of a U-Net"
        return device.copies

    return run


# --- the loop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, count",
    [
        ("", 4),  # rows, flips, t, keys of the noise
        ("--class_conditional true", 5),  # and hidden labels
        ("--grad_accum_steps 2", 8),
        ("--dropout 0.1 --prediction v --min_snr_gamma 5", 4),
    ],
)
def test_a_step_neither_waits_nor_copies_back_and_sends_a_few_bytes(copies_of_a_step, device, flags, count):
    copies = copies_of_a_step(flags)
    assert [copy.non_blocking for copy in copies] == [True] * count and not device.doubles
    assert sum(copy.bytes for copy in copies) < 300, "pixels and noise are made on the device"


SPOILERS = {
    "item": lambda loss: loss[0].item(),
    "float": lambda loss: float(loss.mean()),
    "if": lambda loss: bool((loss > 0).all()),
    "cpu": lambda loss: loss.cpu(),
    "to": lambda loss: loss.to("cpu", torch.float64),
    "to another's device": lambda loss: loss.to(torch.zeros(1)),
    "to cpu, non_blocking": lambda loss: loss.to("cpu", non_blocking=True),  # it needs an event before it is read
    "tolist": lambda loss: loss.tolist(),
    "numpy": lambda loss: loss.numpy(),
    "copy_ to the host": lambda loss: torch.zeros(4).copy_(loss),
    "mask": lambda loss: loss[loss > 0],
    "write by mask": lambda loss: loss.clone().__setitem__(loss > 0, 0.0),
    "nonzero": lambda loss: loss.nonzero(),
    "masked_select": lambda loss: loss.masked_select(loss > 0),
    "unique": lambda loss: loss.unique(),
    "equal": lambda loss: torch.equal(loss, loss + 1),
    "isfinite all": lambda loss: loss.isfinite().all() and None,
    "synchronize": lambda loss: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("name", ["item", "cpu", "mask"])  # the others on a tensor alone, to save time
def test_a_line_in_the_loop_that_asks_for_a_value_is_caught(copies_of_a_step, name):
    with pytest.raises(Wait):
        copies_of_a_step(spoil=SPOILERS[name])


@pytest.mark.parametrize("name", SPOILERS)
def test_who_asks_for_a_value_is_caught(device, name):
    with pytest.raises(Wait):
        SPOILERS[name](torch.ones(4, device=CUDA))


def test_a_blocking_copy_to_the_device_is_told(device):
    device.forget()
    torch.ones(4).to(CUDA)
    torch.tensor([1, 2, 3], device=CUDA)
    torch.ones(4).to(CUDA, non_blocking=True)
    torch.empty(4, device=CUDA).copy_(torch.ones(4))
    assert device.copies == [Copy(16, False), Copy(24, False), Copy(16, True), Copy(16, False)]


def test_in_bf16_no_product_is_in_float32_but_the_last_convolution():
    """So float32_matmul_precision ("high", TF32) changes nothing in such a step; cuDNN's convolutions take TF32 by default."""
    s = resolve(config, FLAGS.split()).settings
    model, found = build_model(s, 10).to(memory_format=torch.channels_last), []
    speed_up(model, CUDA, torch.bfloat16)
    network = InPrecision(model, torch.device("cpu"), torch.bfloat16)

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(word in func.overloadpacket.__name__ for word in ("mm", "convolution", "attention")):
                found.append((func.overloadpacket.__name__, next(a.dtype for a in args if isinstance(a, torch.Tensor))))
            return func(*args, **(kwargs or {}))

    with Products():
        network(torch.randn(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64)).square().mean().backward()
    assert {name for name, dtype in found if dtype == torch.float32} == {"convolution", "convolution_backward"}
    assert sum(dtype == torch.float32 for _, dtype in found) == 2 and len(found) > 40


# --- validation and sampling ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(device):
    s = resolve(config, f"{FLAGS} --class_conditional true".split()).settings
    network = InPrecision(place(build_model(s, 10).eval(), CUDA, torch.bfloat16), CUDA, torch.bfloat16)
    return s, network, build_diffusion(s).to(CUDA), DeviceImages(images(), CUDA)


def test_a_validation_batch_neither_waits_nor_copies_back_up_to_the_loss(device, parts):
    s, network, diffusion, pictures = parts
    device.forget()
    for count, batch in enumerate(build_validation(s, pictures), start=1):  # the caller reads the losses: a wait a batch
        losses = diffusion.validation_losses(network, *batch)
        if count == 3:
            break
    assert losses.shape == (16,) and losses.device == CUDA, "four times the batch of training"
    assert [copy.non_blocking for copy in device.copies] == [True] * 9, "rows, t, keys for each"
    assert not device.doubles


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampling_step_neither_waits_nor_copies(device, parts, sampler, guidance):
    _, network, diffusion, _ = parts
    noise, y = torch.randn(4, 3, 16, 16, device=CUDA), torch.zeros(4, dtype=torch.int64, device=CUDA)
    device.forget()
    denoiser, path = diffusion.denoiser(network, y, guidance), diffusion.path(3)
    states = diffusion.trajectory(sampler, noise, path, denoiser, lambda k: noise, 0.5)
    for _ in range(3):
        x, _ = next(states)
    assert x.device == CUDA and not device.copies and not device.doubles
    with pytest.raises(Wait):  # behind the last step it asks whether all predictions were finite
        next(states)


def test_nothing_that_a_run_builds_on_the_device_is_float64(device):
    """An Apple GPU has none."""
    device.forget()
    s = resolve(config, f"{FLAGS} --class_conditional true".split()).settings
    build_diffusion(s).to(CUDA), DeviceImages(images(), CUDA), Meter(s.TIME_STEPS, CUDA, World())
    place(build_model(s, 10), CUDA, torch.float32)
    assert device.ops > 10 and not device.doubles
    torch.ones(2, device=CUDA).double()
    assert device.doubles, "the watch is blind"


def test_autocast_takes_part(device, parts):
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = parts[1].model.stem(torch.ones(1, 3, 16, 16, device=CUDA))
    assert y.dtype == torch.bfloat16 and y.device == CUDA


def test_the_host_is_real(device):
    assert torch.arange(5).sum().item() == 10 and torch.randperm(4).tolist() != []
    with pytest.raises(Exception, match="device"):
        torch.ones(4, device=CUDA) + torch.ones(4)  # two devices: an error there too
