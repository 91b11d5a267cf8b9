"""Whole runs of train.py and sample.py for the tests, and ways to look at what they leave behind."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.data.shapes import Shapes
from src.runtime.settings import as_flags

ROOT = Path(__file__).parent.parent

# A run of 3 epochs of 10 steps that takes half a second.
TINY = {
    "DATASET": "folder", "IMAGE_SIZE": 8, "NUM_WORKERS": 0, "DEVICE": "cpu", "PRECISION": "fp32",
    "UNET_DIM": 8, "DIM_MULTS": (1,), "NUM_RES_BLOCKS": 1, "ATTENTION_RESOLUTIONS": (), "TIME_STEPS": 50,
    "BATCH_SIZE": 8, "LEARNING_RATE": 1e-3, "WARMUP_STEPS": 5, "EMA_DECAY": 0.9, "EPOCHS": 3,
    "VAL_IMAGES": 4, "NUM_SAMPLES": 4, "PREVIEW_STEPS": 3, "SAVE_EVERY": 2, "SAMPLE_EVERY": 2, "LOG_EVERY": 3,
}  # fmt: skip


class Zygote:
    """The process of tests/zygote.py, which forks runs."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.zygote"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, **pipes)

    def ask(self, **request: Any) -> Any:
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(10)


class Process:
    """A run that has been started in `folder`, where it leaves stdout.txt and stderr.txt.
    name: goes before the dot, to tell the processes of one job apart."""

    def __init__(self, zygote: Zygote, folder: Path, script: str, argv: list[str], setup: str, name: str = ""):
        self.zygote = zygote
        self.out_path, self.err_path = (folder / f"{stream}{name}.txt" for stream in ("stdout", "stderr"))
        self.out_path.touch()  # so that it can be read before the process has made it
        self.err_path.touch()
        files = {"cwd": str(folder), "stdout": str(self.out_path), "stderr": str(self.err_path)}
        self.pid: int = zygote.ask(script=script, argv=argv, setup=setup, **files)
        self.code: int | None = None

    @property
    def out(self) -> str:
        return self.out_path.read_text()

    @property
    def err(self) -> str:
        return self.err_path.read_text()

    def poll(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs."""
        if self.code is None:
            self.code = self.zygote.ask(wait=self.pid)
        return self.code

    def wait(self, is_so: Callable[[], bool] = lambda: False, timeout: float = 120) -> "Process":
        """Wait until is_so() or the end of the process."""
        end = time.monotonic() + timeout
        while not is_so() and self.poll() is None:
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                raise TimeoutError(f"still running after {timeout} s; it said:\n{self.out}{self.err}")
            time.sleep(0.003)
        return self

    def send(self, number: int) -> None:
        os.kill(self.pid, number)


class Runner:
    """Runs scripts in `folder` with the settings TINY on the session's pictures."""

    def __init__(self, zygote: Zygote, folder: Path, pictures: Path):
        self.zygote, self.folder, self.pictures = zygote, folder, pictures

    def to(self, name: str) -> "Runner":
        """The same in a folder inside this one, for a test of several runs."""
        return Runner(self.zygote, self.folder / name, self.pictures)

    def flags(self, **changes: Any) -> list[str]:
        """TINY as flags, with changes by the names of config.py, and max_steps and the like by theirs. None: no flag."""
        paths = {"DATA_PATH": self.pictures, "CACHE_PATH": self.pictures.parent / "cache"}
        settings = {name: value for name, value in (TINY | paths | changes).items() if value is not None}
        return [word for name, value in settings.items() for word in as_flags({name: value}).replace("'", "").split(" ", 1)]

    def start(self, script: str, *argv: Any, setup: str = "", name: str = "") -> Process:
        self.folder.mkdir(exist_ok=True)
        return Process(self.zygote, self.folder, script, [str(word) for word in argv], setup, name)

    def start_train(self, setup: str = "", **changes: Any) -> Process:
        return self.start("train.py", *self.flags(**changes), setup=setup)

    def train(self, setup: str = "", code: int = 0, **changes: Any) -> Process:
        """A whole run of train.py. code: the exit code expected."""
        return ended(self.start_train(setup, **changes), code)

    def sample(self, *argv: Any, setup: str = "", code: int = 0) -> Process:
        """A whole run of sample.py, on the CPU."""
        return ended(self.start("sample.py", "--device", "cpu", *argv, setup=setup), code)

    def state(self, name: str = "latest") -> dict[str, Any]:
        """A checkpoint as the run left it."""
        return torch.load(self.folder / "checkpoints" / f"{name}.pth", weights_only=True)

    def files(self, pattern: str) -> dict[str, bytes]:
        """{name: bytes} of the files of that pattern, in any folder below."""
        paths = sorted(filter(Path.is_file, self.folder.rglob(pattern)))
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}

    def events(self, folder: str = "logs/tensorboard") -> EventAccumulator:
        """What TensorBoard shows."""
        logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of what a resumed run hides
        return EventAccumulator(str(self.folder / folder), {"scalars": 0, "images": 0, "tensors": 0}).Reload()

    def scalars(self) -> dict[str, list[tuple[int, float]]]:
        """{tag: [(step, value), ...]} of TensorBoard's curves, but for those of speed and memory."""
        events = self.events()
        tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("speed/")]
        return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}

    def grids(self) -> dict[str, list[tuple[int, bytes]]]:
        """{tag: [(step, PNG), ...]} of TensorBoard's pictures."""
        events = self.events()
        tags = events.Tags()["images"]
        return {tag: [(event.step, event.encoded_image_string) for event in events.Images(tag)] for tag in tags}


class Code:
    """Whoever opens a pickle of it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("made",)


def make_pictures(folder: Path) -> Path:
    """84 pictures in 4 classes: 80 for training, 4 held out."""
    shapes = Shapes("train", 16)
    for i in range(84):
        path = folder / shapes.classes[i % 4] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(shapes[i // 4 * 10 + i % 4][0]).save(path)
    return folder


def ended(process: Process, code: int) -> Process:
    process.wait()
    assert "Traceback" not in process.err, process.err
    assert process.code == code, f"exit code {process.code}:\n{process.out}{process.err}"
    return process


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, whatever they are made of."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The entries of two checkpoints that are not the same, but for the settings."""
    return [key for key in {**a, **b} if key != "config" and not same(a.get(key), b.get(key))]


def signal_at(step: int, micro: int = 0, *names: str) -> str:
    """Setup of a run that gets the signals, by name, when it draws micro-batch `micro` of step number `step` from 0."""
    return f"""
import os, signal
from src.dataset import TrainBatches

draw = TrainBatches.__call__

def draw_under_fire(self, step, micro):
    if (step, micro) == ({step}, {micro}):
        for name in {names}:
            os.kill(os.getpid(), getattr(signal, name))
    return draw(self, step, micro)

TrainBatches.__call__ = draw_under_fire
"""
