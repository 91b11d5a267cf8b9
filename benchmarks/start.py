"""Seconds from typing the command to the first optimizer step, as a Markdown table. Real processes in a temporary folder.

    python -m benchmarks.start
    python -m benchmarks.start --train_flags="--dataset shapes --image_size 64"

The clock stops when latest.pth is there, which --max_steps writes right behind the step: the time to save is counted in.
First start: no decoded pictures, and no compiled kernels. Second start: both are there, the checkpoint folder is new.
Resumed: one step more in the same folder. No download is measured, so the dataset must be there or be shapes.
"""

import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from benchmarks.common import ROOT, TINY, TRAIN_FLAGS, main, report, spread
from src.runtime.device import pick_device
from src.runtime.flags import whole
from src.utils import UserError

COLUMNS = {
    "start": "name",
    "seconds": "{seconds:.1f} ({seconds_quartiles[0]:.1f} to {seconds_quartiles[1]:.1f})",
    "whole process": "{process_seconds:.1f}",
    "rounds": "rounds",
}
STARTS = ("first", "second", "resumed")
LOOK_EVERY = 0.01  # seconds
PATIENCE = 540  # seconds


def seconds_to_step(folder: Path, run: str, max_steps: int, words: list[str]) -> tuple[float, float]:
    """Run train.py until step number max_steps: seconds until it is saved, and until the process ends."""
    paths = {"checkpoint": folder / run, "output": folder / run, "log": folder / run / "logs", "cache": folder / "cache"}
    command = [sys.executable, str(ROOT / "train.py"), *words, f"--max_steps={max_steps}"]
    command += [f"--{name}_path={path}" for name, path in paths.items()]
    latest = folder / run / "latest.pth"
    before = written(latest)
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}  # where kernels are kept
    with open(folder / "said.txt", "w+") as said:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)
        try:
            while written(latest) in (None, before) and process.poll() is None:
                if time.perf_counter() - start > PATIENCE:
                    raise UserError(f"train.py took no step within {PATIENCE} s.")
                time.sleep(LOOK_EVERY)
            seconds = time.perf_counter() - start
            process.wait(PATIENCE)
        finally:
            process.kill()
            process.wait()
        if process.returncode or written(latest) in (None, before):
            said.seek(0)
            raise UserError(f"train.py ended with exit code {process.returncode}: {said.read().strip()[-500:]}")
    return seconds, time.perf_counter() - start


def written(path: Path) -> tuple[int, int] | None:
    """What tells one file of that name from the next."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def measure(flags: SimpleNamespace) -> None:
    device = pick_device(flags.device)
    rounds = flags.rounds or (1 if flags.tiny else 3)
    settings = f"--dataset shapes {TINY} --batch_size 2 --num_workers 0" if flags.tiny else flags.train_flags
    words = [*shlex.split(settings), f"--device={flags.device}"]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in STARTS}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name, run, max_steps in zip(STARTS, ("1", "2", "2"), (1, 1, 2)):
                found[name].append(seconds_to_step(Path(folder), run, max_steps, words))
    rows = [
        {
            "name": name,
            **spread("seconds", [seconds for seconds, _ in times]),
            **spread("process_seconds", [seconds for _, seconds in times]),
            "rounds": rounds,
        }
        for name, times in found.items()
    ]
    report(flags, device, COLUMNS, rows, settings=settings)


FLAGS = [
    ("--rounds", whole(1), "how often each (default: 3)", None),
    (*TRAIN_FLAGS[:2], "flags of train.py in one string (default: --preset demo)", "--preset demo"),
]

if __name__ == "__main__":
    sys.exit(main("start", __doc__, FLAGS, measure))
