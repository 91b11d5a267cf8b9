"""Train `--preset nature` on one GPU for a few minutes, wider than a CPU can, and draw by it. docs/gpu.md says how to use it.

    python -m benchmarks.gpu_train --minutes 4 --data_path .travel/ten

It takes the largest width whose weights fill at most 16 MB in half precision and that sees 2 million pictures in that time, by
the speed that benchmarks.gpu wrote to the same folder. Then it times some steps of it: train.py takes as many as fit, so that
the learning rate has decayed when the minutes end.
"""

import math
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import config
from benchmarks import common
from benchmarks.common import Args, Table
from benchmarks.gpu import limited
from benchmarks.train_step import Step
from src.model import parameter_count
from src.runtime.build import build_model
from src.runtime.device import pick_device
from src.runtime.settings import Settings, resolve

CLASSES, PICTURES, BYTES, BATCH = 10, 2e6, 16e6, 128
SHARE = 0.5  # of the default network's FLOP/s that a narrow network reaches: an estimate, which decides nothing but the width
BEFORE, AFTER = 25, 25  # seconds that train.py takes up to its first step, and that export.py and sample.py take


def recipe(args: Args, gflops: float) -> tuple[list[str], Settings]:
    """Flags of train.py and their settings, of the width that the text above names. gflops: of the default network, a second.
    The learning rate goes with the square root of the batch and with 1 / width: usual rules, not tried here."""
    nature = resolve(config, ["--preset=nature"]).settings
    seconds, chosen = 60 * args.minutes - 2 * BEFORE - AFTER, (list[str](), nature)
    for width in range(nature.UNET_DIM, 257, 8):
        lr = nature.LEARNING_RATE * math.sqrt(BATCH / nature.BATCH_SIZE) * nature.UNET_DIM / width
        words = common.flags_for(args, preset="nature", unet_dim=width, batch_size=BATCH, learning_rate=f"{lr:.2g}")
        s = resolve(config, words).settings
        model = build_model(s, CLASSES)
        pictures = SHARE * gflops * seconds / (3 * common.forward_gflop(model, s.IMAGE_SIZE))
        if width > nature.UNET_DIM and (2 * parameter_count(model) > BYTES or pictures < PICTURES):
            break
        chosen = words, s
    return chosen


def measure(args: Args) -> None:
    end, device, out = time.monotonic() + 60 * args.minutes, pick_device(args.device), args.results
    known = [row["gflop_per_second"] for row in Table("train_step", args, device).past() if row["name"] == "ours"]
    gflops = max(known) if known else 400 * common.matmul_tflops(device, args.tiny)  # 40%: an estimate
    words, s = recipe(args, gflops)
    step = Step(s, device, common.random_images(4096, s.IMAGE_SIZE))
    first = common.seconds_per_call(step, 1, device)  # compiles: train.py finds the result in the cache on disk
    seconds = common.seconds_per_call(step, 2 if args.tiny else 50, device)
    del step
    torch.cuda.empty_cache()
    steps = max(1, int((end - time.monotonic() - BEFORE - AFTER) / seconds))
    words += [f"--max_steps={steps}", f"--data_path={args.data_path}", "--save_every=100000", "--save_minutes=0.2"]
    words += [f"--{name}_every={steps * s.BATCH_SIZE // 5000 // times + 1}" for name, times in (("val", 12), ("sample", 4))]
    with tempfile.TemporaryDirectory() as folder, open(out / "gpu_train.txt", "a") as said:

        def run(limit: float, *words: str) -> None:
            limited(limit, [sys.executable, *words], stdout=said, stderr=subprocess.STDOUT)

        places = [f"--{name}_path={folder}/{name}" for name in ("checkpoint", "output", "log")]
        run(end - AFTER - time.monotonic(), "train.py", *words, *places)
        source = f"--checkpoint={folder}/checkpoint/{s.RUN}/latest.pth"
        run(60, "export.py", source, f"--output_dir={folder}/export", "--weights_only", "--dtype=fp16")
        drawing = [f"--num_samples={20 if args.tiny else 200}", f"--guidance={s.guidance}", "--npz", f"--device={args.device}"]
        run(60, "sample.py", source, f"--output_dir={folder}/sample", *drawing)
        for pattern in ("export/weights.pth", "sample/grid.png", "sample/samples.npz", "log/*/events*"):
            for path in Path(folder).glob(pattern):
                shutil.copy(path, out)
        losses, loop = (common.curve(Path(folder, "log", s.RUN), tag) for tag in ("loss/val", "speed/images_per_second"))
    reached = max(step for step, _ in [(0, 0.0), *losses, *loop])
    figures = {"width": s.UNET_DIM, "params_millions": parameter_count(build_model(s, CLASSES)) / 1e6}
    figures |= {"seconds_to_first_step": first, "images_per_second": s.BATCH_SIZE / seconds}
    figures |= {"loop_images_per_second": statistics.median([value for _, value in loop] or [0.0])}
    figures |= {"steps": reached, "planned": steps, "pictures": reached * s.BATCH_SIZE}
    Table("gpu_train", args, device, recipe=shlex.join(words), validation_losses=losses).add(**figures)
    print((out / "gpu_train.txt").read_text()[-3000:])


FLAGS = {
    "minutes": dict(type=float, default=4, help="for all, from the start to the last file (default: 4)"),
    "data_path": dict(type=Path, required=True, help="Tiny ImageNet, or its ten classes from benchmarks.pack"),
}

if __name__ == "__main__":
    sys.exit(common.main("gpu_train", __doc__, measure, FLAGS))
