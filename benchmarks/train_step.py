"""How fast is one training step, ours and other libraries', in turns on the same machine, as a Markdown table.

    python -m benchmarks.train_step
    python -m benchmarks.train_step --apart
    python -m benchmarks.train_step --batches 16,64,256 --only ours,diffusers --variants graphs,loss

Peers that are not installed (pip install -r requirements-bench.txt) are left out. Models of unequal size compare by GFLOP/s:
pictures per second times the FLOPs of a training step, three times the forward pass. "ours / this" is the ratio of that.
"""

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import torch
from torch import nn

from benchmarks.common import (
    TRAIN_FLAGS,
    PeakMemory,
    Row,
    alternate,
    ceiling_dtype,
    ceilings,
    forward_gflop,
    main,
    quartiles,
    random_images,
    ratios,
    report,
    settings_for,
    some_of,
    spread,
)
from benchmarks.ours import VARIANTS, Step
from benchmarks.peers import MODES, STEPS, UNETS, is_installed
from src.model import parameter_count
from src.runtime.build import build_model
from src.runtime.device import is_out_of_memory, pick_device, synchronize
from src.runtime.flags import TRUTH, text, whole, wholes
from src.runtime.settings import Settings

SHARE_OF_MEMORY = 0.7  # of a GPU, up to which all contestants stay in it together

COLUMNS = {
    "batch": "batch",
    "what": "name",
    "params": "{params_millions:.1f}M",
    "GFLOP/img": "{forward_gflop:.1f}",
    "img/s": "{images_per_second:,.2f}",
    "ms/step": "{milliseconds:,.1f} ({milliseconds_quartiles[0]:,.1f} to {milliseconds_quartiles[1]:,.1f})",
    "GFLOP/s": "{gflop_per_second:,.0f}",
    "ours / this": "{ours_per_flop:.2f}",
    "of matmul": "{share_of_matmul:.0%}",
    "GiB": "{peak_gib:.2f}",
    "s to first step": "{seconds_to_first_step:.1f}",
}


@dataclass(eq=False)
class Contestant:
    """A way to take a training step: how to make it, and what was measured of it."""

    name: str
    make: Callable[[], Callable[[], object]]
    params: int
    gflop: float  # forward, of one image
    seconds: list[float] = field(default_factory=list)  # per step, by round
    first: float = 0.0  # seconds from nothing to the end of the first step
    gib: float | None = None

    def start(self, device: torch.device) -> Callable[[], object]:
        """Build it and take the first steps."""
        with PeakMemory(device) as memory:
            start = time.perf_counter()
            step = self.make()
            step()
            synchronize(device)
            self.first = self.first or time.perf_counter() - start  # of two starts, the one that found no caches
            for _ in range(3 if device.type == "cuda" else 0):  # CUDA graphs are recorded in the second and third
                step()
            synchronize(device)
        self.gib = memory.gib if not isinstance(step, Apart) else None
        return step


def contestants(flags: SimpleNamespace, s: Settings, device: torch.device) -> Iterator[Contestant]:
    """Ours, its variants, and the peers that are installed."""
    images = random_images(max(4096, s.BATCH_SIZE) if not flags.tiny else 8 * s.BATCH_SIZE, s.IMAGE_SIZE)
    if "ours" in flags.only:
        size = size_of(build_model(s, len(images.classes)), s)
        for variant in (None, *flags.variants):
            name = f"ours, {variant}" if variant else "ours"
            yield Contestant(name, partial(Step, s, device, images, variant), *size)
    for peer in STEPS:
        if peer not in flags.only:
            continue
        if not is_installed(peer):
            print(f"{peer} is not installed and left out: pip install -r requirements-bench.txt", file=sys.stderr)
            continue
        size = size_of(UNETS[peer](s), s)
        x_0, _ = images.to(device).batch(torch.arange(s.BATCH_SIZE))
        for mode in flags.modes:
            yield Contestant(f"{peer}, {mode}", partial(STEPS[peer], s, x_0, mode), *size)


class Apart:
    """A contestant in a process of its own, one step a call. On a CPU the way in which memory is asked for is the process's:
    src/__init__.py sets it for ours, and peers go without, as their scripts do."""

    def __init__(self, name: str, batch: int):
        words = [*sys.argv[1:], "--serve", name, "--batches", str(batch)]
        own = {} if name.startswith("ours") else {"THP_MEM_ALLOC_ENABLE": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.train_step", *words],
            env=os.environ | own,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self) -> None:
        print(file=self.process.stdin, flush=True)
        if not self.process.stdout.readline():  # type: ignore[union-attr]
            raise RuntimeError(f"its process ended with {self.process.wait()}")


def serve(contestant: Contestant, device: torch.device) -> None:
    """What the other end of Apart does: a step for each line."""
    step = contestant.make()
    for _ in sys.stdin:
        step()
        synchronize(device)
        print("done", flush=True)


def size_of(model: nn.Module, s: Settings) -> tuple[int, float]:
    return parameter_count(model), forward_gflop(model, s.IMAGE_SIZE)


def race(entered: list[Contestant], rounds: int, steps: int, device: torch.device) -> str:
    """Measure all of them: in turns where all fit into memory together, else one after the other, there and back.
    Returns which it was."""
    running, fit = start_together(entered, device)
    if fit:
        for name, seconds in alternate(running, rounds, steps, device).items():
            next(c for c in entered if c.name == name).seconds = seconds
        return "in turns"
    how_many = f"{len(running)} of {len(entered)} fit together"
    running.clear()
    for order in (1, -1):
        for contestant in entered[::order]:
            release(device)
            if step := attempt(contestant, entered, device, alone=True):
                contestant.seconds += alternate({contestant.name: step}, -(-rounds // 2), steps, device)[contestant.name]
            step = None  # nothing of it may be held when the next one starts
    return f"one after the other, there and back ({how_many})"


def start_together(entered: list[Contestant], device: torch.device) -> tuple[dict[str, Callable[[], object]], bool]:
    """The steps of as many contestants as memory holds at once, and whether these are all."""
    running: dict[str, Callable[[], object]] = {}
    room = torch.cuda.mem_get_info(device)[1] / 2**30 * SHARE_OF_MEMORY if device.type == "cuda" else float("inf")
    for contestant in list(entered):
        step = attempt(contestant, entered, device, alone=not running)
        if step:
            running[contestant.name] = step
        is_out_of_room = sum(c.gib or 0.0 for c in entered) > room and len(entered) > 1
        if is_out_of_room or (step is None and contestant in entered):
            return running, False
    return running, True


def attempt(
    contestant: Contestant, entered: list[Contestant], device: torch.device, alone: bool
) -> Callable[[], object] | None:
    """The contestant's step. One that fails is named and struck from the list, lest it take the others' figures with it;
    one that runs out of memory only where it is alone."""
    try:
        return contestant.start(device)
    except Exception as error:  # whatever another library or a compiler may raise
        if alone or not is_out_of_memory(error):
            reason = (str(error).strip().splitlines() or [""])[0]
            print(f"{contestant.name} is left out: {type(error).__name__}: {reason}", file=sys.stderr)
            entered[:] = [c for c in entered if c is not contestant]
    return None


def release(device: torch.device) -> None:
    """Give back what nobody holds any more, compiled code and its CUDA graphs among it."""
    torch.compiler.reset()  # also, else a second batch size would be compiled for any size
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def rows(entered: list[Contestant], batch: int, matmul_tflops: float) -> list[Row]:
    ours = next((c for c in entered if c.name == "ours"), None)
    found = []
    for c in entered:
        speed = batch / quartiles(c.seconds)[1]
        row = {
            "batch": batch,
            "name": c.name,
            "params_millions": c.params / 1e6,
            "forward_gflop": c.gflop,
            "images_per_second": speed,
            **spread("milliseconds", [1000 * seconds for seconds in c.seconds]),
            "gflop_per_second": speed * 3 * c.gflop,
            "share_of_matmul": speed * 3 * c.gflop / 1000 / matmul_tflops,
            "peak_gib": c.gib,
            "seconds_to_first_step": c.first,
            "rounds": len(c.seconds),
        }
        if ours:
            times = ratios(c.seconds, ours.seconds)
            row |= spread("ours_per_image", times) | spread("ours_per_flop", [x * ours.gflop / c.gflop for x in times])
        found.append(row)
    return found


def measure(flags: SimpleNamespace) -> None:
    device = pick_device(flags.device)
    on_gpu = device.type == "cuda"
    rounds = flags.rounds or (2 if flags.tiny else 7)
    steps = flags.steps or (10 if on_gpu and not flags.tiny else 1)
    about = ceilings(device, ceiling_dtype(device), flags.tiny) if not flags.serve else {}
    found = []
    for batch in flags.batches or ((2,) if flags.tiny else (16, 64, 256) if on_gpu else (8,)):
        s = settings_for(flags, batch_size=batch)
        entered = list(contestants(flags, s, device))
        if flags.serve:
            return serve(next(c for c in entered if c.name == flags.serve), device)
        if flags.apart:
            for contestant in entered:
                contestant.make = partial(Apart, contestant.name, batch)
        order = race(entered, rounds, steps, device)
        print(f"batch {batch}: {len(entered)} contestants {order}", file=sys.stderr)
        found += [row | {"order": order} for row in rows(entered, batch, about["matmul_tflops"])]
        del entered
        release(device)
    report(flags, device, COLUMNS, found, steps_per_round=steps, **about)


FLAGS = [
    ("--batches", wholes("one or more whole numbers", 1), "pictures a step (default: 16,64,256 on CUDA, else 8)", None),
    ("--only", some_of(["ours", *STEPS]), "whom to measure (default: all)", ("ours", *STEPS)),
    ("--modes", some_of(MODES), "how peers run: script, best (default: both)", MODES),
    ("--variants", some_of(VARIANTS), "ours compiled in other ways as well (default: none)", ()),
    ("--rounds", whole(1), "turns of each (default: 7)", None),
    ("--steps", whole(1), "steps in a turn (default: 10 on CUDA, else 1)", None),
    ("--apart", TRUTH, "each contestant in a process of its own; GiB is then unknown (default: false)", False),
    (
        "--serve",
        text("the name of a contestant", r".+", "NAME"),
        "what --apart starts: a step for each line of stdin",
        None,
    ),
    TRAIN_FLAGS,
]

if __name__ == "__main__":
    sys.exit(main("train_step", __doc__, FLAGS, measure))
