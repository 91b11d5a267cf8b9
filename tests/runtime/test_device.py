"""The device and what it can do."""

import pytest
import torch

from src.runtime.device import is_out_of_memory, memory_advice

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
