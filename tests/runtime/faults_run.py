"""Faults of docs/reliability.md: a run that is stopped, numbers and memory, the compiler."""

import os
import signal
import subprocess
import time

from tests.runs import Process, Runner, differences, ended, signal_at
from tests.runtime.faults import drawn, fault, kept, saved_run
from tests.runtime.test_distributed import train_all
from tests.test_resume import SLOW_PREVIEW, SLOW_VALIDATION

# --- the run is stopped -------------------------------------------------------------------------------

# Output that is lost, from the start or from step 3 on.
READER_GONE = """
import os, subprocess
reader, writer = os.pipe()
head = subprocess.Popen(["head", "-n", "1"], stdin=reader, stdout=subprocess.DEVNULL)
os.close(reader), os.dup2(writer, 1), os.dup2(writer, 2), os.close(writer)
"""
DISK_FULL = "import os; os.dup2(full := os.open('/dev/full', os.O_WRONLY), 1), os.dup2(full, 2)"
CLOSED = "import os, sys; sys.stdin = sys.stdout = sys.stderr = None; os.closerange(0, 3)"
TERMINAL_GONE = """
import os, src.dataset
ours, theirs = os.openpty()
os.dup2(theirs, 1), os.dup2(theirs, 2), os.close(theirs)
draw = src.dataset.TrainBatches.__call__
src.dataset.TrainBatches.__call__ = lambda self, step, micro: (step == 3 and os.close(ours), draw(self, step, micro))[1]
"""


@fault("Ctrl-C", setup=signal_at(4, 0, "SIGINT"))
@fault("SIGTERM, as a pre-empted machine gets it", setup=signal_at(4, 0, "SIGTERM"))
@fault("The terminal is closed (SIGHUP)", setup=signal_at(4, 0, "SIGHUP"))
@fault("SIGUSR1, as a cluster sends it before the time is up", setup=signal_at(4, 0, "SIGUSR1"))
@fault(
    "Ctrl-C, where `tee` or `head` reads the output and is gone",
    setup=READER_GONE + signal_at(4, 0, "SIGINT"), CACHE_PATH="cache", NUM_WORKERS=2,
)  # fmt: skip
def stopped_at_step_5(run, setup, **settings):
    process = run.start_train(setup, **settings).wait()
    assert run.state()["step"] == 5
    return process


@fault("Ctrl-C twice", setup=SLOW_PREVIEW.replace("    return", "    os.kill(os.getpid(), signal.SIGINT)\n    return"))
@fault("`kill -9`, or the power goes", setup=signal_at(14, 0, "SIGKILL"))
def last_save_is_kept(run, setup, says=""):
    before = saved_run(run)
    process = run.start_train(setup).wait()
    assert says in process.err
    kept(run, before)
    return process


@fault("SIGTERM during a validation or preview")
def sigterm_in_validation(run):
    process = run.start_train(SLOW_VALIDATION).wait()
    assert run.state()["step"] == 10
    return process


@fault("The log's disk is full", setup=DISK_FULL)
@fault("stdout and stderr are closed (`>&- 2>&-`)", setup=CLOSED)
@fault("The terminal is gone, and no signal says so", setup=TERMINAL_GONE)
def ended_unheard(run, setup):
    process = run.start_train(setup, CACHE_PATH="cache", NUM_WORKERS=2, max_steps=10).wait()
    assert run.state()["step"] == 10 and len(run.files("samples/*.png")) == 1
    return process


SLOW_DECODING = """
import time, src.data.folder
open_image = src.data.folder.open_image
src.data.folder.open_image = lambda path: time.sleep(1) or open_image(path)
"""


@fault("SIGTERM while pictures are decoded", number=signal.SIGTERM)
def stopped_while_decoding(run: Runner, number: int) -> Process:
    """By a signal to the whole group of processes, as a terminal sends Ctrl-C: those that decode get it too."""
    process = run.start_train(SLOW_DECODING, CACHE_PATH="cache", NUM_WORKERS=2)
    process.wait(lambda: "decoding" in process.out)
    time.sleep(0.5)
    os.killpg(process.pid, number)
    process.wait(timeout=30)
    assert not [path for path in (run.folder / "cache").rglob("*") if path.is_file()]
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
NO_NUMBER = """
from src.diffusion import GaussianDiffusion
GaussianDiffusion.validation_losses = lambda self, network, x_0, *_: x_0.new_full((len(x_0),), float("nan"))
"""

fault("The loss or gradient is not finite", setup=INFINITE, says="of step 14 ")(last_save_is_kept)
fault("The network overflows in a validation", setup=NO_NUMBER, says="after step 20 ")(last_save_is_kept)


@fault("The gradient overflows fp16 at every scale")
def fp16_overflows(run):
    before = saved_run(run)
    setup = INFINITE + "import src.runtime.device as d, torch; d.pick_precision = lambda *_: torch.float16"  # even on a CPU
    process = run.start_train(setup, PRECISION="fp16", DEVICE="auto", COMPILE=False, EPOCHS=100, SAVE_EVERY=1000).wait()
    state = run.state()
    assert state["step"] >= 20 and all(weights.isfinite().all() for weights in state["model"].values())
    assert len(run.files("*.pth")) == len(before) + 1, "more was saved than latest.pth and its predecessor"
    return process


GPU_IS_FULL = """
import torch
from src.diffusion import GaussianDiffusion

def out_of_memory(*args, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

GaussianDiffusion.training_losses = GaussianDiffusion.denoiser = out_of_memory
"""
# The address space that there is now, and 150 MB.
LITTLE_MEMORY = """
import resource
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 150_000_000,) * 2)
"""


ADVICE = "BATCH_SIZE 8 and GRAD_ACCUM_STEPS 1. The same effective batch needs less with --batch_size 4 --grad_accum_steps 2;"
fault("The GPU is out of memory", setup=GPU_IS_FULL, says=ADVICE)(last_save_is_kept)


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


@fault("The network overflows while drawing")
def overflow_while_drawing(run, trained):
    process = drawn(run, trained, "--num_samples", 3, "--steps", 20, setup=OVERFLOW).wait()
    assert not run.files("*.png")
    return process


@fault("Out of memory while drawing")
def memory_while_drawing(run, trained):
    assert drawn(run, trained, "--batch_size", 1, "--num_samples", 2).wait().code == 0
    before = run.files("*.png")
    process = drawn(run, trained, "--batch_size", 1, "--num_samples", 3, setup=GPU_IS_FULL).wait()
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
