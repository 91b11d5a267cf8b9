"""Which program draws best after equal time? Ours, diffusers and denoising-diffusion-pytorch ("lucidrains"), one core each.

    python -m benchmarks.equal_time --minutes 60 --data_path data/tiny-imagenet-200

docs/recipes.md says how each trains and draws. "our rate": with the learning rate and the average of ours. Each trains in one
process and draws in another. The same command goes on with what is missing. OUTPUT_PATH/equal_time gets all, and a sheet.png.
"""

import hashlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import config
from benchmarks import common
from benchmarks.common import Args, Call, Table
from benchmarks.gpu import limited
from benchmarks.judge import Judge
from benchmarks.train_step import PEERS, UNETS, Step
from src.dataset import DeviceImages
from src.diffusion import SCHEDULES, GaussianDiffusion
from src.ema import EMA
from src.model import parameter_count
from src.noise import PictureNoise
from src.runtime.build import build_batches, build_diffusion, build_model, open_images
from src.runtime.checkpoint import TO_DRAW, load_checkpoint
from src.runtime.settings import Settings, resolve
from src.runtime.sheets import sheet
from src.utils import atomic_file, save_png, to_uint8
from train import learning_rate

# Flags of train.py. Peers' networks are those of train_unconditional.py and of lucidrains' README, to scale, with last levels
# that make them as large as ours. Other widths than multiples of 16 take twice the time on a CPU.
PROGRAMS: dict[str, dict[str, Any]] = {
    "ours": {},
    "diffusers": dict(unet_dim=16, dim_mults="1,1,2,4,5,5", num_res_blocks=2, attention_resolutions=4, batch_size=16),
    "lucidrains": dict(unet_dim=16, dim_mults="1,2,4,10", batch_size=16),
}
NAMES = ["ours", "diffusers", "lucidrains", "diffusers, our rate", "lucidrains, our rate"]
CPU = torch.device("cpu")


def flags_of(args: Args, name: str) -> list[str]:
    own = PROGRAMS[name.split(",")[0]]
    return common.flags_for(args, preset="nature", class_conditional="false", data_path=args.data_path, **own)


def fitting(step: Call, minutes: float) -> int:
    """How many steps fit into the minutes: a sixtieth of them is spent to find out."""
    common.seconds_per_call(step, 1, CPU)  # takes memory
    calls = max(1, int(minutes / common.seconds_per_call(step, 1, CPU)))
    return max(1, int(60 * minutes / common.seconds_per_call(step, calls, CPU)))


def train_ours(args: Args, s: Settings, words: list[str]) -> tuple[int, int, dict[str, Tensor]]:
    """Steps done and planned, and the average of the weights."""
    planned = fitting(Step(s, CPU, open_images(s, "train")), args.minutes)
    with tempfile.TemporaryDirectory() as folder:
        words += [f"--max_steps={planned}", "--val_every=100000", "--val_images=16", "--num_samples=1"]
        words += [f"--{place}_path={folder}/{place}" for place in ("checkpoint", "output", "log")]
        limited(60 * args.minutes + 60, [sys.executable, "train.py", *words], stdout=subprocess.DEVNULL)  # a minute to start
        state = load_checkpoint(Path(folder, "checkpoint", s.RUN, "latest.pth"), (*TO_DRAW, "step"))
    return state["step"], planned, state["ema"]


def train_peer(args: Args, s: Settings, name: str) -> tuple[int, int, dict[str, Tensor]]:
    program, batches = name.split(",")[0], build_batches(s, DeviceImages(open_images(s, "train"), CPU))
    rehearsal = PEERS[program](UNETS[program](s), s)
    planned = fitting(lambda: rehearsal.step(batches(0, 0).x_0), args.minutes)
    peer = PEERS[program](UNETS[program](s), s, planned)
    if name.endswith("our rate"):
        own = float(peer.rate.base_lrs[0])
        rate = LambdaLR(peer.optimizer, lambda step: learning_rate(s, step, planned) / own)
        ema = EMA(peer.module, s.EMA_DECAY)
        peer = peer._replace(rate=rate, averaged=ema.model, update_average=lambda: ema.update(rate.last_epoch - 1))
    end, step = time.monotonic() + 60 * args.minutes, 0
    while step < planned and time.monotonic() < end:
        peer.step(batches(step, 0).x_0)
        step += 1
    return step, planned, peer.averaged.state_dict()


def draw(args: Args, s: Settings, program: str, network: Any) -> dict[str, Tensor]:
    """Pictures by our dpm++ and by the peer's own sampler, each [--count, 3, S, S] uint8."""
    predict, diffusion, own = network, build_diffusion(s), cast(Any, None)
    if program == "diffusers":
        from diffusers import DDPMPipeline, DDPMScheduler

        pipeline: Any = DDPMPipeline(network, DDPMScheduler())
        own = partial(pipeline, num_inference_steps=2 if args.tiny else 1000, output_type="pt", return_dict=False)
        predict, diffusion = lambda x, t, y: network(x, t).sample, GaussianDiffusion(s.TIME_STEPS, "linear", "eps")
    if program == "lucidrains":
        from denoising_diffusion_pytorch.denoising_diffusion_pytorch import sigmoid_beta_schedule

        network.sampling_timesteps = 2 if args.tiny else 250
        SCHEDULES["sigmoid"], own = sigmoid_beta_schedule, lambda count: [network.sample(count)]
        predict, diffusion = lambda x, t, y: network.model(x, t), GaussianDiffusion(s.TIME_STEPS, "sigmoid", "v")
    drawn: dict[str, list[Tensor]] = {"dpm++": [], "own sampler": []}
    for rows in torch.arange(args.count).split(50):
        noise = PictureNoise(0, rows.tolist(), (3, s.IMAGE_SIZE, s.IMAGE_SIZE), CPU)
        drawn["dpm++"].append(diffusion.sample(predict, noise(0).shape, "dpm++", 20, noise=noise))
        drawn["own sampler"] += [2 * own(len(rows))[0] - 1] if own else []
    return {way: to_uint8(torch.cat(parts)) for way, parts in drawn.items() if parts}


def train(args: Args, name: str, file: Path) -> None:
    """Keeps in the file what the contestant's row says of its training, and the average of its weights."""
    torch.manual_seed(0)
    words, start = flags_of(args, name), time.monotonic()
    s = resolve(config, words).settings
    steps, planned, weights = train_ours(args, s, words) if name == "ours" else train_peer(args, s, name)
    row = {"name": name, "steps": steps, "planned": planned, "pictures_seen": steps * s.BATCH_SIZE}
    with atomic_file(file) as out:
        torch.save((row | {"minutes_in_all": (time.monotonic() - start) / 60}, weights), out)


def judged(args: Args, name: str, file: Path) -> dict[str, Any]:
    """The row of a contestant that has trained."""
    torch.manual_seed(0)
    program, s = name.split(",")[0], resolve(config, flags_of(args, name)).settings
    row, weights = torch.load(file, weights_only=True)
    network = build_model(s, 0) if program == "ours" else PEERS[program](UNETS[program](s), s).averaged
    network.load_state_dict(weights)
    row["params_millions"] = parameter_count(network) / 1e6
    pictures = draw(args, s, program, network.eval().requires_grad_(False))
    torch.save(pictures, file.with_name(f"{name}.pt"))
    val, judge = open_images(s, "val"), Judge(s, args.tiny)
    real = torch.from_numpy(val[torch.linspace(0, len(val) - 1, args.count).long().numpy()])
    for what, images in ({"own sampler": pictures["dpm++"]} | pictures | {"real validation pictures": real}).items():
        row[f"frechet, {what}"] = judge(images)["frechet"]
    return row


def measure(args: Args) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the contestants
    asked = {name: getattr(args, name) for name in ("minutes", "count", "data_path", "train_flags")} | {"threads": 1}
    folder = Path(resolve(config, flags_of(args, "ours")).settings.OUTPUT_PATH, "equal_time")
    table = Table("equal_time", args, CPU, **asked)
    done = {row["name"] for row in table.past() if asked.items() <= row.items()}

    how = [value for fact, value in table.about.items() if fact not in ("command", "date", "count")]  # else it trains anew
    key = hashlib.sha256(repr(how).encode()).hexdigest()[:8]

    def process(work: Callable, name: str, file: Path) -> Any:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(work, args, name, file).result()

    def enter(name: str) -> Future:
        if not (file := folder / f"{name}-{key}.pt").exists():
            process(train, name, file)
        return cores.submit(lambda: table.add(**process(judged, name, file)))

    with ThreadPoolExecutor(args.jobs) as cores:  # drawing begins where a core has nothing to train
        waiting = [name for name in NAMES if name not in done or not (folder / f"{name}.pt").exists()]
        for drawing in list(cores.map(enter, waiting)):
            drawing.result()  # raises what it raised
    saved = {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in NAMES}
    drawn = [(name, way, images[:10]) for name in NAMES for way, images in saved[name].items()]
    titles = [title for name, way, images in drawn for title in [name, way, *[""] * 8][: len(images)]]
    save_png(sheet(torch.cat([images for _, _, images in drawn]), titles, 10), folder / "sheet.png")


FLAGS = {
    "minutes": dict(type=float, default=60, help="of training, for each contestant (default: 60)"),
    "data_path": dict(required=True, help="Tiny ImageNet, or its ten classes from benchmarks.pack"),
    "count": dict(type=int, default=200, help="pictures drawn by each sampler (default: 200)"),
    "jobs": dict(type=int, default=1, help="contestants at once, a core each (default: 1)"),
}

if __name__ == "__main__":
    sys.exit(common.main("equal_time", __doc__, measure, FLAGS))
