"""Each row of the table in docs/reliability.md, brought about for real: the sentence, the exit code, what is kept."""

import contextlib
import http.server
import inspect
import io
import os
import pickle
import re
import shutil
import signal
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from src.runtime.checkpoint import load_checkpoint
from tests.runs import ROOT, Process, Runner, differences, ended, signal_at
from tests.runtime.test_distributed import train_all
from tests.test_resume import SLOW_VALIDATION


class Row(NamedTuple):
    fault: str
    sentence: str
    code: int
    kept: str


DOCUMENT = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def read_table() -> list[Row]:
    """The rows of the document, but for the headings in bold."""
    text = DOCUMENT.partition("<!-- tests/runtime/test_faults.py reads")[2]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    rows = [row for row in cells[2:] if not row[0].startswith("**")]
    return [Row(fault, sentence.strip("`") if "`" in sentence else "", int(code), kept) for fault, sentence, code, kept in rows]


ROWS = read_table()
FAULTS: dict[str, Callable[..., Process]] = {}


def fault(name: str) -> Callable:
    """The function below brings about the fault of that row, checks what is kept, and returns the process."""

    def note(bring_about: Callable[..., Process]) -> Callable[..., Process]:
        assert name not in FAULTS
        FAULTS[name] = bring_about
        return bring_about

    return note


def as_pattern(sentence: str) -> str:
    """A regular expression that a sentence fits once something stands for each <...>."""
    return ".+".join(re.escape(part) for part in re.split("<[^>]*>", sentence))


def test_each_row_has_a_test_and_each_test_a_row():
    assert [row.fault for row in ROWS] == list(FAULTS)


@pytest.mark.parametrize(("codes", "starts"), [([143, 137, 0], 3), ([143, 1], 2), ([2], 1), ([130], 1)])
def test_the_loop_for_pre_empted_machines_starts_again_after_a_kill_alone(tmp_path, codes, starts):
    loop = re.search(r"```bash\n(.*)\n```", DOCUMENT)[1]
    python = f"codes=({' '.join(map(str, codes))}); python() {{ echo start; return ${{codes[$((n++))]}}; }}; sleep() {{ :; }};"
    assert subprocess.run(["bash", "-c", python + loop], capture_output=True, text=True).stdout == "start\n" * starts


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.fault)
def test_fault(row, request):
    bring_about = FAULTS[row.fault]
    process = bring_about(**{name: request.getfixturevalue(name) for name in inspect.signature(bring_about).parameters})
    lines = (process.out + process.err).splitlines()
    assert "Traceback" not in process.err, process.err
    assert (128 - process.code if process.code < 0 else process.code) == row.code, lines
    if row.sentence:
        assert any(re.fullmatch(as_pattern(row.sentence), line) for line in lines), "\n".join([row.sentence, "", *lines])
    if row.sentence.startswith(("train.py: ", "sample.py: ")):
        said = [line for line in process.err.splitlines() if line and "finishing the step" not in line]
        assert len(said) == 1, f"more than the one sentence:\n{process.err}"


def saved_run(run: Runner, **settings) -> dict[str, bytes]:
    """A first run of one epoch, from whose checkpoints the run at fault goes on. Returns them."""
    run.train(max_steps=10, **settings)
    return run.files("*.pth")


def kept(run: Runner, before: dict[str, bytes]) -> None:
    assert run.files("*.pth") == before, "a checkpoint was touched"
    assert not run.files(".*part-*"), "something half-made is left"


# --- the run is stopped -------------------------------------------------------------------------------


def stopped_at_step_5(run: Runner, name: str) -> Process:
    process = run.start_train(signal_at(4, 0, name)).wait()
    assert run.state()["step"] == 5
    return process


@fault("Ctrl-C")
def ctrl_c(run):
    return stopped_at_step_5(run, "SIGINT")


@fault("Ctrl-C twice")
def ctrl_c_twice(run):
    before = saved_run(run)
    process = run.start_train(signal_at(14, 0, "SIGINT", "SIGINT")).wait()
    kept(run, before)
    return process


@fault("SIGTERM, as a pre-empted machine gets it")
def sigterm(run):
    return stopped_at_step_5(run, "SIGTERM")


@fault("SIGTERM during a validation or preview")
def sigterm_in_validation(run):
    process = run.start_train(SLOW_VALIDATION).wait()
    assert run.state()["step"] == 10
    return process


@fault("The terminal is closed (SIGHUP)")
def sighup(run):
    return stopped_at_step_5(run, "SIGHUP")


SLOW_DECODING = """
import time, src.data.folder
open_image = src.data.folder.open_image
src.data.folder.open_image = lambda path: time.sleep(0.1) or open_image(path)
"""


def stopped_while_decoding(run: Runner, number: int) -> Process:
    """By a signal to the whole group of processes, as a terminal sends Ctrl-C: those that decode get it too."""
    process = run.start_train(SLOW_DECODING, CACHE_PATH="cache", NUM_WORKERS=2)
    process.wait(lambda: "decoding" in process.out)
    time.sleep(0.5)
    os.killpg(process.pid, number)
    process.wait(timeout=30)
    assert not [path for path in (run.folder / "cache").rglob("*") if path.is_file()]
    return process


@fault("SIGTERM while pictures are decoded")
def sigterm_while_decoding(run):
    return stopped_while_decoding(run, signal.SIGTERM)


@fault("`kill -9`, or the power goes")
def sigkill(run):
    before = saved_run(run)
    process = run.start_train(signal_at(14, 0, "SIGKILL")).wait()
    kept(run, before)
    return process


@fault("A second run on the same folder")
def two_runs(run):
    first = run.start_train(signal_at(3, 0, "SIGSTOP"))
    first.wait(lambda: "logs in" in first.out)
    second = Runner(run.zygote, run.folder / "second", run.pictures)
    process = second.start_train(CHECKPOINT_PATH=run.folder / "checkpoints").wait()
    while not is_stopped(first.pid):
        time.sleep(0.01)
    first.send(signal.SIGCONT)
    ended(first, 0)
    return process


@fault("One of several processes is killed")
def one_of_two_is_killed(run):
    survivor, killed = train_all(run, 2, codes=[1, -signal.SIGKILL], setups={1: signal_at(23, 0, "SIGKILL")})
    assert killed.err == ""
    assert run.state()["step"] == 20
    return survivor


def is_stopped(pid: int) -> bool:
    return subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.startswith("T")


# --- numbers and memory -------------------------------------------------------------------------------

# From step 14 on the pictures hold an infinite pixel.
INFINITE = """
from src.dataset import TrainBatches

draw = TrainBatches.__call__

def draw_infinite(self, step, micro):
    batch = draw(self, step, micro)
    if step >= 13:
        batch.x_0[0, 0, 0, 0] = float("inf")
    return batch

TrainBatches.__call__ = draw_infinite
"""


@fault("The loss or gradient is not finite")
def not_finite(run):
    before = saved_run(run)
    process = run.start_train(INFINITE).wait()
    assert "of step 14 " in process.err
    kept(run, before)
    return process


@fault("The gradient overflows fp16 at every scale")
def fp16_overflows(run):
    before = saved_run(run)
    setup = INFINITE + "import src.runtime.device as d, torch; d.pick_precision = lambda *_: torch.float16"  # even on a CPU
    process = run.start_train(setup, PRECISION="fp16", DEVICE="auto", COMPILE=False, EPOCHS=100, SAVE_EVERY=1000).wait()
    state = run.state()
    assert state["step"] >= 20 and all(weights.isfinite().all() for weights in state["model"].values())
    assert len(run.files("*.pth")) == len(before) + 1, "more was saved than latest.pth and its predecessor"
    return process


def raises(error: str) -> str:
    return f"""
import torch
from src.diffusion import GaussianDiffusion

def out_of_memory(*args, **options):
    raise {error}

GaussianDiffusion.training_losses = GaussianDiffusion.denoiser = out_of_memory
"""


GPU_IS_FULL = raises('torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")')
# The address space that there is now, and 150 MB.
LITTLE_MEMORY = """
import resource
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 150_000_000,) * 2)
"""


@fault("The GPU is out of memory")
def gpu_memory(run):
    before = saved_run(run)
    process = run.start_train(GPU_IS_FULL).wait()
    assert "BATCH_SIZE 8 and GRAD_ACCUM_STEPS 1." in process.err and "--batch_size 4 --grad_accum_steps 2;" in process.err
    kept(run, before)
    return process


@fault("The machine is out of memory")
def machine_memory(run):
    process = run.start_train(LITTLE_MEMORY, UNET_DIM=64, IMAGE_SIZE=64, BATCH_SIZE=80).wait()
    assert "--batch_size 40 --grad_accum_steps 2;" in process.err
    return process


@fault("Out of memory with one image")
def memory_for_one(run):
    return run.start_train(GPU_IS_FULL, BATCH_SIZE=1).wait()


OVERFLOW = """
import torch
from src.model import UNet
forward = UNet.forward
UNet.forward = lambda self, x, t, y=None: forward(self, x, t, y) + (0 if self.training or t[0] > 30 else torch.inf)
"""


@fault("The network overflows in a preview")
def overflow_in_preview(run):
    before = saved_run(run)
    fine = (
        "from src.diffusion import GaussianDiffusion as D; D.validation_losses = lambda self, network, x_0, *_: x_0[:, 0, 0, 0]"
    )
    process = run.start_train(OVERFLOW + fine).wait()
    kept(run, before)
    assert list(run.files("*.png")) == ["outputs/samples/epoch_001.png"]  # of the run before
    return process


@fault("The network overflows in a validation")
def validation_overflows(run):
    before = saved_run(run)
    nan = "GaussianDiffusion.validation_losses = lambda self, network, x_0, *_: x_0.new_full((len(x_0),), float('nan'))"
    process = run.start_train(f"from src.diffusion import GaussianDiffusion; {nan}").wait()
    assert "after step 20 " in process.err
    kept(run, before)
    return process


@fault("The network overflows while drawing")
def overflow_while_drawing(run, trained):
    checkpoint = trained.folder / "checkpoints" / "best.pth"
    words = ["--checkpoint", checkpoint, "--num_samples", 3, "--output_dir", "drawn", "--device", "cpu"]
    process = run.start("sample.py", *words, setup=OVERFLOW).wait()
    assert not run.files("*.png")
    return process


@fault("Out of memory while drawing")
def memory_while_drawing(run, trained):
    checkpoint = trained.folder / "checkpoints" / "best.pth"
    words = ["--checkpoint", checkpoint, "--batch_size", 1, "--output_dir", "drawn", "--device", "cpu"]
    run.sample(*words, "--num_samples", 2)
    before = run.files("*.png")
    process = run.start("sample.py", *words, "--num_samples", 3, setup=GPU_IS_FULL).wait()
    assert run.files("*.png") == before
    return process


# --- the compiler -------------------------------------------------------------------------------------


@fault("The compiler is not there")
def no_compiler(run):
    process = run.start_train('import os; os.environ["CXX"] = "/nonexistent"', COMPILE=True).wait()
    assert process.out.index("Warning: ") < process.out.index("80 images"), "before data are decoded"
    assert run.state()["step"] == 30
    return process


FAILING = """
import torch, src.runtime.device as d
d.compiler_fault = lambda device: ""

def compile(network):
    def fail(*args):
        raise RuntimeError("the compiler does not know this layer")
    return fail

torch.compile = compile
"""


@fault("The compilation fails")
def compilation_fails(run):
    plain = run.to("plain")
    plain.train()
    process = run.start_train(FAILING, COMPILE=True).wait()
    assert process.out.count("is not compiled") == 1, "then the compiler is asked no more"
    assert differences(run.state(), plain.state()) == []
    checkpoint = run.folder / "checkpoints" / "best.pth"
    drawn = run.sample("--checkpoint", checkpoint, "--num_samples", 2, "--steps", 2, "--compile", "true", setup=FAILING)
    assert "Warning: the network is not compiled" in drawn.out
    return process


# --- disk ---------------------------------------------------------------------------------------------


@fault("The disk is full while saving")
def full_disk(run):
    """A limit on the size of files, as a quota sets it; tmpfs, which needs root, is below."""
    before = saved_run(run)
    limit = len(before["checkpoints/latest.pth"]) * 2 // 3
    process = run.start_train(f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))").wait()
    assert run.files("*.pth").items() >= before.items() and not run.files(".*part-*")
    return process


@fault("The disk is full under LOG_PATH")
def full_disk_of_logs(run):
    """The event file is the device that is always full."""
    before = saved_run(run)
    process = run.start_train("import src.runtime.monitor as m; m.open = lambda *_: open('/dev/full', 'wb')").wait()
    kept(run, before)
    return process


@fault("The disk is full under OUTPUT_PATH")
def full_disk_of_grids(run):
    before = saved_run(run)
    setup = """
import errno, io
from PIL import Image

save = Image.Image.save

def full(image, file, **options):
    if not isinstance(file, io.BytesIO):  # which TensorBoard's images go through
        raise OSError(errno.ENOSPC, "No space left on device")
    save(image, file, **options)

Image.Image.save = full
"""
    process = run.start_train(setup).wait()
    kept(run, before)
    assert list(run.files("*.png")) == ["outputs/samples/epoch_001.png"]
    return process


def below_a_file(run: Runner) -> Path:
    """A folder that nobody can make, root included."""
    (run.folder / "file").touch()
    return run.folder / "file" / "folder"


@fault("No permission to write checkpoints")
def no_permission_for_checkpoints(run):
    return run.start_train(CHECKPOINT_PATH=below_a_file(run)).wait()


@fault("No permission to write grids")
def no_permission_for_grids(run):
    return run.start_train(OUTPUT_PATH=below_a_file(run)).wait()


@fault("No permission to write logs")
def no_permission_for_logs(run):
    return run.start_train(LOG_PATH=below_a_file(run)).wait()


@fault("No permission to write the cache")
def no_permission_for_the_cache(run):
    return run.start_train(CACHE_PATH=below_a_file(run)).wait()


LITTLE_DISK = """
import shutil
usage = shutil.disk_usage
shutil.disk_usage = lambda path: usage(path)._replace(free=1000)
"""


@fault("The disk is too small for the cache")
def little_disk_for_the_cache(run):
    process = run.start_train(LITTLE_DISK, CACHE_PATH="cache").wait()
    assert not run.files("cache/*")
    return process


@fault("The cache cannot be read")
def unreadable_cache(run):
    run.train(max_steps=1, CACHE_PATH="cache")
    (path,) = (run.folder / "cache").glob("*train*")
    path.unlink()
    path.mkdir()
    return run.start_train(CACHE_PATH="cache").wait()


@fault("No permission to write pictures")
def no_permission_for_pictures(run, trained):
    checkpoint = trained.folder / "checkpoints" / "best.pth"
    return run.start("sample.py", "--checkpoint", checkpoint, "--output_dir", below_a_file(run)).wait()


# --- checkpoints --------------------------------------------------------------------------------------


def damaged(run: Runner, change: Callable[[bytes], bytes], trained: Runner) -> Process:
    """A run that meets a changed latest.pth and goes on from the newest that loads to the same end."""
    run.train(max_steps=10)
    run.train(max_steps=13)
    latest = run.folder / "checkpoints" / "latest.pth"
    latest.write_bytes(change(latest.read_bytes()))
    process = run.start_train().wait()
    assert "Going on from checkpoints/best.pth, step 13" in process.err
    assert latest.with_name("latest.damaged").exists()
    assert differences(run.state(), trained.state()) == []
    curves = {tag: [point for point in curve if point[0] != 13] for tag, curve in run.scalars().items()}
    assert curves == trained.scalars()  # but for the loss that ended the first run
    return process


@fault("latest.pth is truncated")
def truncated(run, trained):
    return damaged(run, lambda data: data[:-1000], trained)


@fault("A bit of latest.pth has flipped")
def flipped(run, trained):
    middle = 200_000
    return damaged(run, lambda data: data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :], trained)


@fault("latest.pth is gone")
def gone(run, trained):
    run.train(max_steps=13)
    (run.folder / "checkpoints" / "latest.pth").unlink()
    process = run.start_train().wait()
    assert differences(run.state(), trained.state()) == []
    return process


def met_at_start(run: Runner, content: bytes, setup: str = "", **settings) -> Process:
    """A run that finds this as its only checkpoint, and leaves it alone."""
    latest = run.folder / "checkpoints" / "latest.pth"
    latest.parent.mkdir()
    latest.write_bytes(content)
    process = run.start_train(setup, **settings).wait()
    kept(run, {"checkpoints/latest.pth": content})
    return process


def as_bytes(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@fault("No checkpoint in the folder loads")
def none_loads(run):
    return met_at_start(run, b"damaged")


class Code:
    def __reduce__(self):
        return os.mkdir, ("made",)


@fault("A checkpoint with code in it")
def code(run):
    process = met_at_start(run, as_bytes({"version": 1, "model": Code()}))
    assert not (run.folder / "made").exists()
    assert pickle.dumps(Code()), "the test wants a pickle that runs code"
    return process


@fault("A checkpoint of another program")
def of_another_program(run):
    return met_at_start(run, as_bytes({"state_dict": {"weight": torch.zeros(3)}}))


@fault("A checkpoint without its optimizer")
def of_weights_alone(run, trained):
    state = trained.state()
    return met_at_start(run, as_bytes({name: state[name] for name in ("ema", "config", "classes")}))


@fault("A checkpoint of a newer format")
def of_a_newer_format(run, trained):
    return met_at_start(run, as_bytes(trained.state() | {"version": 99}))


@fault("A checkpoint that lacks a setting")
def of_fewer_settings(run, trained):
    state = trained.state()
    del state["config"]["PREVIEW_STEPS"]
    return met_at_start(run, as_bytes(state))


@fault("A checkpoint with a setting of a newer program")
def of_more_settings(run, trained):
    state = trained.state()
    state["config"]["FUTURE"] = 1
    return met_at_start(run, as_bytes(state))


@fault("Other settings than the checkpoint's")
def other_settings(run, trained):
    process = met_at_start(run, as_bytes(trained.state()), UNET_DIM=16)
    assert "(UNET_DIM 8 -> 16)" in process.err and "give its own settings: --unet_dim 8;" in process.err
    return process


@fault("Other settings that a run may take up")
def tunable_settings(run, trained):
    return met_at_start(run, as_bytes(trained.state()), LEARNING_RATE=1e-5)


OTHER_NETWORK = """
import torch, src.runtime.build

class OtherUNet(src.runtime.build.UNet):
    def __init__(self, **options):
        super().__init__(**options)
        self.extra = torch.nn.Linear(3, 3)

src.runtime.build.UNet = OtherUNet
"""


@fault("The previews or curves of another run are in the folder")
def folders_of_another_run(run):
    run.train(max_steps=1)
    before = run.files("*")
    run.train(RUN="mine", max_steps=1)  # the command that works
    process = run.start_train(CHECKPOINT_PATH="checkpoints/other").wait()
    after = run.files("*")
    assert all(after[name] == data for name, data in before.items() if "std" not in name)
    return process


@fault("The network in src/model.py was changed")
def other_network(run, trained):
    return met_at_start(run, as_bytes(trained.state()), OTHER_NETWORK)


@fault("Data with other classes")
def other_classes(run, trained):
    state = trained.state() | {"classes": ["cat", "dog"], "class_ids": ["cat", "dog"]}
    state["config"] = state["config"] | {"CLASS_CONDITIONAL": True}  # else its classes do not matter
    return met_at_start(run, as_bytes(state), CLASS_CONDITIONAL=True)


def half_of_the_pictures(run: Runner) -> dict[str, object]:
    few = run.folder / "few"
    shutil.copytree(run.pictures, few)
    for path in sorted(few.rglob("*.png"))[::2]:
        path.unlink()
    return {"DATA_PATH": few, "CACHE_PATH": "cache"}


@fault("Pictures were added, removed or edited since")
def other_pictures(run, trained):
    return met_at_start(run, as_bytes(trained.state()), **half_of_the_pictures(run))


@fault("The same, with --accept_changes")
def other_pictures_accepted(run):
    run.train(max_steps=20)
    process = run.start_train(accept_changes=True, EPOCHS=5, **half_of_the_pictures(run)).wait()
    assert run.state()["step"] == run.state("best")["step"] == 25
    return process


@fault("No checkpoint to draw from")
def no_checkpoint(run):
    return run.start("sample.py").wait()


@fault("A damaged checkpoint to draw from")
def damaged_for_drawing(run):
    (run.folder / "half.pth").write_bytes(b"PK half a file")
    return run.start("sample.py", "--checkpoint", "half.pth").wait()


# --- settings -----------------------------------------------------------------------------------------


@fault("A flag that cannot be")
def bad_flag(run):
    return run.start_train(BATCH_SIZE="many").wait()


def with_config(run: Runner, change: Callable[[str], str]) -> Process:
    """A run in a copy of the repository whose config.py has been changed."""
    text = (ROOT / "config.py").read_text(encoding="utf-8")
    assert change(text) != text
    (run.folder / "config.py").write_text(change(text), encoding="utf-8")
    setup = f"import sys; sys.path.insert(0, {str(run.folder)!r}); sys.modules.pop('config')"
    return run.start_train(setup, BATCH_SIZE=None).wait()


@fault("config.py lacks a constant")
def constant_missing(run):
    return with_config(run, lambda text: re.sub(r"(?m)^BATCH_SIZE = .*\n", "", text))


@fault("config.py has a misspelt constant")
def constant_misspelt(run):
    return with_config(run, lambda text: re.sub(r"(?m)^BATCH_SIZE = ", "BATCH_SIZ = ", text))


@fault("config.py has a value that cannot be")
def bad_constant(run):
    return with_config(run, lambda text: re.sub(r"(?m)^BATCH_SIZE = \d+", "BATCH_SIZE = 'many'", text))


# --- pictures -----------------------------------------------------------------------------------------


def with_pictures(run: Runner, change: Callable[[Path], object]) -> Process:
    """A run on a copy of the pictures, changed, that leaves no half-made cache."""
    folder = run.folder / "pictures"
    shutil.copytree(run.pictures, folder)
    change(folder)
    process = run.start_train(DATA_PATH=folder, CACHE_PATH="cache").wait()
    assert not run.files(".*part-*")
    return process


@fault("The folder of pictures is not there")
def no_folder(run):
    return with_pictures(run, shutil.rmtree)


@fault("The folder holds no pictures")
def no_pictures(run):
    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "notes.txt").touch()

    process = with_pictures(run, change)
    assert "Found there besides: 1 .txt (notes.txt)." in process.err
    return process


UNREADABLE = """
import os
scandir = os.scandir

def refuse(path):
    if str(path).endswith("red circle"):
        raise PermissionError(13, "Permission denied", str(path))
    return scandir(path)

os.scandir = refuse
"""


@fault("A folder of pictures that cannot be read")
def unreadable_folder(run):
    return run.start_train(UNREADABLE).wait()


@fault("Files that are no pictures, hidden, or of an unread kind")
def strays(run):
    def change(folder: Path) -> None:
        for name in ("IMG_1.HEIC", "red circle/.hidden.png", "red circle/Thumbs.db"):
            (folder / name).touch()

    process = with_pictures(run, change)
    assert ": 1 .heic (IMG_1.HEIC), 1 hidden (red circle/.hidden.png), 1 .db (red circle/Thumbs.db). Pictures" in process.out
    return process


@fault("Pictures that this program made lie below the folder")
def own_pictures(run):
    folder = run.folder / "pictures"
    shutil.copytree(run.pictures, folder)
    run.train(DATA_PATH=folder, OUTPUT_PATH=folder / "outputs", max_steps=20)
    process = run.start_train(DATA_PATH=folder, OUTPUT_PATH=folder / "outputs").wait()
    assert "80 images of 4 classes" in process.out
    return process


def split_pictures(folder: Path) -> None:
    """One of every seven pictures to val."""
    for i, path in enumerate(sorted(folder.rglob("*.png"))):
        target = folder / ("val" if i % 7 == 0 else "train") / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    for path in [path for path in folder.iterdir() if path.name not in ("train", "val")]:
        path.rmdir()


@fault("A folder that is split into train and val")
def split_already(run):
    process = with_pictures(run, split_pictures)
    assert "folder train: 72 images of 4 classes" in process.out and "folder val: 12 images of 4 classes" in process.out
    return process


@fault("Its train and val have other classes")
def split_badly(run):
    def change(folder: Path) -> None:
        split_pictures(folder)
        (folder / "val" / "red circle").rename(folder / "val" / "circle of red")

    process = with_pictures(run, change)
    path = process.err.rpartition("--data_path ")[2].strip()
    assert "68 images of 4 classes" in run.to("advised").train(DATA_PATH=path, EPOCHS=1).out
    return process


@fault("A file that is not a picture")
def not_a_picture(run):
    process = with_pictures(run, lambda folder: (folder / "red circle" / "x.png").write_bytes(b"not a picture"))
    assert "red circle/x.png is not a picture" in process.err
    return process


@fault("A truncated picture")
def truncated_picture(run):
    def change(folder: Path) -> None:
        path = folder / "red circle" / "half.jpg"
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:600])

    process = with_pictures(run, change)
    assert "red circle/half.jpg cannot be decoded" in process.err
    return process


@fault("A bit of a PNG has flipped")
def flipped_bit_of_a_picture(run):
    def change(folder: Path) -> None:
        path = next((folder / "red circle").glob("*.png"))
        data = bytearray(path.read_bytes())
        data[-20] ^= 1
        path.write_bytes(data)

    return with_pictures(run, change)


@fault("A broken colour profile")
def broken_profile(run):
    return with_pictures(run, lambda folder: Image.new("RGB", (9, 9)).save(folder / "red circle" / "x.jpg", icc_profile=b"x"))


@fault("12 bits in a file of 16, and no word about it")
def twelve_bits(run):
    def change(folder: Path) -> None:
        Image.fromarray(np.full((9, 9), 3000, np.uint16)).save(folder / "red circle" / "x.png")

    return with_pictures(run, change)


# A user's own dataset, as it is added to src/dataset.py.
OWN = """
import multiprocessing
import numpy as np
from torch.utils.data import Dataset
from src.dataset import DATASETS

class Own(Dataset):
    def __init__(self, split):
        self.classes = {names}[split]
        self.transform = lambda image: image

    def __len__(self):
        return 200

    def __getitem__(self, index):
        return self.transform(np.full((8, 8, 3), index, np.uint8)), index % len(self.classes)

DATASETS["own"] = lambda path, split, image_size: Own(split)
"""


@fault("A dataset of your own with other classes in val")
def own_with_other_classes(run):
    setup = OWN.format(names={"train": ["cat", "cow", "dog"], "val": ["cat", "dog"]})
    process = run.start_train(setup, DATASET="own", CACHE_PATH="cache", CLASS_CONDITIONAL=True).wait()
    assert "the classes cat, cow, dog to train on and cat, dog to validate" in process.err and not run.files("*.pth")
    assert "Done: step" in run.to("unconditional").train(setup, DATASET="own", CACHE_PATH="cache", max_steps=1).out
    return process


@fault("A dataset of your own that no other process can get")
def own_that_cannot_be_pickled(run):
    setup = OWN.format(names={"train": ["cat"], "val": ["cat"]})
    setup += 'multiprocessing.get_start_method = lambda: "spawn"'  # as on Windows and macOS
    process = run.start_train(setup, DATASET="own", CACHE_PATH="cache", NUM_WORKERS=2).wait()
    assert not [path for path in (run.folder / "cache").rglob("*") if path.is_file()]
    settings = {"DATASET": "own", "CACHE_PATH": "cache", "NUM_WORKERS": 0, "max_steps": 1}
    assert "Done: step" in run.to("one process").train(setup, **settings).out
    return process


@fault("Fewer pictures than a step takes")
def too_few_pictures(run):
    return run.start_train(BATCH_SIZE=64, GRAD_ACCUM_STEPS=2).wait()


@fault("Tiny ImageNet with files missing")
def half_of_tiny_imagenet(run):
    (run.folder / "tiny" / "train").mkdir(parents=True)
    return run.start_train(DATASET="tiny-imagenet", DATA_PATH="tiny").wait()


# --- download -----------------------------------------------------------------------------------------

PATIENCE = "from src.data.download import fetch; fetch.__kwdefaults__.update(timeout=(2, 0.3), pause=0.01)"
DATA = bytes(200_000)


class Misbehaving(http.server.BaseHTTPRequestHandler):
    """The first part of the address says how; /file sends self.server.file."""

    def do_GET(self):
        way, body = self.path.split("/")[1], self.server.file
        if way == "missing":
            return self.send_error(404)
        if way == "later":
            self.send_response(429)
            self.send_header("Retry-After", "3600")
            return self.end_headers()
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if way == "html" else "application/zip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if way in ("cut", "stall") else body)
        if way == "stall":
            self.wfile.flush()
            time.sleep(0.6)

    def log_message(self, *args):
        pass


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving) as server:
        server.file = DATA
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def download(run: Runner, server, way: str, **settings) -> Process:
    """A run that has to download its pictures, and does not get them."""
    defaults = {"DATA_URL": f"http://127.0.0.1:{server.server_address[1]}/{way}/a.zip", "DATA_SIZE": 0, "DATA_MD5": "0" * 32}
    process = run.start_train(PATIENCE, DATASET="tiny-imagenet", DATA_PATH="data/tiny", **defaults | settings).wait()
    left = {path.name: path.stat().st_size for path in (run.folder / "data").iterdir()}
    expected = {"tiny-imagenet-200.zip.part"} if way in ("cut", "stall") else {"tiny-imagenet-200.zip"} & set(left)
    assert set(left) == expected, "something half-made is left"
    return process


@fault("The server does not have the file")
def http_404(run, server):
    return download(run, server, "missing")


@fault("The server stalls")
def http_stall(run, server):
    return download(run, server, "stall")


@fault("The line drops again and again")
def http_cut(run, server):
    return download(run, server, "cut")


@fault("There is no network")
def no_network(run, server):
    return download(run, server, "", DATA_URL="http://127.0.0.1:9/a.zip")


@fault("The server asks to wait for long")
def http_later(run, server):
    return download(run, server, "later")


@fault("The server sends a web page")
def http_page(run, server):
    return download(run, server, "html")


@fault("The server has a file of another size")
def http_other_size(run, server):
    return download(run, server, "file", DATA_SIZE=5)


@fault("The checksum is wrong")
def http_checksum(run, server):
    return download(run, server, "file")


@fault("The archive is damaged")
def damaged_archive(run, server):
    return download(run, server, "file", DATA_MD5="")


def archive(**files: int) -> bytes:
    """A zip of files by these names, which say that they unpack to so many bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        for name, size in files.items():
            target.writestr(name, b"x")
            target.filelist[-1].file_size = size
    return file.getvalue()


@fault("The archive reaches outside its folder")
def zip_traversal(run, server):
    server.file = archive(**{"top/../../../evil": 1})
    process = download(run, server, "file", DATA_MD5="")
    assert not list(run.folder.rglob("evil")) and not (run.folder.parent / "evil").exists()
    return process


@fault("The archive is a zip bomb")
def zip_bomb(run, server):
    server.file = archive(**{"top/a": 3 << 30, "top/b": 3 << 30})
    return download(run, server, "file", DATA_MD5="")


# --- what the table has no room for -------------------------------------------------------------------


def test_ctrl_c_while_pictures_are_decoded_is_quiet(run):
    process = stopped_while_decoding(run, signal.SIGINT)
    assert process.code == 130
    assert process.err == "train.py: Stopped at once. What was saved before is kept; the same command goes on.\n"


def test_ctrl_c_twice_amid_a_save_leaves_whole_checkpoints(run):
    """The second one raises inside a write that torch's C++ code asked for."""
    run.train(max_steps=10)
    setup = """
import os, signal, torch

class UnderFire:
    def __init__(self, file):
        self.file, self.writes, self.flush = file, 0, file.flush

    def write(self, data):
        self.writes += 1
        if self.writes == 20:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return self.file.write(data)

save = torch.save
torch.save = lambda state, file: save(state, UnderFire(file))
"""
    said = run.train(setup, SAVE_MINUTES=1e-9, code=130).err
    assert said.endswith("\ntrain.py: Stopped at once. What was saved before is kept; the same command goes on.\n")
    assert {load_checkpoint(run.folder / name)["step"] for name in run.files("*.pth")} == {10}
    assert not run.files(".*part-*")


def test_a_signal_amid_a_download_keeps_what_has_arrived(run, server):
    url = f"http://127.0.0.1:{server.server_address[1]}/stall/a.zip"
    process = run.start_train(DATASET="tiny-imagenet", DATA_PATH="data/tiny", DATA_URL=url, DATA_SIZE=0)
    part = run.folder / "data" / "tiny-imagenet-200.zip.part"
    process.wait(lambda: part.exists() and part.stat().st_size > 0)
    process.send(signal.SIGTERM)
    assert process.wait().code == 143
    assert process.err == "train.py: Stopped at once. What was saved before is kept; the same command goes on.\n"
    assert DATA.startswith(part.read_bytes())


def test_a_signal_that_the_starter_ignores_stays_ignored_as_under_nohup(run):
    run.train("import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)" + signal_at(3, 0, "SIGHUP"), max_steps=5)


def test_where_there_is_no_terminal_progress_is_told_in_lines(run):
    said = run.train("import src.runtime.monitor; src.runtime.monitor.SECONDS_PER_LINE = 0", max_steps=6).out
    assert re.search(r"(?m)^step 3 of 6: loss \d\.\d{4}, [\d,.]+ images/s, [\d.]+ GiB$", said)


def test_a_step_that_is_not_finite_leaves_the_state_before_it(run):
    whole, bad = run.to("whole"), run.to("bad")
    whole.train(max_steps=13)
    process = bad.start_train(INFINITE, SAVE_MINUTES=1e-9).wait()
    assert process.code == 1 and "step 14 is not finite" in process.err
    assert set(differences(bad.state(), whole.state())) <= {"last_step", "best_loss"}  # the end that was aimed at, and its loss


def test_a_not_finite_loss_before_the_first_save_says_that_there_is_none(run):
    process = run.train(INFINITE.replace("13", "3"), code=1)
    assert "step 4 is not finite" in process.err and "nothing was saved yet" in process.err
    assert not run.files("*.pth")


def test_advice_that_is_followed_helps(run, trained):
    """The flags that the sentence on memory gives are accepted, and the run goes on."""
    run.train(max_steps=10)
    advice = run.train(GPU_IS_FULL, code=1).err
    batch, passes = map(int, re.search(r"--batch_size (\d+) --grad_accum_steps (\d+)", advice).groups())
    run.train(BATCH_SIZE=batch, GRAD_ACCUM_STEPS=passes)
    torch.testing.assert_close(run.state()["ema"], trained.state()["ema"], atol=1e-2, rtol=0)


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A disk in memory; the test is skipped where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a disk needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


needs_mount = pytest.mark.skipif(not shutil.which("mount"), reason="there is no mount here")


@needs_mount
def test_a_disk_that_fills_up_keeps_whole_checkpoints_and_room_lets_the_run_go_on(run, trained):
    size = len(trained.files("latest.pth")["checkpoints/latest.pth"])
    with mounted(run.folder / "checkpoints", f"size={size * 4.5:.0f}") as folder:
        process = run.train(code=1)
        assert "No space left on device" in process.err
        assert re.search(r"takes about (\d+) MB", process.err)
        assert {load_checkpoint(path)["step"] for path in folder.glob("*.pth")} == {10, 20}
        assert not list(folder.glob(".*part-*"))
        subprocess.run(["mount", "-o", "remount,size=50m", folder], check=True)
        run.train()
        assert differences(run.state(), trained.state()) == []


@needs_mount
def test_a_cache_on_a_read_only_disk_is_read(run):
    with mounted(run.folder / "cache", "size=10m") as folder:
        run.train(max_steps=1, CACHE_PATH="cache")
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        run.train(max_steps=2, CACHE_PATH="cache")
        assert "Read-only file system" in run.train(CACHE_PATH="cache", IMAGE_SIZE=16, RUN="other", code=1).err
