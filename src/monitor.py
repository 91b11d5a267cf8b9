"""What a run tells while it goes on: TensorBoard curves and pictures, the progress bar, lines where there is no terminal."""

import time
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from src.device import peak_memory


class Monitor:
    """One run's TensorBoard events at log_path and its progress bar, which is lines of text where there is no terminal.

    A run resumed after `first_step` steps hides what an earlier one wrote past it (TensorBoard's purge_step).
    """

    def __init__(self, log_path: Path, first_step: int, last_step: int, images_per_step: int, device: torch.device):
        self.writer = SummaryWriter(log_path, purge_step=first_step + 1)
        self.bar = tqdm(total=last_step, initial=first_step, unit="step", disable=None, smoothing=0.05, dynamic_ncols=True)
        self.device, self.images_per_step = device, images_per_step
        self.restart_clock(first_step)

    def restart_clock(self, step: int) -> None:
        """Leave what happened since the last point (saving, previews) out of the images per second."""
        self.clock, self.clock_step = time.perf_counter(), step

    def log(self, step: int, values: dict[str, float]) -> None:
        """A point of every curve after `step` steps, and the bar's figures."""
        now = time.perf_counter()
        speed = (step - self.clock_step) * self.images_per_step / max(now - self.clock, 1e-9)
        memory = peak_memory(self.device)
        self.scalars(step, values | {"speed/images_per_second": speed, "speed/peak_memory_GiB": memory})
        self.bar.set_postfix_str(f"loss {values['loss/train']:.4f}, {speed:,.1f} images/s, {memory:.1f} GiB", refresh=False)
        self.restart_clock(step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def picture(self, step: int, tag: str, picture: Tensor) -> None:
        """picture: [3, H, W] uint8."""
        self.writer.add_image(tag, picture, step)

    def text(self, step: int, tag: str, table: dict) -> None:
        """A two-column table, in Markdown."""
        rows = "\n".join(f"| {name} | {value} |" for name, value in table.items())
        self.writer.add_text(tag, f"| name | value |\n|---|---|\n{rows}", step)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.bar.write(text) if not self.bar.disable else print(text, flush=True)

    def flush(self) -> None:
        self.writer.flush()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.writer.close()
