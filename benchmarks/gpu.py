"""All that is to be measured on one GPU, by order of worth, in the minutes that there are. docs/gpu.md says how to use it.

    python -m benchmarks.gpu --minutes 6 --data_path .travel/ten

Each row is a process with a limit of its own. What it prints goes to results/gpu.md while it runs, its outcome to gpu.jsonl,
the figures of a benchmark to lines of their own: what is cut keeps what it has. The same command goes on with the first row
that is not done by this commit on this machine. To do a row again, delete its line in gpu.jsonl.
"""

import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Args, Table
from src.runtime.device import pick_device

TESTS = "-m pytest -q -m gpu tests/test_gpu.py tests/test_dataset.py"
STEP = "-m benchmarks.train_step --rounds 3 --peers"
DRAW = "-m benchmarks.train_step --rounds 2 --steps 2 --peers --batches 64 --draw"
LOOP = "train.py --batch_size 256 --log_every 10 --val_every 1000 --max_steps 100000"
ROWS = [  # name, seconds at most, what to run
    ("correct", 60, f"{TESTS} -k 'not compiled'"),
    ("correct, compiled", 40, f"{TESTS} -k compiled"),
    ("our step", 90, f"{STEP} --batches 16 256 64"),
    ("pictures", 30, f"{DRAW} dpm++ ddpm"),
    ("pictures, eager", 20, f"{DRAW} dpm++ --train_flags='--compile false'"),
    ("the loop of train.py", 40, LOOP),
    ("profile, batch 256", 40, f"{STEP} --batches 256 --profile"),
    ("variants, batch 256", 60, f"{STEP} --alone --batches 256 --variants lean graphs layout"),
    ("peers, batch 16", 60, f"{STEP} diffusers lucidrains --alone --batches 16"),
    ("variants, batch 16", 90, f"{STEP} --alone --batches 16 --variants graphs lean loss-graphs"),
    ("peers, batch 256", 90, f"{STEP} diffusers lucidrains --alone --batches 256"),
    ("more variants", 120, f"{STEP} --alone --batches 256 --variants no-mix-order cudnn-benchmark eager"),
    ("profile, batch 16", 40, f"{STEP} --batches 16 --profile"),
]
TINY = {  # added to them with --tiny; the last of two flags counts
    "-m pytest": "--collect-only",
    "-m benchmarks.train_step": "--tiny --rounds 1 --batches 2 --variants eager",
    "train.py": f"{common.TINY} --max_steps 3 --log_every 1 --num_samples 2 --preview_steps 2 --val_images 8",
}
LEAST = 15  # seconds that are worth a start
CUT = "cut by the end of the minutes"


def command(args: Args, words: str, folder: str) -> list[str]:
    """What to run. folder: for what train.py writes."""
    if args.tiny:
        words += " " + next(flags for start, flags in TINY.items() if words.startswith(start))
    if "benchmarks" in words:
        words += f" --device {args.device} --results {shlex.quote(str(args.results))}"
    if "train.py" in words:
        words += f" --data_path {shlex.quote(str(args.data_path))}" if args.data_path else " --dataset shapes"
        words += f" --device {args.device} --cache_path {folder} --checkpoint_path {folder}/c --output_path {folder}/o"
        words += f" --log_path {folder}/logs"
    return [sys.executable, *shlex.split(words)]


def limited(seconds: float, words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run it, with Ctrl-C after so many seconds and a kill 10 later: the returncode is 124 or -9 then."""
    limit = ["timeout", "--signal=INT", "--kill-after=10", f"{max(1, seconds):.0f}"]
    return subprocess.run(limit + words, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}, **options)


def measure(args: Args) -> None:
    end, table = time.monotonic() + 60 * args.minutes, Table("gpu", args, pick_device(args.device))
    done = {row["row"] for row in table.past() if row["outcome"] != CUT}
    for name, seconds, words in [row for row in ROWS if row[0] not in done]:
        start = time.monotonic()
        if (left := end - start) < LEAST:
            print(f"{max(0, left):.0f} s are left. The same command goes on with '{name}'.")
            break
        with open(args.results / "gpu.md", "a") as report, tempfile.TemporaryDirectory() as folder:
            print(f"\n## {name}\n\n{table.about}\n\n`python {words}`\n", file=report, flush=True)
            ran = limited(min(seconds, left), command(args, words, folder), stdout=report, stderr=subprocess.PIPE)
            stopped = "stopped at its limit" if seconds <= left else CUT
            outcome = {0: "done", 124: stopped, -9: stopped}.get(ran.returncode, f"failed ({ran.returncode})")
            row: dict[str, Any] = {"row": name, "outcome": outcome, "seconds": time.monotonic() - start}
            if speeds := [value for _, value in common.curve(Path(folder, "logs"), "speed/images_per_second")]:  # of train.py
                row |= common.spread("images_per_second", speeds[2:] or speeds)  # it compiled before the first
            table.add(**row)
            print(f"{ran.stderr[-2000:] * bool(ran.returncode)}\n**{row}**", file=report)


FLAGS = {
    "minutes": dict(type=float, default=6, help="for all; the last row is cut there (default: 6)"),
    "data_path": dict(type=Path, help="Tiny ImageNet or a part of it, for the loop of train.py (default: shapes)"),
}

if __name__ == "__main__":
    sys.exit(common.main("gpu", __doc__, measure, FLAGS))
