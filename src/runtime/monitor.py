"""What a run tells while it goes on: means of the loss, TensorBoard curves and images, the progress bar or lines of text."""

import contextlib
import math
import os
import secrets
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary

from src.dataset import TrainBatches, ValidationBatches
from src.progress import Bar, Work
from src.runtime.checkpoint import preview_size
from src.runtime.device import peak_memory
from src.runtime.distributed import World
from src.runtime.resume import FREE
from src.runtime.settings import Settings, as_text
from src.utils import make_folders, printable, writing


class Meter:
    """Sums of the loss, by quarter of t, and of the gradient norm. They stay on the device: nothing waits until `read`.
    Values that are not finite are left out: under fp16 a step whose gradients overflow is skipped now and then."""

    def __init__(self, time_steps: int, device: torch.device, world: World = World()):
        self.time_steps, self.world = time_steps, world
        self.sums = torch.zeros(2, 4, device=device)  # loss, images
        self.norms = torch.zeros(2, device=device)  # gradient norm, steps
        self.bad_step = torch.full((), -1, device=device)  # the first whose gradient was not finite

    def add(self, losses: Tensor, t: Tensor) -> None:
        """losses: [B] float32.   t: [B] int64."""
        self.sums.index_add_(1, t * 4 // self.time_steps, torch.stack(finite(losses.detach())))

    def add_norm(self, norm: Tensor, step: int) -> Tensor:
        """norm: of the gradient of step number `step`. Returns 1.0 if it is not finite, else 0.0, on the device: what fused
        Adam reads from its attribute found_inf. Under fp16 GradScaler.step puts its own there for the call, to the same end."""
        value, is_finite = finite(norm)
        self.norms += torch.stack([value, is_finite])
        self.bad_step = torch.where((is_finite == 0) & (self.bad_step < 0), step, self.bad_step)
        return 1 - is_finite

    def collect(self) -> None:
        """Bring the losses of all processes together in the main process, which logs and saves."""
        self.world.sum(self.sums)
        if not self.world.is_main:
            self.sums.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """So that the first point after a resume is the mean that the uninterrupted run would have shown."""
        return {"sums": self.sums, "norms": self.norms}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.world.is_main:  # which has them for all
            self.sums.copy_(state["sums"])
        self.norms.copy_(state["norms"])

    def read(self) -> dict[str, float]:
        """The means since the last read, by TensorBoard tag. It waits for the device, and leaves out what has no value."""
        losses, images = self.sums.tolist()
        norm, steps = self.norms.tolist()
        self.sums.zero_()
        self.norms.zero_()
        totals = {"loss/train": (sum(losses), sum(images)), "optimizer/gradient_norm": (norm, steps)}
        ends = [-(-q * self.time_steps // 4) for q in range(5)]  # a name such as "t 250-499"; 0 is the least noise
        tags = [f"loss_by_t/t {first}-{end - 1}" for first, end in pairwise(ends)]
        totals |= {tag: (loss, n) for tag, loss, n in zip(tags, losses, images)}
        return {tag: total / count for tag, (total, count) in totals.items() if count}


def finite(values: Tensor) -> tuple[Tensor, Tensor]:
    """The values with 0 for those that are not finite, and 1 for each that is, else 0."""
    is_finite = values.isfinite()
    return values.where(is_finite, 0), is_finite.to(values.dtype)


class EventFile:
    """A file of TensorBoard events. Each is written by the caller, so that a full disk raises UserError here and not in a
    thread. purge_step: TensorBoard hides what earlier files of the folder have from this step on."""

    def __init__(self, folder: Path, purge_step: int | None = None, is_main: bool = True):
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
        self.folder = folder
        with writing(folder, "--log_path"):
            if is_main:
                make_folders(folder)
            self.records = RecordWriter(open(folder / name if is_main else os.devnull, "wb"))  # noqa: SIM115 (its user closes it)
        self.write(file_version="brain.Event:2")
        if purge_step:
            self.write(step=purge_step, session_log=SessionLog(status=SessionLog.START))
        self.flush()

    def write(self, **fields: Any) -> None:
        with writing(self.folder, "--log_path"):
            self.records.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def flush(self) -> None:
        with writing(self.folder, "--log_path"):
            self.records.flush()

    def scalar(self, step: int, tag: str, value: float) -> None:
        self.write(step=step, summary=summary.scalar(tag, value))

    def image(self, step: int, tag: str, image: Tensor) -> None:
        """image: [3, H, W] uint8."""
        self.write(step=step, summary=summary.image(tag, image, dataformats="CHW"))


class Monitor(contextlib.AbstractContextManager):
    """A run's TensorBoard events in LOG_PATH, and its progress bar, or lines of text where there is no terminal. In all
    processes but the main one they go nowhere. A run resumed after `first_step` steps hides what came past it before."""

    def __init__(self, s: Settings, world: World, device: torch.device, first_step: int, last_step: int, work: Work = float):
        self.device, self.is_main, self.images_per_step = device, world.is_main, s.BATCH_SIZE * s.GRAD_ACCUM_STEPS
        self.events = EventFile(s.folder("LOG_PATH"), first_step + 1, world.is_main)
        kept = {name: value for name, value in asdict(s).items() if name not in FREE - {"EPOCHS", "PRECISION"}}
        rows = "".join(f"| --{name.lower()} | {printable(as_text(value))} |\n" for name, value in kept.items())
        self.events.write(step=first_step, summary=summary.text("settings", f"| name | value |\n|---|---|\n{rows}"))
        self.bar = Bar(total=last_step, initial=first_step, unit="step", disable=not world.is_main, work=work)
        self.restart_clock(first_step)

    def restart_clock(self, step: int) -> None:
        """Leave what happened since the last point (saving, previews) out of the images per second."""
        self.clock, self.clock_step = time.perf_counter(), step

    def log(self, step: int, values: dict[str, float]) -> None:
        """A point of every curve after `step` steps, and the bar's figures."""
        speed = (step - self.clock_step) * self.images_per_step / max(time.perf_counter() - self.clock, 1e-9)
        memory = peak_memory(self.device)
        for tag, value in (values | {"speed/images_per_second": speed, "speed/peak_memory_GiB": memory}).items():
            self.events.scalar(step, tag, value)
        figures = f"loss {values.get('loss/train', math.nan):.4f}, {speed:,.1f} images/s, {memory:.1f} GiB"
        self.bar.set_postfix_str(figures, refresh=False)
        self.restart_clock(step)

    def track(self, task: str, items: Any) -> Iterable:
        """The items, with a bar of their own below the run's."""
        return Bar(items, desc=task, unit="batch", leave=False, disable=not self.is_main)

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        with contextlib.suppress(OSError):  # all that matters was flushed before the last save
            self.events.records.close()


def work_of(s: Settings, world: World, batches: TrainBatches, val_batches: ValidationBatches, last_step: int) -> Work:
    """What the first n steps cost this process, in network calls on one image: a training image costs three, a validation one
    for each draw, a preview one for each step of each picture of both networks. The time to go follows from it."""
    every, draws = s.VAL_EVERY * batches.steps_per_epoch, sum(map(len, val_batches.draws))
    sheets = math.prod(preview_size(s, last_step))

    def work(n: float) -> float:
        validations, is_over = (n - 1) // every, n >= last_step  # the validation after step n itself is still to come
        previews = min(validations, validations * s.VAL_EVERY // s.SAMPLE_EVERY) + is_over
        return (3 * n * batches.images_per_step + previews * sheets) / world.size + (validations + is_over) * draws

    return work
