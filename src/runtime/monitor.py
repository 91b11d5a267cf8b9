"""What a run tells while it goes on: means of the loss, TensorBoard curves and images, the progress bar or lines of text."""

import contextlib
import math
import os
import secrets
import shlex
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor, nn
from torch.utils.tensorboard import summary

from src.dataset import OBTAIN, TrainBatches, ValidationBatches
from src.model import parameter_count
from src.progress import Bar, Work
from src.runtime.checkpoint import most_passes
from src.runtime.device import peak_memory
from src.runtime.distributed import World
from src.runtime.flags import print_idle
from src.runtime.resume import FREE
from src.runtime.settings import Run, Settings, as_text, changed_from_defaults
from src.utils import count, make_folders, printable, writing

FEW_STEPS = 2000  # fewer in all are warned about


class Meter:
    """Sums of the loss, by quarter of t, and of the gradient norm. They stay on the device: nothing waits until `read`.

    Values that are not finite are left out: under fp16 a step whose gradients overflow is skipped now and then.
    """

    def __init__(self, time_steps: int, device: torch.device, world: World = World()):
        self.time_steps, self.world = time_steps, world
        self.sums = torch.zeros(2, 4, device=device)  # loss, images
        self.norms = torch.zeros(2, device=device)  # gradient norm, steps
        self.bad_step = torch.full((), -1, device=device)  # the first whose gradient was not finite

    def add(self, losses: Tensor, t: Tensor) -> None:
        """losses: [B] float32.   t: [B] int64."""
        quarter = t * 4 // self.time_steps
        self.sums.index_add_(1, quarter, torch.stack(finite(losses.detach())))

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
    """A file of TensorBoard events. Each is written by the caller, so that a full disk raises OSError here and not in a
    thread. purge_step: TensorBoard hides what earlier files of the folder have from this step on."""

    def __init__(self, folder: Path, purge_step: int | None = None):
        make_folders(folder)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
        self.records = RecordWriter(open(folder / name, "xb"))  # noqa: SIM115 (the user closes it)
        self.write(file_version="brain.Event:2")
        if purge_step:
            self.write(step=purge_step, session_log=SessionLog(status=SessionLog.START))
        self.records.flush()

    def write(self, **fields: Any) -> None:
        self.records.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def scalar(self, step: int, tag: str, value: float) -> None:
        self.write(step=step, summary=summary.scalar(tag, value))

    def image(self, step: int, tag: str, image: Tensor) -> None:
        """image: [3, H, W] uint8."""
        self.write(step=step, summary=summary.image(tag, image, dataformats="CHW"))

    def table(self, step: int, tag: str, rows: dict) -> None:
        """A table of two columns, in Markdown."""
        lines = "\n".join(f"| {name} | {printable(value)} |" for name, value in rows.items())
        self.write(step=step, summary=summary.text(tag, f"| name | value |\n|---|---|\n{lines}"))


class Monitor:
    """One run's TensorBoard events in LOG_PATH, and its progress bar, or lines of text where there is no terminal. In all
    processes but the main one it does nothing.

    A run resumed after `first_step` steps hides what an earlier one wrote past it.
    """

    def __init__(self, s: Settings, world: World, device: torch.device, first_step: int, last_step: int, work: Work = float):
        self.log_path, self.device = s.folder("LOG_PATH"), device
        self.images_per_step = s.BATCH_SIZE * s.GRAD_ACCUM_STEPS
        self.events: EventFile | None = None
        if world.is_main:
            with writing(self.log_path, "--log_path"):
                self.events = EventFile(self.log_path, purge_step=first_step + 1)
                kept = {name: value for name, value in asdict(s).items() if name not in FREE - {"EPOCHS", "PRECISION"}}
                self.events.table(first_step, "settings", {f"--{name.lower()}": as_text(value) for name, value in kept.items()})
        self.bar = Bar(total=last_step, initial=first_step, unit="step", disable=self.events is None, work=work)
        self.restart_clock(first_step)

    def restart_clock(self, step: int) -> None:
        """Leave what happened since the last point (saving, previews) out of the images per second."""
        self.clock, self.clock_step = time.perf_counter(), step

    def log(self, step: int, values: dict[str, float]) -> None:
        """A point of every curve after `step` steps, and the bar's figures."""
        speed = (step - self.clock_step) * self.images_per_step / max(time.perf_counter() - self.clock, 1e-9)
        memory = peak_memory(self.device)
        self.scalars(step, values | {"speed/images_per_second": speed, "speed/peak_memory_GiB": memory})
        figures = f"loss {values.get('loss/train', math.nan):.4f}, {speed:,.1f} images/s, {memory:.1f} GiB"
        self.bar.set_postfix_str(figures, refresh=False)
        self.restart_clock(step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.write(lambda events: [events.scalar(step, tag, value) for tag, value in values.items()])

    def image(self, step: int, tag: str, image: Tensor) -> None:
        """image: [3, H, W] uint8."""
        self.write(lambda events: events.image(step, tag, image))

    def flush(self) -> None:
        self.write(lambda events: events.records.flush())

    def write(self, action: Any) -> None:
        if self.events:
            with writing(self.log_path, "--log_path"):
                action(self.events)

    def track(self, task: str, items: Any) -> Iterable:
        """The items, with a bar of their own below the run's."""
        return Bar(items, desc=task, unit="batch", leave=False, disable=self.events is None)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.events:
            with contextlib.suppress(OSError):  # all that matters was flushed before the last save
                self.events.records.close()


def work_of(s: Settings, world: World, batches: TrainBatches, val_batches: ValidationBatches, last_step: int) -> Work:
    """What the first n steps cost this process, in network calls on one image: a training image costs three, a validation one
    for each draw, a preview one for each step of each picture of both networks. The time to go follows from it."""
    every, draws = s.VAL_EVERY * batches.steps_per_epoch, sum(map(len, val_batches.draws))
    sheets = 2 * s.NUM_SAMPLES * min(s.PREVIEW_STEPS, s.TIME_STEPS) * (1 if s.guidance in (0, 1) else 2)
    sheets = min(sheets, most_passes(s, last_step))

    def work(n: float) -> float:
        validations, is_over = (n - 1) // every, n >= last_step  # the validation after step n itself is still to come
        previews = min(validations, validations * s.VAL_EVERY // s.SAMPLE_EVERY) + is_over
        return (3 * n * batches.images_per_step + previews * sheets) / world.size + (validations + is_over) * draws

    return work


def print_plan(
    run: Run,
    config: ModuleType,
    world: World,
    device: str,
    dtype: torch.dtype,
    model: nn.Module,
    batches: TrainBatches,
    val_batches: ValidationBatches,
    step: int,
) -> None:
    """What will happen, before it does."""
    s, (last_step, limit) = run.settings, run.limit(batches.steps_per_epoch)
    changed = [f"{name} {as_text(new)}" for name, _, new in changed_from_defaults(s, config)]
    origin = [f"preset {run.preset}"] * bool(run.preset) + [f"network of {run.init_from}"] * bool(run.init_from)
    done = f"going on after step {step:,}" if step else "starting anew"
    together = f"; {world.size} processes of {batches.local_batch_size} images each" if world.size > 1 else ""
    per_epoch = f"{batches.steps_per_epoch:,} an epoch, {count(batches.images_per_step, 'image')} each"
    size = f"{s.IMAGE_SIZE}x{s.IMAGE_SIZE}"
    for title, text in {
        "settings": (", ".join(changed) or "all defaults") + (f" ({', '.join(origin)})" if origin else ""),
        "device": f"{device}, {as_text(dtype).removeprefix('torch.')}{together}",
        "network": f"{parameter_count(model):,} parameters",
        "images": f"{len(batches.images):,} for training, {len(val_batches.rows.unique()):,} for validation, {size}",
        "classes": class_line(s, batches.images.classes),
        "steps": f"{last_step:,} in all by {limit} ({per_epoch}), {done}",
        "saves to": s.folder("CHECKPOINT_PATH").resolve(),
        "grids in": s.folder("OUTPUT_PATH").resolve() / "samples",
        "logs in": s.folder("LOG_PATH").resolve(),
    }.items():
        if text:
            print(f"{title:<9} {text}")
    print_idle({"init_from", *map(str.lower, run.typed)}, idle_flags(run, step))
    for warning in warnings_of(s, last_step, batches.steps_per_epoch, not run.init_from, batches.images.classes):
        print(f"Warning: {warning}")


def class_line(s: Settings, classes: list[str]) -> str:
    """Which classes there are, and whether the network is told them; "" for pictures that are not sorted."""
    names = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
    how = "; chosen by CLASSES" if s.CLASSES else ""
    if not s.CLASS_CONDITIONAL:
        how += "; not told to the network (to draw them by name: --class_conditional true --run NAME)"
    return f"{len(classes):,}: {names}{how}" if len(classes) > 1 or s.CLASSES else ""


def idle_flags(run: Run, step: int) -> dict[str, tuple[str, bool]]:
    """When flags have no effect, as print_idle takes it. step: of the checkpoint that the run goes on from, or 0."""
    s = run.settings
    return {
        "on a run that has a checkpoint; --run NAME starts another": ("init_from", run.init_from is not None and step > 0),
        "without --class_conditional": ("label_dropout preview_guidance", not s.CLASS_CONDITIONAL),
        f"above TIME_STEPS {s.TIME_STEPS}": ("preview_steps", s.PREVIEW_STEPS > s.TIME_STEPS),
        "on --dataset shapes": ("data_path", s.DATASET == "shapes"),
        f"on --dataset {s.DATASET}, which has no such address": ("data_url data_size data_md5", s.DATASET not in OBTAIN),
    }


def warnings_of(
    s: Settings, last_step: int, steps_per_epoch: int, starts_from_noise: bool = True, classes: Sequence[str] = ()
) -> list[str]:
    """What makes a run fail in silence: one sentence each, with what to type instead."""
    found = []
    if starts_from_noise and last_step < FEW_STEPS:
        found.append(
            f"{count(last_step, 'step')} in all: most networks draw only noise before some thousands. "
            f"Use --max_steps 10000, or for a folder of 100 to 1,000 pictures --preset small."
        )
    if last_step < 2 * s.WARMUP_STEPS:
        found.append(
            f"The warm-up of {s.WARMUP_STEPS:,} steps takes more than half of the run, so the learning rate hardly gets to "
            f"work. Use --warmup_steps {last_step // 10}."
        )
    if s.VAL_EVERY * steps_per_epoch < FEW_STEPS / 20 and last_step > FEW_STEPS:
        found.append(
            f"A validation and a save after every {count(s.VAL_EVERY * steps_per_epoch, 'step')} may take longer than these. "
            f"Use --val_every {-(-FEW_STEPS // (10 * steps_per_epoch))}."
        )
    if s.CLASS_CONDITIONAL and len(classes) == 1:
        found.append(
            f"There is one class, {classes[0]}, so CLASS_CONDITIONAL tells the network nothing. Sort the pictures into a "
            f"folder for each class, or use --class_conditional false."
        )
    return found


def print_summary(s: Settings, step: int, last_step: int) -> None:
    """Where the run stands, and the next command to type."""
    latest, best = (s.folder("CHECKPOINT_PATH") / name for name in ("latest.pth", "best.pth"))
    if step < last_step:
        kept = f"{latest} is saved" if latest.exists() else "there is nothing to save yet"
        print(f"Stopped after step {step:,} of {last_step:,}; {kept}. The same command goes on from there.")
        return
    is_default = s.RUN and Path(s.CHECKPOINT_PATH) == Path("checkpoints")
    which = f"--run {s.RUN}" if is_default else f"--checkpoint {shlex.quote(str(best))}"
    guidance = f" --guidance {s.guidance:g}" if s.guidance != 1 else ""
    print(f"Done: step {step:,}. Draw pictures with: python sample.py {which}{guidance}")
