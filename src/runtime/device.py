"""Where and in which precision the network runs, chosen once at start-up."""

import math
import os
import platform
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from src.model import UNet
from src.runtime.early import others
from src.runtime.kernels import speed_up
from src.utils import FlagError, count

COMPILE_PAYS = 2000  # calls of the network that take as long as to compile it: an estimate, a minute by 30 ms saved
SLOWER = "Warning: the network is not compiled and runs more slowly"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called `name`; "auto" is the first there is of CUDA, MPS, CPU. Raises FlagError where it is absent.
    local_rank: which process on this machine asks; each has a GPU to itself."""
    known = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [device for device, is_there in known.items() if is_there]
    name = there[0] if name == "auto" else name
    if name not in there:
        raise FlagError(f"--device: got {name}, but torch {torch.__version__} has only {', '.join(there)}. Use --device auto.")
    if name != "cuda":
        return torch.device(name)
    if local_rank >= torch.cuda.device_count():
        found = f"{count(torch.cuda.device_count(), 'GPU')}, too few for process number {local_rank}, counted from 0"
        raise FlagError(f"--device: this machine has {found}. Give torchrun a smaller --nproc_per_node, or --device cpu.")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def computes_in_bf16(device: torch.device) -> bool:
    """Whether bf16 arithmetic is in the hardware, not emulated: NVIDIA from Ampere on, x86 with AVX512_BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # torch has no public name for these yet
        return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return False


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products under autocast: "auto" is bf16 if the hardware has it, else fp32. Raises FlagError."""
    if name == "fp16" and device.type == "cpu":
        raise FlagError("--precision fp16: the device is a CPU; allowed there are fp32 and bf16.")
    if name == "auto":
        name = "bf16" if computes_in_bf16(device) else "fp32"
    return DTYPES[name]


class InPrecision(nn.Module):
    """A network whose matrix products run in `dtype` by autocast; float32 changes nothing. Arguments and result stay."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.model, self.device_type, self.dtype = model, device.type, dtype

    def forward(self, *args):
        with torch.autocast(self.device_type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(*args)


def place(model: UNet, device: torch.device, dtype: torch.dtype) -> UNet:
    """The same network on the device, in the memory layout and with the modules that are fastest there in `dtype`."""
    model.to(memory_format=torch.channels_last).to(device)  # type: ignore[call-overload]
    speed_up(model, device, dtype)
    return model


def should_compile(choice: str, device: torch.device, calls: float = math.inf) -> bool:
    """Whether to compile the network. "auto" says yes on CUDA where `calls` of it pay for the compilation; on a CPU even a
    tiny network takes a minute to compile. False, with a line that says why, where the compiler does not work."""
    if choice == "false" or (choice == "auto" and (device.type != "cuda" or calls < COMPILE_PAYS)):
        return False
    if fault := compiler_fault(device):
        print(f"{SLOWER}: {fault}")
    return not fault


def compiler_fault(device: torch.device) -> str:
    """What torch.compile needs and does not find here, and what to install, or ""."""
    if os.name == "posix":
        # Triton builds its launcher in C; on a CPU the kernels themselves are C++.
        name, usual, package = ("CC", ["gcc", "clang"], "gcc") if device.type == "cuda" else ("CXX", ["g++", "clang++"], "g++")
        wanted = shlex.split(os.environ.get(name, ""))[:1] or usual
        header = Path(sysconfig.get_paths()["include"], "Python.h")
        if not any(map(shutil.which, wanted)):
            return f"torch.compile needs {' or '.join(wanted)}; not found. Run 'apt install {package}', or set {name}."
        if not header.exists():
            python = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
            return f"torch.compile needs {header}; not found. Run 'apt install {python}'."
    return ""


def compiled(network: Callable) -> Callable:
    """torch.compile(network). Should that fail on this very network, a line says why and the network runs as it is."""
    quick = torch.compile(network)

    def call(*args: Any) -> Any:
        nonlocal quick
        try:
            return quick(*args)
        except Exception as error:  # also what Triton raises at the first launch
            if quick is network or is_out_of_memory(error):
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            print(f"{SLOWER}: torch.compile failed ({reason}).")
            quick = network
        return quick(*args)

    return call


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if device.type == "mps":
        return f"Apple GPU ({platform.processor()})"
    threads = torch.get_num_threads()
    is_crowded = threads > 1 and (busy := others()) > max(0, (os.cpu_count() or 1) - threads)
    advice = f" ({busy} of other programs run as well: try OMP_NUM_THREADS=1)" if is_crowded else ""
    return f"CPU, {count(threads, 'thread')}{advice}"


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read next is right."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory(device: torch.device) -> float:
    """The most memory taken so far, in GiB: of the GPU, or on a CPU of this process. 0 where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    if os.name == "nt":
        return 0.0
    import resource  # POSIX only

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the GPU or of the machine. torch has words for that, and a type in one case alone."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "bad_alloc")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in str(error) for word in words))


def memory_advice(batch_size: int, grad_accum_steps: int) -> str:
    """What to do when memory ran out in training: the numbers that keep the effective batch."""
    if batch_size == 1:
        return "Out of memory with a batch of one image. Use a smaller --unet_dim or --image_size."
    smaller = next(size for size in range(batch_size // 2, 0, -1) if batch_size % size == 0)
    found = f"Out of memory with BATCH_SIZE {batch_size} and GRAD_ACCUM_STEPS {grad_accum_steps}"
    less = f"less with --batch_size {smaller} --grad_accum_steps {grad_accum_steps * batch_size // smaller}"
    return f"{found}. The same effective batch needs {less}; the run goes on from its last save."
