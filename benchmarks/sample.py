"""Seconds to draw pictures with each sampler, ours and diffusers', in turns, as a Markdown table.

    python -m benchmarks.sample --count 4 --most_steps 4

The weights are random. diffusers' loop is that of its pipelines. "script" is float32; "best" adds bf16, channels_last and, on
CUDA, torch.compile. A sampler of more than --most_steps is measured on a path of so many; the rest is extrapolated.
"""

import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Args, Table
from benchmarks.train_step import MODES, diffusers_unet, prepared
from src.noise import PictureNoise
from src.runtime.build import build_diffusion, build_model
from src.runtime.device import InPrecision, pick_device, pick_precision, place, should_compile
from src.runtime.pipeline import DEFAULT_STEPS
from src.runtime.settings import Settings
from src.utils import UserError, to_uint8

SAMPLERS = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "dpm++": "DPMSolverMultistepScheduler"}  # ours: diffusers'


def ours(s: Settings, device: torch.device, shape: tuple[int, ...]) -> Callable[[str, int], Tensor]:
    """(sampler, steps) -> uint8 pictures, as sample.py draws them."""
    dtype = pick_precision(s.PRECISION, device)
    network: Callable = InPrecision(place(build_model(s, 10).eval().requires_grad_(False), device, dtype), device, dtype)
    network = torch.compile(network) if should_compile(s.COMPILE, device) else network
    diffusion, noise = build_diffusion(s).to(device), PictureNoise(0, range(shape[0]), shape[1:], device)  # type: ignore[arg-type]
    return lambda sampler, steps: to_uint8(diffusion.sample(network, shape, sampler, steps, noise=noise))


def theirs(s: Settings, device: torch.device, shape: tuple[int, ...], mode: str) -> Callable[[str, int], Tensor]:
    import diffusers

    network = prepared(diffusers_unet(s).eval().requires_grad_(False), device, mode)

    @torch.no_grad()
    def draw(sampler: str, steps: int) -> Tensor:
        scheduler = getattr(diffusers, SAMPLERS[sampler])(num_train_timesteps=s.TIME_STEPS)
        scheduler.set_timesteps(steps, device=device)
        x = torch.randn(shape, device=device)
        for t in scheduler.timesteps:
            x = scheduler.step(network(scheduler.scale_model_input(x, t), t).sample.float(), t, x).prev_sample
        return to_uint8(x)

    return draw


def measure(args: Args) -> None:
    if args.modes and not find_spec("diffusers"):
        raise UserError("diffusers is not installed: pip install -r requirements-bench.txt, or measure ours alone with --modes")
    device, s = pick_device(args.device), common.settings_for(args)
    shape = (args.count or (2 if args.tiny else 64), 3, s.IMAGE_SIZE, s.IMAGE_SIZE)
    most = args.most_steps or (2 if args.tiny else s.TIME_STEPS if device.type == "cuda" else 5)
    draws = {"ours": ours(s, device, shape)}
    if should_compile(s.COMPILE, device):
        draws["ours, eager"] = ours(common.settings_for(args, compile="false"), device, shape)
    draws |= {f"diffusers, {mode}": theirs(s, device, shape, mode) for mode in args.modes}
    table = Table("sample", args, device)
    for sampler in args.samplers:
        steps = DEFAULT_STEPS.get(sampler, s.TIME_STEPS)
        measured = min(steps, most)
        few = min(2, measured)  # the first call compiles, picks kernels
        first = {name: common.seconds_per_call(partial(draw, sampler, few), 1, device) for name, draw in draws.items()}
        calls = {name: partial(draw, sampler, measured) for name, draw in draws.items()}
        for name, times in (seconds := common.in_turns(calls, args.rounds, 1, device)).items():
            figures = {"sampler": sampler, "steps": steps, "steps_measured": measured, "count": shape[0], "name": name}
            figures |= common.spread("seconds", [x * steps / measured for x in times])
            figures |= {"seconds_of_first_call": first[name]}
            table.add(**figures, **common.spread("over_ours", times, seconds["ours"]), rounds=args.rounds)


FLAGS: common.Flags = {
    "count": dict(type=int, help="pictures, drawn at once (default: 64)"),
    "samplers": dict(nargs="+", choices=SAMPLERS, default=list(SAMPLERS), help="default: all"),
    "modes": dict(nargs="*", choices=MODES, default=list(MODES), help="how diffusers runs (default: both)"),
    "most_steps": dict(type=int, help="steps measured at most (default: all on CUDA, else 5)"),
    "rounds": dict(type=int, default=3, help="turns of each (default: 3)"),
}

if __name__ == "__main__":
    sys.exit(common.main("sample", __doc__, measure, FLAGS))
