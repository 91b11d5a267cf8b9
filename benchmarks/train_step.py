"""How fast is one training step? Ours, ours changed in one place, and other libraries', as a Markdown table.

    python -m benchmarks.train_step --peers --variants plain no-QuickNorm --batches 4 --train_flags="--precision bf16"

On a CPU all are measured in turns; on a GPU one after the other, because not all fit into memory together. Networks of unequal
size compare by GFLOP/s: three forward passes an image. Other libraries (requirements-bench.txt) run as their own scripts do, in
float32: diffusers' train_unconditional.py with the flags that its README types, and the Trainer of denoising-diffusion-pytorch
("lucidrains"). Their images lie on the device already.
"""

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.profiler import profile

import config
from benchmarks import common
from benchmarks.common import Args, Call, Table
from benchmarks.lean import LeanResBlock
from src import model as plain
from src import noise
from src.dataset import DeviceImages, Images
from src.ema import EMA
from src.noise import PictureNoise
from src.runtime import kernels
from src.runtime.build import build_batches, build_diffusion, build_model, build_optimizer
from src.runtime.device import InPrecision, peak_memory, pick_device, pick_precision, place, should_compile
from src.runtime.monitor import Meter
from src.runtime.settings import Settings, resolve
from src.samplers import SAMPLERS
from src.utils import to_uint8


class Step:
    """step() is one optimizer step of train.py, from the batch to the average; a test compares the weights. A variant changes
    `network`, `losses` or the modules of `model` in a step that is built."""

    def __init__(self, s: Settings, device: torch.device, images: Images, variant: str = "as train.py"):
        dtype = pick_precision(s.PRECISION, device)
        self.settings, self.step = s, 0
        self.model = place(build_model(s, len(images.classes)).train(), device, dtype)
        self.ema, self.diffusion = EMA(self.model, s.EMA_DECAY), build_diffusion(s).to(device)
        self.optimizer = build_optimizer(s, self.model)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.batches = build_batches(s, DeviceImages(images, device))
        self.meter = Meter(s.TIME_STEPS, device)
        self.eager = InPrecision(self.model, device, dtype)
        self.network: Callable = torch.compile(self.eager) if should_compile(s.COMPILE, device) else self.eager
        self.losses: Callable = lambda *batch: self.diffusion.training_losses(self.network, *batch)
        VARIANTS[variant](self)

    def __call__(self) -> None:
        s, step = self.settings, self.step
        self.optimizer.param_groups[0]["lr"] = s.LEARNING_RATE * min(1.0, (step + 1) / max(1, s.WARMUP_STEPS))
        torch.manual_seed(noise.seed(s.SEED, noise.DROPOUT, step, 0))
        for micro in range(s.GRAD_ACCUM_STEPS):
            batch = self.batches(step, micro)
            torch.compiler.cudagraph_mark_step_begin()  # only variants with CUDA graphs need it
            losses = self.losses(*batch)
            self.scaler.scale(losses.mean() / s.GRAD_ACCUM_STEPS).backward()
            self.meter.add(losses, batch.t)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), s.GRAD_CLIP or math.inf)
        self.optimizer.found_inf = self.meter.add_norm(norm, step + 1)  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(step)
        self.step += 1


def swap(step: Step, old: type | tuple[type, ...], new: type | None = None) -> None:
    """Modules of a class become `new`, or else the plain modules that kernels.py found there."""
    found = [module for module in step.model.modules() if isinstance(module, old)]
    assert found, "the step has no such modules on this device in this precision"
    for module in found:
        module.__class__ = new or next(base for base in type(module).__mro__ if not issubclass(base, old))


def compile_anew(step: Step, part: str = "network", **options: Any) -> None:
    """torch.compile over "network", or over "losses" with the network inside."""
    step.network = step.eager
    setattr(step, part, torch.compile(getattr(step, part), **options))


SWAPS = tuple(c for c in vars(kernels).values() if isinstance(c, type) and issubclass(c, nn.Module))

# What is not decided yet, and what each swap of kernels.py gains. name: function that changes a built step.
VARIANTS: dict[str, Callable[[Step], None]] = {
    "as train.py": lambda step: None,
    "plain": partial(swap, old=SWAPS),
    **{f"no-{quick.__name__}": partial(swap, old=quick) for quick in SWAPS},
    "lean": partial(swap, old=plain.ResBlock, new=LeanResBlock),
    "four-product": partial(swap, old=plain.Upsample, new=kernels.FourProductUpsample),
    "eager": lambda step: setattr(step, "network", step.eager),
    "graphs": partial(compile_anew, mode="reduce-overhead"),
    "loss-graphs": partial(compile_anew, part="losses", mode="reduce-overhead"),
    "layout": partial(compile_anew, options={"force_layout_optimization": True}),
    "no-mix-order": partial(compile_anew, options={"triton.mix_order_reduction": False}),  # pytorch issue #193061
    "cudnn-benchmark": lambda step: setattr(torch.backends.cudnn, "benchmark", True),
}

DRAWN = 20  # steps of a sampler that are timed; a thousand take fifty times as long


def diffusers_unet(s: Settings) -> Any:
    """UNet2DModel with the channels, blocks and attention of ours; its step enters by addition, its own default."""
    from diffusers import UNet2DModel

    has_attention = [s.IMAGE_SIZE >> level in s.ATTENTION_RESOLUTIONS for level in range(len(s.DIM_MULTS))]
    return UNet2DModel(
        sample_size=s.IMAGE_SIZE,
        block_out_channels=[s.UNET_DIM * mult for mult in s.DIM_MULTS],
        layers_per_block=s.NUM_RES_BLOCKS,
        down_block_types=["AttnDownBlock2D" if there else "DownBlock2D" for there in has_attention],
        up_block_types=["AttnUpBlock2D" if there else "UpBlock2D" for there in reversed(has_attention)],
        attention_head_dim=min(64, s.UNET_DIM // 2),
        norm_num_groups=s.UNET_DIM // 4,
    )


def lucidrains_unet(s: Settings) -> Any:
    from denoising_diffusion_pytorch import Unet

    mults = (1, 2, 3, 6) if s.DIM_MULTS == (1, 2, 3, 4) else s.DIM_MULTS  # as large as ours: 86.5M beside 92.0M
    return Unet(dim=s.UNET_DIM, dim_mults=mults, attn_heads=max(1, min(4, s.UNET_DIM // 16)))  # 4 at the width 64 of its README


class Peer(NamedTuple):
    """What another library's script trains, and the average of its weights. loss: of x_0 [B, 3, S, S] in [-1, 1]."""

    module: nn.Module
    averaged: nn.Module
    loss: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    rate: torch.optim.lr_scheduler.LRScheduler
    update_average: Call

    def step(self, x_0: Tensor) -> None:
        loss = self.loss(x_0)
        loss.item()  # both log it every step
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad()
        self.update_average()


def diffusers_peer(unet: Any, s: Settings, last_step: int = 10_000) -> Peer:
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    weights, averaged = list(unet.train().parameters()), deepcopy(unet).eval().requires_grad_(False)
    average = EMAModel(weights, decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)
    average.shadow_params = list(averaged.parameters())  # so that they are a network
    scheduler = cast(Any, DDPMScheduler(num_train_timesteps=s.TIME_STEPS))

    def loss(x_0: Tensor) -> Tensor:
        eps, t = torch.randn_like(x_0), torch.randint(0, s.TIME_STEPS, (len(x_0),), device=x_0.device)
        return F.mse_loss(unet(scheduler.add_noise(x_0, eps, t), t).sample, eps)

    optimizer = torch.optim.AdamW(weights, 1e-4, (0.95, 0.999), 1e-8, 1e-6)
    rate = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=last_step)
    return Peer(unet, averaged, loss, optimizer, rate, partial(average.step, weights))


def lucidrains_peer(unet: Any, s: Settings, last_step: int = 0) -> Peer:
    from denoising_diffusion_pytorch import GaussianDiffusion
    from ema_pytorch import EMA as Average

    diffusion = GaussianDiffusion(unet, image_size=s.IMAGE_SIZE, timesteps=s.TIME_STEPS, sampling_timesteps=250)  # of [0, 1]
    average = Average(diffusion.to(next(unet.parameters()).device).train(), beta=0.995, update_every=10)
    optimizer = torch.optim.Adam(unet.parameters(), 1e-4, (0.9, 0.99))
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return Peer(diffusion, average.ema_model, lambda x_0: diffusion((x_0 + 1) / 2), optimizer, rate, average.update)


PEERS: dict[str, Callable[..., Peer]] = {"diffusers": diffusers_peer, "lucidrains": lucidrains_peer}
UNETS: dict[str, Callable] = {"diffusers": diffusers_unet, "lucidrains": lucidrains_unet, "ours": lambda s: build_model(s, 10)}


def drawing(s: Settings, device: torch.device, sampler: str) -> Call:
    """Draws a batch of pictures by an untrained network, as sample.py does."""
    dtype, shape = pick_precision(s.PRECISION, device), (3, s.IMAGE_SIZE, s.IMAGE_SIZE)
    network: Callable = InPrecision(place(build_model(s, 10).eval().requires_grad_(False), device, dtype), device, dtype)
    network = torch.compile(network) if should_compile(s.COMPILE, device) else network
    diffusion, noise = build_diffusion(s).to(device), PictureNoise(0, range(s.BATCH_SIZE), shape, device)
    return lambda: to_uint8(diffusion.sample(network, (s.BATCH_SIZE, *shape), sampler, DRAWN, noise=noise))


def contestants(args: Args, s: Settings, device: torch.device) -> dict[str, Callable[[], Call]]:
    if args.draw:
        return {f"ours, {DRAWN} steps of {sampler}": partial(drawing, s, device, sampler) for sampler in args.draw}
    images = common.random_images(max(4096, s.BATCH_SIZE), s.IMAGE_SIZE)
    x_0, _ = DeviceImages(images, device).batch(torch.arange(s.BATCH_SIZE))
    entered: dict[str, Callable[[], Call]] = {} if args.alone else {"ours": partial(Step, s, device, images)}
    entered |= {f"ours, {name}": partial(Step, s, device, images, name) for name in args.variants}
    return entered | {name: lambda p=name: partial(PEERS[p](UNETS[p](s).to(device), s).step, x_0) for name in args.peers}


def race(args: Args, s: Settings, device: torch.device, table: Table) -> None:
    entered, on_gpu, ours = contestants(args, s, device), device.type == "cuda", list[float]()
    for group in [[name] for name in entered] if on_gpu else [list(entered)]:  # those that are in memory together
        running, first = dict[str, Call](), dict[str, float]()  # the group before is gone
        torch.compiler.reset()  # else a second batch size would be compiled for any size
        torch.backends.cudnn.benchmark = False  # a variant sets it
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        for name in group:
            try:
                start = time.perf_counter()
                running[name] = entered[name]()
                common.seconds_per_call(running[name], 1, device)
                first[name] = time.perf_counter() - start
                common.seconds_per_call(running[name], 3 if on_gpu else 1, device)  # CUDA graphs are recorded in these
            except Exception as error:  # whatever another library or a compiler may raise: the others keep their figures
                running.pop(name, None)
                print(f"{name} is left out: {type(error).__name__}: {error}", file=sys.stderr)
        seconds: dict[str, list[float]] = {name: [] for name in running}
        for turn in range(args.rounds):
            for name in list(running)[:: -1 if turn % 2 else 1]:  # every other round backwards: a drift of the machine cancels
                seconds[name].append(common.seconds_per_call(running[name], args.steps, device))
        ours = seconds.get("ours", ours)
        for name, times in seconds.items():
            model, passes = UNETS[name.split(",")[0]](s), DRAWN if args.draw else 3
            gflop, speed = common.forward_gflop(model, s.IMAGE_SIZE), s.BATCH_SIZE / statistics.median(times)
            figures = {"images_per_second": speed} | common.spread("milliseconds", [1000 * x for x in times])
            figures |= common.spread("over_ours", times, ours) if ours else {}
            figures |= {"forward_gflop": gflop, "gflop_per_second": speed * passes * gflop}
            figures |= {"share_of_matmul": speed * passes * gflop / 1000 / table.about["matmul_tflops"]}
            figures |= {"params_millions": plain.parameter_count(model) / 1e6, "seconds_to_first_step": first[name]}
            figures |= {"graphs_compiled": counters["inductor"]["fxgraph_cache_miss"]}  # so far, that were not in the cache
            figures |= {"peak_gib": peak_memory(device)} if on_gpu else {}
            table.add(batch=s.BATCH_SIZE, name=name, **figures, rounds=args.rounds)
            if args.profile:  # torch's table of where the time goes: kernels, or on a CPU operations
                with profile() as record:
                    common.seconds_per_call(running[name], args.steps, device)
                order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
                print(record.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90))


def measure(args: Args) -> None:
    device = pick_device(args.device)
    args.steps = args.steps or (10 if device.type == "cuda" and not args.tiny else 1)
    table = Table("train_step", args, device, steps_per_round=args.steps, matmul_tflops=common.matmul_tflops(device, args.tiny))
    for batch in args.batches or ((2,) if args.tiny else (16, 64, 256) if device.type == "cuda" else (8,)):
        words = [*common.flags_for(args), f"--batch_size={batch}", "--grad_accum_steps=1"]
        race(args, resolve(config, words).settings, device, table)


FLAGS = {
    "batches": dict(type=int, nargs="+", help="images a step (default: 16 64 256 on CUDA, else 8)"),
    "rounds": dict(type=int, default=7, help="turns of each (default: 7)"),
    "steps": dict(type=int, help="steps in a turn (default: 10 on CUDA, else 1)"),
    "variants": dict(nargs="*", choices=VARIANTS, default=[], help="ours, changed in one place"),
    "alone": dict(action="store_true", help="without ours as it is, which another run has measured"),
    "peers": dict(nargs="*", choices=PEERS, default=list(PEERS), help="other libraries (default: all)"),
    "draw": dict(nargs="*", choices=SAMPLERS, default=[], help=f"draw by {DRAWN} steps of these, and train nothing"),
    "profile": dict(action="store_true", help="print the kernels of each, by their time"),
}

if __name__ == "__main__":
    sys.exit(common.main("train_step", __doc__, measure, FLAGS))
