"""All that is to be measured on one GPU, by order of worth, in half an hour.

    python -m benchmarks.gpu_half_hour
    python -m benchmarks.gpu_half_hour --minutes 9    # again and again: it goes on with the first row that is not done

After each row results/gpu_half_hour.jsonl has its outcome, and gpu_half_hour.md all outcomes and what the commands printed.
Rows of another commit or machine do not count as done. A row at its limit is stopped as by Ctrl-C and counts as done: the
benchmarks write each figure at once. To do a row again, delete its line.
"""

import json
import shlex
import subprocess
import sys
import tempfile
import time

from benchmarks import common
from benchmarks.common import Args, Table
from src.runtime.device import pick_device

STEP = "-m benchmarks.train_step --rounds 5"
TRAIN = "train.py --preset h100 --dataset shapes --epochs 1000"
ROWS = [  # name, seconds at most, what to run; the benchmarks print Markdown tables
    ("correct", 180, "-m pytest -q -m gpu tests"),
    ("throughput", 210, f"{STEP} --peers --batches 16 64 256"),
    ("profile, batch 256", 100, "-m benchmarks.profile_step --batch 256"),
    ("profile, batch 16", 100, "-m benchmarks.profile_step --batch 16"),
    (
        "variants, batch 256",
        210,
        f"{STEP} --peers --batches 256 --variants lean layout cudnn-benchmark no-mix-order step-noise",
    ),
    ("variants, batch 16", 210, f"{STEP} --peers --batches 16 --variants graphs loss-graphs shadow lean"),
    ("the loop of train.py", 120, TRAIN),
    ("pictures", 150, "-m benchmarks.sample --rounds 2"),
    ("peers", 180, f"{STEP} --batches 16 256"),
    ("data", 40, "-m benchmarks.data"),
]
TINY = {  # added to them with --tiny; the last of two flags counts
    "-m pytest": "--collect-only",
    "-m benchmarks.train_step": "--tiny --rounds 1 --batches 2 --variants eager",
    "-m benchmarks": "--tiny",
    "train.py": f"{common.TINY} --max_steps 2 --num_samples 2 --preview_steps 2 --val_images 8",
}


def command(args: Args, words: str, folder: str) -> list[str]:
    """What to run, and Ctrl-C for it at the limit. folder: for what train.py writes."""
    if args.tiny:
        words += " " + next(flags for start, flags in TINY.items() if words.startswith(start))
    if "benchmarks" in words:
        words += f" --device {args.device} --results {shlex.quote(str(args.results))}"
    if "train.py" in words:
        words += f" --device {args.device} --checkpoint_path {folder}/c --output_path {folder}/o --log_path {folder}/l"
    return [sys.executable, *shlex.split(words)]


def measure(args: Args) -> None:
    end, table = time.monotonic() + 60 * args.minutes, Table("gpu_half_hour", args, pick_device(args.device))
    lines = table.path.read_text().splitlines() if table.path.exists() else []
    facts = ("hardware", "commit", "tiny")
    table.rows = [row for row in map(json.loads, lines) if all(row[fact] == table.about[fact] for fact in facts)]
    for name, seconds, words in ROWS:
        if name in {row["row"] for row in table.rows}:
            continue
        if (left := end - time.monotonic()) < seconds:
            print(f"{left:.0f} s are left, too few for '{name}'. The same command goes on there.")
            break
        start, limit = time.monotonic(), ["timeout", "--signal=INT", "--kill-after=20", str(seconds)]
        with tempfile.TemporaryDirectory() as folder:
            ran = subprocess.run(limit + command(args, words, folder), capture_output=True, text=True)
        outcome = {0: "done", 124: "stopped at its limit"}.get(ran.returncode, f"failed ({ran.returncode})")
        spent, said = time.monotonic() - start, ran.stdout[-10_000:] + ran.stderr[-2_000:] * bool(ran.returncode)
        table.add(row=name, outcome=outcome, seconds=spent, run=f"python {words}", said=said)
        print(f"{name}: {outcome}, {spent:.0f} s", flush=True)
        rows = [f"| {row['row']} | {row['outcome']} | {row['seconds']:.0f} | `{row['run']}` |" for row in table.rows]
        parts = [f"## {row['row']}\n\n{row['said']}" for row in table.rows]
        header = [str(table.about), "", "| row | outcome | seconds | command |", "|---|---|---|---|"]
        table.path.with_suffix(".md").write_text("\n".join([*header, *rows, "", *parts]))


FLAGS: common.Flags = {"minutes": dict(type=float, default=25, help="no row starts that may end later (default: 25)")}

if __name__ == "__main__":
    sys.exit(common.main("gpu_half_hour", __doc__, measure, FLAGS))
