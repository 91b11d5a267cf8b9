"""What the benchmarks share: flags, a clock, the machine and its ceiling, FLOPs, and a table that is kept as JSON."""

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from src.dataset import Images
from src.runtime.device import computes_in_bf16, describe, synchronize
from src.runtime.signals import run_script

Args = argparse.Namespace
Call = Callable[[], object]
clock = time.perf_counter  # or --cpu_time

# For --tiny: every kind of layer that the default network has, in a size that takes a CPU milliseconds.
TINY = "--image_size 16 --unet_dim 32 --dim_mults 1,2 --num_res_blocks 1 --attention_resolutions 8 --batch_size 2"


def main(name: str, doc: str | None, measure: Callable[[Args], None], flags: Mapping[str, Any]) -> int:
    """Read the flags, name -> arguments of add_argument, and measure. Returns the exit code. Errors are those of train.py."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a small network and little work, to see that it runs")
    parser.add_argument("--cpu_time", action="store_true", help="count CPU seconds: on a busy machine, with OMP_NUM_THREADS=1")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON lines")
    parser.add_argument("--train_flags", default="", help="flags of train.py in one string: --train_flags='--unet_dim 64'")
    for flag, options in flags.items():
        parser.add_argument(f"--{flag}", **options)
    args = parser.parse_args()
    global clock
    clock = time.process_time if args.cpu_time else time.perf_counter
    return run_script(f"benchmarks.{name}", lambda _: measure(args), "Stopped.")


def flags_for(args: Args, **changes: Any) -> list[str]:
    """Flags of train.py: `changes`, then those of --tiny, then --train_flags. The last of two counts."""
    words = [f"--{name}={value}" for name, value in changes.items()] + [f"--device={args.device}"]
    return words + shlex.split(TINY if args.tiny else "") + shlex.split(args.train_flags)


def random_images(count: int, size: int) -> Images:
    """A dataset of noise in memory. What the images show does not change the time."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return Images(pixels, torch.arange(count) % 10, list("0123456789"), list("0123456789"), Path())


def seconds_per_call(call: Call, calls: int, device: torch.device) -> float:
    synchronize(device)
    start = clock()
    for _ in range(calls):
        call()
    synchronize(device)
    return (clock() - start) / calls


def spread(name: str, values: Sequence[float], others: Sequence[float] = ()) -> dict[str, Any]:
    """{name: median, name_quartiles: [lower, upper]} of the values, or of their ratios to others round by round: a slow
    round is slow for both."""
    values = [value / other for value, other in zip(values, others)] if others else values
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {name: middle, f"{name}_quartiles": [low, high]}


def forward_gflop(model: Callable, image_size: int) -> float:
    """2 x MAC of the forward pass of one image, on tensors without values. model: on the CPU, as written."""
    counter = FlopCounterMode(display=False)  # every version of torch counts MATH, attention as products
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FakeTensorMode(allow_non_fake_inputs=True), counter:
        model(torch.empty(1, 3, image_size, image_size), torch.empty(1, dtype=torch.int64))
    return counter.get_total_flops() / 1e9


def matmul_tflops(device: torch.device, tiny: bool) -> float:
    """What the machine can do at best: TFLOP/s of a large matrix product, in bf16 where the hardware has it. The fastest of ten
    calls counts, because neighbours only take time away."""
    side = 128 if tiny else 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device).to(torch.bfloat16 if computes_in_bf16(device) else torch.float32)
    return 2 * side**3 / min(seconds_per_call(lambda: a @ a, 1, device) for _ in range(11)) / 1e12


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) of each point that train.py drew, in its folder of TensorBoard events."""
    events = EventAccumulator(str(folder))
    found = folder.exists() and tag in events.Reload().Tags()["scalars"]
    return [(event.step, event.value) for event in events.Scalars(tag)] if found else []


class Table:
    """Rows of figures. `add` prints each and appends it to results/NAME.jsonl, so that a run that is cut short keeps what it
    has. about: figures that hold for all rows. Where there is no git, the environment variable COMMIT names the commit."""

    def __init__(self, name: str, args: Args, device: torch.device, **about: Any):
        self.path, self.columns = args.results / f"{name}.jsonl", list[str]()
        args.results.mkdir(parents=True, exist_ok=True)
        cpus = Path("/proc/cpuinfo").read_text() if device.type == "cpu" and sys.platform == "linux" else ""
        cpu = re.search(r"model name\s*: (.*)", cpus)
        commit = subprocess.getoutput("git rev-parse --short HEAD 2>/dev/null || echo ${COMMIT:-unknown}")
        changes = subprocess.getoutput("git status --porcelain -- . ':!benchmarks/results' 2>/dev/null")  # but for the figures
        self.about = {
            "command": shlex.join(["python", *sys.orig_argv[1:]]),
            "hardware": cpu[1] if cpu else describe(device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "commit": commit + "-dirty" * bool(changes),
            "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
            "tiny": args.tiny,
            **about,
        }

    def past(self) -> list[dict[str, Any]]:
        """The rows of earlier runs of this commit on this machine."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        facts = ("hardware", "torch", "commit", "tiny")
        return [row for row in map(json.loads, lines) if all(row[fact] == self.about[fact] for fact in facts)]

    def add(self, **row: Any) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(self.about | row) + "\n")
        if list(row) != self.columns:
            about = "" if self.columns else ", ".join(f"{name}: {text(value)}" for name, value in self.about.items()) + "\n"
            self.columns = list(row)
            print(f"{about}\n| " + " | ".join(self.columns) + " |\n|" + "---|" * len(self.columns))
        print("| " + " | ".join(map(text, row.values())) + " |", flush=True)


def text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return " to ".join(map(text, value)) if isinstance(value, list) else str(value)
