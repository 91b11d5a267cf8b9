"""What the benchmarks share: facts and ceilings of the machine, timing in turns, FLOPs, memory, the table, the JSON lines."""

import contextlib
import ctypes
import functools
import gc
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import config
from src.images import Images
from src.model import Upsample
from src.runtime.device import computes_in_bf16, describe, synchronize
from src.runtime.flags import FOLDER, TRUTH, FlagParser, Rule, text
from src.runtime.settings import RULES, Settings, resolve
from src.utils import UserError, make_folder, writing_to

ROOT = Path(__file__).parent.parent
Flag = tuple[str, Rule, str, Any]  # its name, rule, comment and default
Row = dict[str, Any]  # figures by column or JSON key

# For --tiny: small enough for a CPU to go through every line in seconds, and as many kinds of layers as the default.
TINY = "--unet_dim 32 --dim_mults 1,2 --num_res_blocks 1 --image_size 16 --attention_resolutions 8"


# --- flags and settings -------------------------------------------------------------------------------------------


def main(script: str, doc: str | None, flags: Sequence[Flag], measure: Callable[[SimpleNamespace], None]) -> int:
    """Read the flags, those that every benchmark has included, and measure. Returns the exit code."""
    usage = f"python -m benchmarks.{script} [--flag VALUE ...]"
    parser = FlagParser(f"-m benchmarks.{script}", usage=usage, description=doc)
    common: list[Flag] = [
        ("--device", RULES["DEVICE"], "auto, cuda, mps, cpu (default: auto)", "auto"),
        ("--tiny", TRUTH, "a small network and few rounds: does it run?", False),
        ("--results", FOLDER, "where the JSON lines are kept (default: benchmarks/results)", str(ROOT / "benchmarks/results")),
    ]
    for flag, rule, comment, default in [*flags, *common]:
        parser.add(flag, rule, comment, default=default)
    try:
        chosen = SimpleNamespace(script=script, **parser.parse(sys.argv[1:]))
        make_folder(Path(chosen.results), "--results")
        measure(chosen)
    except UserError as error:
        print(f"benchmarks.{script}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


TRAIN_FLAGS: Flag = (
    "--train_flags",
    text("flags of train.py in one string, tied by '=': --train_flags='--dim_mults 1,2'", r".*", "FLAGS"),
    "flags of train.py that change the network or the training",
    "",
)


def some_of(words: Iterable[str]) -> Rule:
    """A rule for a flag that takes one or more of the words."""
    words = tuple(words)

    def accept(value: Any) -> tuple[str, ...]:
        chosen = tuple(word for word in str(value).split(",") if word)
        if not set(chosen) <= set(words):
            raise ValueError
        return chosen

    return Rule(f"some of {', '.join(words)}, separated by commas", accept, "WORD,WORD")


def settings_for(flags: SimpleNamespace, **changes: Any) -> Settings:
    """The settings of config.py with --tiny, --train_flags, --device and changes, by flag, on top."""
    words = [*shlex.split(TINY if flags.tiny else ""), *shlex.split(getattr(flags, "train_flags", ""))]
    changes = {"device": flags.device} | changes
    return resolve(config, words + [f"--{name}={value}" for name, value in changes.items()]).settings


def random_images(count: int, size: int) -> Images:
    """A dataset of noise in memory, made in no time: what the pixels show does not matter to the clock."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return Images(pixels, torch.arange(count) % 10, list("0123456789"), list("0123456789"), Path())


# --- the machine --------------------------------------------------------------------------------------------------


def hardware(device: torch.device) -> str:
    """The GPU's name, or the model name of the CPU."""
    if device.type != "cpu":
        return describe(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@functools.cache
def commit() -> str:
    """The commit of this working tree, "-dirty" where a file differs from it. Where there is no git, as in a copy of the
    files alone, the environment variable COMMIT may say."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results")  # results do not change what is measured
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "unknown")


def facts(script: str, device: torch.device) -> Row:
    """What every JSON line begins with."""
    typed = [word for before, word in zip(sys.argv, sys.argv[1:]) if "--results" not in (before, word.partition("=")[0])]
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{script}", *typed]),  # but for where the lines go
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def ceilings(device: torch.device, dtype: torch.dtype, tiny: bool = False) -> Row:
    """What the machine can do at best: a large matmul in `dtype`, in TFLOP/s, and a large copy, in GB/s read and written.
    The fastest of ten, as neighbours and throttling only ever take away."""
    on_gpu = device.type == "cuda"
    side, count = (128, 2**16) if tiny else (8192, 2**29) if on_gpu else (2048, 2**26)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(count, device=device)
    target = torch.empty_like(source)
    calls = 10 if on_gpu else 1  # between two looks at the clock

    def fastest(call: Callable[[], object]) -> float:
        return min(seconds_per_call(call, calls, device) for _ in range(11))  # the first warms up

    matmul, copy = fastest(lambda: a @ b), fastest(lambda: target.copy_(source))
    return {"matmul_tflops": 2 * side**3 / matmul / 1e12, "copy_gb_per_second": 2 * 4 * count / copy / 1e9}


def ceiling_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if computes_in_bf16(device) else torch.float32


# --- time, memory, FLOPs ------------------------------------------------------------------------------------------


def seconds_per_call(call: Callable[[], object], calls: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def alternate(
    contestants: Mapping[str, Callable[[], object]], rounds: int, calls: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds per call of each contestant in each round. In every round each has its turn, and every other round goes
    backwards, so that whatever slows the machine down slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        for name in list(contestants)[:: 1 if turn % 2 == 0 else -1]:
            if device.type == "cuda" and len(contestants) > 1:
                contestants[name]()  # not timed: it takes its memory back from the one before
            seconds[name].append(seconds_per_call(contestants[name], calls, device))
    return seconds


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def spread(name: str, values: Sequence[float]) -> Row:
    """{name: median, name_quartiles: [lower, upper]}, for a JSON line."""
    low, middle, high = quartiles(values)
    return {name: middle, f"{name}_quartiles": [low, high]}


def ratios(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Round by round, so that a slow round, which is slow for both, leaves the ratio as it is."""
    return [value / other for value, other in zip(values, others)]


class PeakMemory:
    """`with PeakMemory(device) as memory:` ..., then memory.gib is the most that was taken inside, over what was taken
    before. Of a GPU, or of this process on Linux; None elsewhere."""

    gib: float | None = None

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            self.before = self.resident(reset=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.gib = (torch.cuda.max_memory_allocated(self.device) - self.before) / 2**30
        elif self.before:
            self.gib = (self.resident() - self.before) / 2**30

    @staticmethod
    def resident(reset: bool = False) -> int:
        """The largest resident size of this process since the last reset, in bytes; 0 where it cannot be told."""
        try:
            if reset:
                ctypes.CDLL("libc.so.6").malloc_trim(0)  # what others freed would be taken again unseen
                Path("/proc/self/clear_refs").write_text("5")
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
        except (OSError, AttributeError, StopIteration):  # not Linux, another libc, no leave to
            return 0


def forward_gflop(model: nn.Module, image_size: int) -> float:
    """Of one image, forward, 2 x MAC, in GFLOP. On tensors without values, so that it takes no time. model: on the CPU.
    The network's work as written: what a device can save of it is its speed."""
    counter = FlopCounterMode(display=False)
    with contextlib.ExitStack() as held:
        held.enter_context(torch.no_grad())
        held.enter_context(patch.object(Upsample, "short_cut_on", ()))
        held.enter_context(sdpa_kernel(SDPBackend.MATH))  # as products, which every version of torch counts
        held.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        held.enter_context(counter)
        model(torch.empty(1, 3, image_size, image_size), torch.empty(1, dtype=torch.int64))
    return counter.get_total_flops() / 1e9


# --- what comes out -----------------------------------------------------------------------------------------------


def report(flags: SimpleNamespace, device: torch.device, columns: Mapping[str, str], rows: Sequence[Row], **about: Any) -> None:
    """Print the table below a line of facts, and append the rows to SCRIPT.jsonl.

    columns: {title: key or format of the row's figures, as in "{seconds:.2f}"}.   about: figures that hold for all rows.
    """
    known = facts(flags.script, device)
    path = Path(flags.results) / f"{flags.script}.jsonl"
    with writing_to(path.parent, "--results"), open(path, "a") as file:
        for row in rows:
            file.write(json.dumps(known | {"tiny": flags.tiny} | about | row) + "\n")
    print(", ".join([*header(known, about), *(["tiny: these figures mean nothing"] if flags.tiny else [])]))
    print(table(columns, rows), flush=True)


def header(known: Row, about: Row) -> list[str]:
    said = [known["hardware"], f"{known['threads']} threads", f"torch {known['torch']}"]
    if "matmul_tflops" in about:
        said += [f"matmul {about['matmul_tflops']:.3g} TFLOP/s", f"copy {about['copy_gb_per_second']:.3g} GB/s"]
    return [*said, f"commit {known['commit']}", f"{known['date']} UTC"]


def table(columns: Mapping[str, str], rows: Iterable[Row]) -> str:
    """Markdown. A figure that a row lacks, or that is None, is a dash."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(cell(form, row) for form in columns.values()) + " |")
    return "\n".join(lines)


def cell(form: str, row: Row) -> str:
    if "{" not in form:
        form = f"{{{form}}}"
    try:
        return form.format_map(row)
    except (KeyError, TypeError):
        return "-"
