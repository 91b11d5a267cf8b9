"""A CUDA device that is not there, for tests: whoever waits for it, or copies from it, is caught.

Tensors on "cuda" are fake (torch's FakeTensorMode): they have a shape, a dtype and a device, and no values. Asking for a value
waits for the device, and that is what `Watch` forbids. Tensors on the CPU are real, so order, keys and tables are those of a
real run.

Seen: every operation that reaches the dispatcher, forward, backward, optimizer and average alike, and torch.cuda.synchronize.
NOT seen, because it happens below the dispatcher or needs a driver:
- waits inside a kernel, the allocator, or a library (cuDNN's search, NCCL);
- whether a source is pinned: a non_blocking copy from pageable memory is asynchronous for small sources (64 KB and less are
  staged) and waits for larger ones. `Copy.bytes` tells which it would be;
- the kernel that attention takes on CUDA, and autocast itself: C++ is told that fake tensors lie on the CPU (see `Watch`), and
  its autocast passes them by. `WatchMethods` casts for the functions in LOWER instead;
- the foreach forms that torch picks by itself: it refuses them for fake tensors. What asks for fused or foreach gets it.
With a GPU, torch.cuda.set_sync_debug_mode("error") is the real test.
"""

import contextlib
import importlib
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)

# Operations whose result, or its shape, the host has to know.
WAITS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "argwhere", "nonzero_numpy"),
    *("masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "bincount"),
    *("histogram", "_linalg_check_errors", "_assert_async_wait", "tensor_split"),
}


class Wait(AssertionError):
    """The host would wait for the device."""


class Copy(NamedTuple):
    """One copy from the host to the device."""

    bytes: int
    non_blocking: bool


def is_on(device, value) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == device


class Watch(TorchDispatchMode):
    """Raises Wait where the host would wait; counts operations on the device, and lists copies to it."""

    def __init__(self):
        super().__init__()
        self.forget()

    def forget(self) -> None:
        self.copies: list[Copy] = []
        self.ops = 0
        self.doubles: list[str] = []  # operations that give float64, which an Apple GPU (MPS) does not have

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            # C++ alone asks this (Python reads FakeTensor.device). Autograd would want the streams of a CUDA device, and there
            # is none: hasPrimaryContext. So C++ is told "cpu". FakeTensorMode goes by Python and still sees mixed devices.
            device = func(*args)
            return torch.device("cpu") if device.type == "cuda" else device
        leaves = tree_leaves((args, kwargs))
        fakes = [a for a in leaves if isinstance(a, FakeTensor)]
        to = kwargs.get("device")
        if not fakes and (to is None or torch.device(to).type != "cuda"):
            with no_dispatch():  # the CPU is real
                return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if fakes and to is not None and torch.device(to).type == "cpu":
            # Autograd asks for a gradient where it believes the tensor lies. Python's own .to("cpu") never comes here.
            kwargs = kwargs | {"device": fakes[0].device}
        if name in WAITS:
            raise Wait(f"{func} waits for the device")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        ):
            raise Wait(f"{func} with a mask waits for the number of true entries; use where or masked_fill")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise Wait(f"{func} without output_size waits for the sum of the repeats")
        self.count_copies(func, name, args, kwargs)
        self.ops += 1
        given = func(*args, **kwargs)
        if any(is_on("cuda", value) and value.dtype == torch.float64 for value in tree_leaves(given)):
            self.doubles.append(name)
        return given

    def count_copies(self, func, name, args, kwargs) -> None:
        if name in ("_to_copy", "device_put"):
            source, non_blocking = args[0], kwargs.get("non_blocking", name == "device_put" and len(args) > 2 and args[2])
            target = torch.device(args[1] if name == "device_put" else kwargs.get("device") or source.device)
        elif name in ("copy_", "copy"):
            target, source, non_blocking = args[0].device, args[1], (*args[2:3], kwargs.get("non_blocking", False))[0]
        elif name in ("_foreach_copy_", "_foreach_copy"):
            for mine, theirs in zip(args[0], args[1]):
                self.count_copies(func, "copy_", (mine, theirs, *args[2:3]), {})
            return
        else:
            return
        if is_on("cuda", source) and target.type == "cpu":
            raise Wait(f"{func} copies from the device to the host")
        if is_on("cpu", source) and target.type == "cuda":
            self.copies.append(Copy(source.nbytes, bool(non_blocking)))


# What autocast runs in its lower precision, as far as a U-Net has it.
LOWER = {torch.conv2d, F.linear, F.scaled_dot_product_attention, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm}
LOWER |= {torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm, torch.Tensor.bmm, torch.einsum}


class WatchMethods(TorchFunctionMode):
    """Does autocast's work, and raises Wait for tensor.cpu(), .to("cpu") and the like: C++ believes that the tensor lies on the
    CPU already, and would do nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.cpu, torch.Tensor.to, torch.Tensor.numpy) and is_on("cuda", args[0]):
            target = torch.device("cpu")
            if func is torch.Tensor.to:
                other = kwargs.get("other", args[1] if len(args) > 1 else None)
                target = other.device if isinstance(other, torch.Tensor) else torch._C._nn._parse_to(*args[1:], **kwargs)[0]
            if target is not None and target.type == "cpu":
                raise Wait(f"Tensor.{func.__name__} copies from the device to the host")
        if func in LOWER and torch.is_autocast_enabled("cpu"):
            low = torch.get_autocast_dtype("cpu")
            args, kwargs = tree_map(lambda a: a.to(low) if is_on("cuda", a) and a.is_floating_point() else a, (args, kwargs))
        return func(*args, **kwargs)


@contextlib.contextmanager
def fake_cuda():
    """A CUDA device of 80 GB without a driver; yields its Watch."""

    def refuse(*args, **kwargs):
        raise Wait("torch.cuda.synchronize")

    autocast, group = torch.autocast.__init__, _group_tensors_by_device_and_dtype

    def autocast_on_cpu(self, device_type, *args, **kwargs):
        autocast(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    def grouped(tensor_lists, with_indices=False):  # C++ groups by device: give the groups back their own
        groups = group(tensor_lists, with_indices)
        return {(lists[0][0].device, dtype): (lists, indices) for (_, dtype), (lists, indices) in groups.items()}

    with contextlib.ExitStack() as held:
        for name in ("torch.optim.optimizer", "torch.nn.utils.clip_grad"):  # torch.optim hides its module: patch finds none
            held.enter_context(patch.object(importlib.import_module(name), "_group_tensors_by_device_and_dtype", grouped))
        held.enter_context(patch("torch.cuda.mem_get_info", lambda device=None: (80 << 30, 80 << 30)))
        held.enter_context(patch("torch.cuda.synchronize", refuse))
        held.enter_context(patch.object(torch.autocast, "__init__", autocast_on_cpu))
        held.enter_context(WatchMethods())
        held.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield held.enter_context(Watch())
