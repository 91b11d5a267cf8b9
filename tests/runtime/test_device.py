"""The device and what it can do."""

import sysconfig

import pytest
import torch

from src.runtime import device
from src.runtime.device import compiled, compiler_fault, is_out_of_memory, memory_advice, pick_device, should_compile
from src.utils import FlagError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_more_processes_than_gpus_are_refused_and_fewer_or_a_cpu_are_not(monkeypatch):
    for name, value in {"is_available": True, "device_count": 1, "set_device": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    with pytest.raises(FlagError, match=r"1 GPU, too few .* number 1, .* a smaller --nproc_per_node, or --device cpu"):
        pick_device("cuda", local_rank=1)
    assert pick_device("cuda", local_rank=0) == torch.device("cuda", 0) and pick_device("cpu", local_rank=1) == CPU


# --- memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "passes", "advice"),
    [
        (16, 1, "--batch_size 8 --grad_accum_steps 2"),
        (9, 2, "--batch_size 3 --grad_accum_steps 6"),
        (7, 1, "--batch_size 1 --grad_accum_steps 7"),
        (1, 4, "a smaller --unet_dim or --image_size"),
    ],
)
def test_the_advice_on_memory_keeps_the_effective_batch(batch, passes, advice):
    assert advice in memory_advice(batch, passes)


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 5.07 GB)"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (MemoryError("std::bad_alloc"), True),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_is_told_from_our_bugs(error, is_memory):
    assert is_out_of_memory(error) == is_memory


# --- the compiler -------------------------------------------------------------------------------------


def raising(error):
    def call(*args, **options):
        raise error

    return call


@pytest.mark.parametrize(("where", "variable", "package"), [(CPU, "CXX", "g++"), (CUDA, "CC", "gcc")])
def test_a_compiler_that_is_not_there_is_named_before_it_is_needed(monkeypatch, where, variable, package):
    monkeypatch.setenv(variable, "/nonexistent/cc -O2")
    advice = f"torch.compile needs /nonexistent/cc; not found. Run 'apt install {package}', or set {variable}."
    assert compiler_fault(where) == advice
    monkeypatch.delenv(variable)
    monkeypatch.setenv("PATH", "")
    assert compiler_fault(where).startswith(f"torch.compile needs {package} or clang")


@pytest.mark.parametrize("where", [CPU, CUDA])
def test_a_header_that_is_not_there_is_named_too(monkeypatch, tmp_path, where):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert compiler_fault(where).startswith(f"torch.compile needs {tmp_path}/Python.h; not found. Run 'apt install python3.")


def test_compiling_has_to_pay(monkeypatch, capsys):
    monkeypatch.setattr(device, "compiler_fault", lambda device: "")
    assert should_compile("auto", CUDA) and should_compile("auto", CUDA, 2000) and not should_compile("auto", CUDA, 1999)
    assert not should_compile("auto", CPU) and not should_compile("false", CUDA)
    assert should_compile("true", CPU, 0) and should_compile("true", CUDA, 0)
    monkeypatch.setattr(device, "compiler_fault", lambda device: "there is no compiler.")
    assert not should_compile("auto", CUDA) and not should_compile("true", CPU)
    assert capsys.readouterr().out == 2 * "Warning: the network is not compiled and runs more slowly: there is no compiler.\n"


def test_an_error_of_the_network_itself_is_not_laid_to_the_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network: network)
    with pytest.raises(ValueError, match="our own"):
        compiled(raising(ValueError("our own")))(1)
    with pytest.raises(torch.OutOfMemoryError):
        compiled(raising(torch.OutOfMemoryError("CUDA out of memory")))(1)
