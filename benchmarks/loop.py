"""What the loop of train.py costs over the bare step: data, noise, guard, meter, logging, as a Markdown table.

    python -m benchmarks.loop
    python -m benchmarks.loop --train_flags="--preset demo" --steps 20

The real main() of train.py runs in this process on a dataset of noise. Where it asks for the first batch of a stretch of
steps it is held up, and as many bare steps are timed: the same network on a batch that lies on the device, forward, loss,
backward, clipping, Adam, average. So stretches of both alternate, and each of the loop's is compared with the mean of the
bare ones before and behind it. What comes once an epoch or every ten minutes is left out: held-out loss, grids, saving.
"""

import contextlib
import io
import shlex
import sys
import tempfile
import time
from types import SimpleNamespace
from unittest.mock import patch

import torch
from src.images import Images

import train
from benchmarks.common import (
    TINY,
    TRAIN_FLAGS,
    main,
    random_images,
    report,
    seconds_per_call,
    settings_for,
    spread,
)
from benchmarks.ours import Step
from src.dataset import Batch, TrainBatches
from src.runtime.device import pick_device, synchronize
from src.runtime.flags import whole
from src.runtime.settings import Settings
from src.utils import UserError

COLUMNS = {
    "batch": "batch",
    "loop img/s": "{loop_images_per_second:,.2f}",
    "bare img/s": "{bare_images_per_second:,.2f}",
    "loop over bare": "{overhead_percent:+.1f}% ({overhead_percent_quartiles[0]:+.1f} to {overhead_percent_quartiles[1]:+.1f})",
    "stretches": "{rounds} of {steps} steps",
}


class Enough(BaseException):
    """Ends the loop from inside, past all that would handle an error."""


class Stopwatch:
    """Stands in for TrainBatches.__call__ while train.py runs, and keeps seconds per step of both."""

    def __init__(self, s: Settings, images: Images, device: torch.device, rounds: int, steps: int):
        self.settings, self.images, self.device, self.rounds, self.steps = s, images, device, rounds, steps
        self.draw = TrainBatches.__call__  # the real one
        self.loop: list[float] = []
        self.bare: list[float] = []
        self.step: Step | None = None
        self.start = 0.0

    def __call__(self, batches: TrainBatches, step: int, micro: int) -> Batch:
        if step % self.steps == 0 and micro == 0:
            synchronize(self.device)
            if step > 0:
                self.loop.append((time.perf_counter() - self.start) / self.steps)
            self.time_bare_steps()
            if len(self.loop) > self.rounds:  # the first stretch warmed up
                raise Enough
            self.start = time.perf_counter()
        return self.draw(batches, step, micro)

    def time_bare_steps(self) -> None:
        if self.step is None:
            self.step = Step(self.settings, self.device, self.images)
            self.batch = self.draw(self.step.batches, 0, 0)
            for _ in range(3):
                self.step.bare(self.batch)
        self.bare.append(seconds_per_call(lambda: self.step.bare(self.batch), self.steps, self.device))  # type: ignore[union-attr]

    def overheads(self) -> list[float]:
        """Of each stretch of the loop over its bare neighbours, in percent."""
        around = [(before + behind) / 2 for before, behind in zip(self.bare[1:], self.bare[2:])]
        return [100 * (loop / bare - 1) for loop, bare in zip(self.loop[1:], around)]


def measure(flags: SimpleNamespace) -> None:
    device = pick_device(flags.device)
    rounds = flags.rounds or (2 if flags.tiny else 10)
    steps = flags.steps or (2 if flags.tiny or device.type != "cuda" else 50)
    log_every = min(steps, settings_for(flags).LOG_EVERY)  # each stretch logs at least once
    s = settings_for(flags, save_minutes=0, log_every=log_every, **({"batch_size": 2} if flags.tiny else {}))
    if s.GRAD_ACCUM_STEPS > 1:
        raise UserError("benchmarks.loop compares steps of one pass; leave out --grad_accum_steps.")
    images = random_images((rounds + 2) * steps * s.BATCH_SIZE, s.IMAGE_SIZE)  # one epoch, which never ends
    watch = Stopwatch(s, images, device, rounds, steps)
    with tempfile.TemporaryDirectory() as folder:
        words = shlex.split(f"{TINY if flags.tiny else ''} {flags.train_flags}")
        words += [f"--batch_size={s.BATCH_SIZE}", f"--log_every={log_every}", "--save_minutes=0", f"--device={flags.device}"]
        words += [f"--{name}_path={folder}/{name}" for name in ("checkpoint", "output", "log")]
        with (
            patch.object(sys, "argv", ["train.py", *words]),
            patch.object(train, "prepare", lambda *_, **__: images),
            patch.object(train, "obtain_tiny_imagenet", lambda *_, **__: None),
            patch.object(TrainBatches, "__call__", lambda *of_batch: watch(*of_batch)),
            contextlib.redirect_stdout(io.StringIO()) as said,
            contextlib.suppress(Enough),
        ):
            code = train.main()
            raise UserError(f"train.py ended before its time with exit code {code}: {said.getvalue().strip()[-300:]}")
    row = {
        "batch": s.BATCH_SIZE,
        **spread("loop_images_per_second", [s.BATCH_SIZE / seconds for seconds in watch.loop[1:]]),
        **spread("bare_images_per_second", [s.BATCH_SIZE / seconds for seconds in watch.bare[1:]]),
        **spread("overhead_percent", watch.overheads()),
        "rounds": rounds,
        "steps": steps,
    }
    report(flags, device, COLUMNS, [row])


FLAGS = [
    ("--rounds", whole(1), "stretches of each (default: 10)", None),
    ("--steps", whole(1), "steps in a stretch (default: 50 on CUDA, else 2)", None),
    TRAIN_FLAGS,
]

if __name__ == "__main__":
    sys.exit(main("loop", __doc__, FLAGS, measure))
