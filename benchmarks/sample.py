"""Seconds to draw pictures with each sampler, ours and diffusers', in turns, as a Markdown table.

    python -m benchmarks.sample
    python -m benchmarks.sample --count 4 --most_steps 10

Random weights: time does not depend on them. diffusers' loop is that of its pipelines: scheduler.step of what the UNet
predicts, its "script" in float32 as a pipeline does it, its "best" in bf16 by autocast, channels_last, compiled on CUDA.
Where --most_steps is fewer than a sampler takes, the first so many are measured, the rest is extrapolated, and the row
says so.
"""

import itertools
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch

from benchmarks.common import (
    TRAIN_FLAGS,
    Row,
    alternate,
    main,
    quartiles,
    ratios,
    report,
    settings_for,
    some_of,
    spread,
)
from benchmarks.peers import MODES, Mode, diffusers_unet, is_installed
from src.pictures import PictureNoise, to_uint8
from src.runtime.build import build_diffusion, build_model
from src.runtime.device import InPrecision, pick_device, pick_precision, place, should_compile
from src.runtime.flags import whole
from src.runtime.pipeline import DEFAULT_STEPS
from src.runtime.settings import Settings

SAMPLERS = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "dpm++": "DPMSolverMultistepScheduler"}  # ours: diffusers'

COLUMNS = {
    "sampler": "sampler",
    "steps": "steps",
    "what": "name",
    "pictures": "count",
    "seconds": "{seconds:,.2f} ({seconds_quartiles[0]:,.2f} to {seconds_quartiles[1]:,.2f})",
    "measured": "measured",
    "ours / this": "{ours_over_this:.2f}",
}

Draw = Callable[[str, int, int], object]  # (sampler, its steps, how many of them to take) -> pictures


def ours(s: Settings, device: torch.device, count: int) -> Draw:
    """As sample.py does it, from noise to uint8."""
    model = build_model(s, 10)
    place(model.eval().requires_grad_(False), device)
    network: Callable = InPrecision(model, device, pick_precision(s.PRECISION, device))
    if should_compile(s.COMPILE, device):
        network = torch.compile(network)
    diffusion = build_diffusion(s).to(device)
    shape = (3, s.IMAGE_SIZE, s.IMAGE_SIZE)

    def draw(sampler: str, steps: int, taken: int) -> torch.Tensor:
        noise = PictureNoise(0, range(count), shape, device)
        path = diffusion.trajectory(network, (count, *shape), sampler, steps, noise=noise)
        for x, _ in itertools.islice(path, taken):  # noqa: B007 (the last one is the result)
            pass
        return to_uint8(x)

    return draw


def theirs(s: Settings, device: torch.device, count: int, mode: str) -> Draw:
    """As diffusers' pipelines do it, but for the PIL images at the end."""
    import diffusers

    way = Mode(mode, device)
    network = way.compile(way.place(diffusers_unet(s).eval().requires_grad_(False)))

    @torch.no_grad()
    def draw(sampler: str, steps: int, taken: int) -> torch.Tensor:
        scheduler = getattr(diffusers, SAMPLERS[sampler])(num_train_timesteps=s.TIME_STEPS)
        scheduler.set_timesteps(steps, device=device)
        x = torch.randn(count, 3, s.IMAGE_SIZE, s.IMAGE_SIZE, device=device)
        for t in scheduler.timesteps[:taken]:
            with way.precision():
                prediction = network(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(prediction.float(), t, x).prev_sample
        return to_uint8(x)

    return draw


def measure(flags: SimpleNamespace) -> None:
    device = pick_device(flags.device)
    s = settings_for(flags)
    count = flags.count or (2 if flags.tiny else 64)
    rounds = flags.rounds or (2 if flags.tiny else 3)
    most = flags.most_steps or (2 if flags.tiny else s.TIME_STEPS if device.type == "cuda" else 5)
    draws = {"ours": ours(s, device, count)}
    if is_installed("diffusers"):
        draws |= {f"diffusers, {mode}": theirs(s, device, count, mode) for mode in flags.modes}
    else:
        print("diffusers is not installed and left out: pip install -r requirements-bench.txt", file=sys.stderr)
    found = []
    for sampler in flags.samplers:
        steps = DEFAULT_STEPS.get(sampler, s.TIME_STEPS)
        taken = min(steps, most)
        calls: dict[str, Callable[[], object]] = {name: partial(draw, sampler, steps, taken) for name, draw in draws.items()}
        for draw in draws.values():  # compiles, picks kernels
            draw(sampler, steps, min(2, taken))
        seconds = {name: [x * steps / taken for x in times] for name, times in alternate(calls, rounds, 1, device).items()}
        for name, times in seconds.items():
            row: Row = {
                "sampler": sampler,
                "steps": steps,
                "name": name,
                "count": count,
                **spread("seconds", times),
                "measured": "all" if taken == steps else f"{taken} steps, extrapolated",
                "steps_measured": taken,
                "ours_over_this": quartiles(ratios(seconds["ours"], times))[1],
                "rounds": rounds,
            }
            found.append(row)
    report(flags, device, COLUMNS, found)


FLAGS = [
    ("--count", whole(1), "pictures, drawn at once (default: 64)", None),
    ("--samplers", some_of(SAMPLERS), "which (default: all)", tuple(SAMPLERS)),
    ("--modes", some_of(MODES), "how diffusers runs: script, best (default: both)", MODES),
    ("--most_steps", whole(1), "steps measured at most (default: all on CUDA, else 5)", None),
    ("--rounds", whole(1), "turns of each (default: 3)", None),
    TRAIN_FLAGS,
]

if __name__ == "__main__":
    sys.exit(main("sample", __doc__, FLAGS, measure))
