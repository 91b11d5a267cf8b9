"""The compiled network is one graph, and one compilation serves all steps, learning rates, epochs and samplers.

Dynamo alone is under test (backend "eager": no C compiler is needed). NOT seen: what Inductor or CUDA
graphs would do with the graph.
"""

import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import config
import train
from src.diffusion import eval_mode
from src.runtime.build import build_diffusion, build_model
from src.runtime.device import InPrecision, place
from src.runtime.distributed import World
from src.runtime.settings import resolve
from src.runtime.signals import StopRequest
from src.samplers import SAMPLERS
from tests.runtime.test_gpu_path import images

CPU, compile_network = torch.device("cpu"), torch.compile
FLAGS = "--dataset shapes --image_size 16 --unet_dim 8 --dim_mults 1 --num_res_blocks 1 --attention_resolutions 0 "
FLAGS += "--batch_size 50 --val_images 8 --num_samples 2 --preview_steps 2 --precision bf16 --device cpu --compile true "


@pytest.fixture
def count(monkeypatch):
    """Counts compilations; a graph break raises."""
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(compile_network, backend=counter, fullgraph=True))
    yield counter
    torch._dynamo.reset()


def test_one_compilation_serves_all_steps_learning_rates_and_epochs(count, tmp_path, monkeypatch):
    """train.py itself: 4 steps an epoch, with warm-up, validations and previews between them."""
    flags = f"--checkpoint_path {tmp_path}/c --output_path {tmp_path}/o --log_path {tmp_path}/l --sample_every 1 "
    flags += "--class_conditional true --dropout 0.1 --grad_accum_steps 2 --max_steps 17"
    monkeypatch.setattr(train, "open_data", lambda *_: (None, {"train": images(), "val": images()}))
    monkeypatch.setattr(train, "should_compile", lambda *_: True)  # whichever compilers there are
    with StopRequest() as stop:
        train.train(resolve(config, f"{FLAGS}{flags}".split()), World(), stop)
    assert count.frame_count == 1, f"{count.frame_count} compilations in 17 steps"


def network(flags: str = "") -> InPrecision:
    s = resolve(config, f"{FLAGS}{flags}".split()).settings
    return InPrecision(place(build_model(s, 10).train(), CPU, torch.bfloat16), CPU, torch.bfloat16)


def test_the_loss_with_the_network_inside_it_is_one_graph_too(count):
    diffusion, inner = build_diffusion(resolve(config, FLAGS.split()).settings), network()
    losses_of = torch.compile(lambda *batch: diffusion.training_losses(inner, *batch))
    for _ in range(3):
        x_0 = torch.randn(4, 3, 16, 16)
        losses_of(x_0, torch.randint(1000, (4,)), torch.randn_like(x_0), None).mean().backward()
    assert count.frame_count == 1


def test_sampling_compiles_once_whatever_the_sampler(count):
    diffusion, compiled = build_diffusion(resolve(config, FLAGS.split()).settings), torch.compile(network().eval())
    for sampler in SAMPLERS:
        diffusion.sample(compiled, (4, 3, 16, 16), sampler, steps=4)
    assert count.frame_count == 1


def test_eval_mode_costs_one_compilation_more_and_the_way_back_none(count):
    compiled, x, t = torch.compile(network("--dropout 0.1")), torch.zeros(4, 3, 16, 16), torch.full((4,), 7)
    compiled(x, t, None)
    with eval_mode(compiled), torch.no_grad():
        compiled(x, t + 1, None)
    assert count.frame_count == 2
    compiled(x, t + 2, None)
    assert count.frame_count == 2


# --- and these are caught ---------------------------------------------------------------------------------


def test_a_value_asked_for_inside_the_network_is_caught(count):
    stem = network().model.stem
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        torch.compile(lambda x: stem(x) * (2.0 if x.mean().item() > 0 else 1.0))(torch.zeros(1, 3, 16, 16))


def test_a_python_number_that_changes_with_the_step_is_caught(count):
    stem = network().model.stem
    scaled = torch.compile(lambda x, lr: stem(x) * lr)
    for step in range(3):
        scaled(torch.zeros(1, 3, 16, 16), 1e-4 / (step + 1))
    assert count.frame_count > 1
