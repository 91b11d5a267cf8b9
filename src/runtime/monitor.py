"""What a run tells while it goes on: TensorBoard curves and pictures, the progress bar, lines where there is no terminal."""

import contextlib
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from src.runtime.device import peak_memory
from src.utils import writing_to

SECONDS_PER_LINE = 60  # between lines of progress where there is no terminal for a bar


class Nowhere:
    """A SummaryWriter that writes nothing, for all processes but the first."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **options: None


class Monitor:
    """One run's TensorBoard events at log_path and its progress bar, which is lines of text where there is no terminal.
    log_path None: nothing of either.

    A run resumed after `first_step` steps hides what an earlier one wrote past it (TensorBoard's purge_step).
    """

    def __init__(self, log_path: Path | None, first_step: int, last_step: int, images_per_step: int, device: torch.device):
        self.log_path, self.last_step = log_path, last_step
        self.hook, threading.excepthook = threading.excepthook, lambda _: None  # SummaryWriter raises its thread's errors
        with self.writing():
            self.writer: Any = SummaryWriter(log_path, purge_step=first_step + 1, flush_secs=20) if log_path else Nowhere()
        is_silent = None if log_path else True  # None: no bar where there is no terminal
        self.bar = tqdm(total=last_step, initial=first_step, unit="step", disable=is_silent, smoothing=0.05, dynamic_ncols=True)
        self.device, self.images_per_step = device, images_per_step
        self.restart_clock(first_step)
        self.line_clock = self.clock

    def writing(self) -> contextlib.AbstractContextManager:
        return writing_to(self.log_path or Path(), "--log_path")

    def restart_clock(self, step: int) -> None:
        """Leave what happened since the last point (saving, previews) out of the images per second."""
        self.clock, self.clock_step = time.perf_counter(), step

    def log(self, step: int, values: dict[str, float]) -> None:
        """A point of every curve after `step` steps, and the bar's figures."""
        now = time.perf_counter()
        speed = (step - self.clock_step) * self.images_per_step / max(now - self.clock, 1e-9)
        memory = peak_memory(self.device)
        self.scalars(step, values | {"speed/images_per_second": speed, "speed/peak_memory_GiB": memory})
        figures = f"loss {values.get('loss/train', math.nan):.4f}, {speed:,.1f} images/s, {memory:.1f} GiB"
        self.bar.set_postfix_str(figures, refresh=False)
        if self.bar.disable and now - self.line_clock > SECONDS_PER_LINE:
            print(f"step {step:,} of {self.last_step:,}: {figures}", flush=True)
            self.line_clock = now
        self.restart_clock(step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        with self.writing():
            for tag, value in values.items():
                self.writer.add_scalar(tag, value, step)

    def picture(self, step: int, tag: str, picture: Tensor) -> None:
        """picture: [3, H, W] uint8."""
        with self.writing():
            self.writer.add_image(tag, picture, step)

    def text(self, step: int, tag: str, table: dict) -> None:
        """A two-column table, in Markdown."""
        rows = "\n".join(f"| {name} | {value} |" for name, value in table.items())
        with self.writing():
            self.writer.add_text(tag, f"| name | value |\n|---|---|\n{rows}", step)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.bar.write(text) if not self.bar.disable else print(text, flush=True)

    def flush(self) -> None:
        with self.writing():
            self.writer.flush()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        with contextlib.suppress(OSError):  # all that matters was flushed before the last save
            self.writer.close()
        threading.excepthook = self.hook
