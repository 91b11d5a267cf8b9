"""The processes that work on one job together: those that torchrun started, or this one alone."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from src.utils import FlagError, UserError

TIMEOUT = timedelta(days=1)  # for what one process does while the others wait: a download, a save to a slow disk


@dataclass(frozen=True)
class World:
    """Process number `rank` of `size`, number `local_rank` on its machine. With one process every method does nothing and
    returns what it was given, and torch.distributed is never called."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @staticmethod
    @contextlib.contextmanager
    def join() -> Iterator["World"]:
        """Meet the processes that torchrun started; it says who is who in the environment. All but the main process print
        nothing to stdout, so that a line appears once. Errors are printed by every process."""
        world = from_environment()
        if world.size == 1:
            yield world
            return
        if not world.is_main:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # also what torch's own code prints past sys.stdout
        try:
            store, *_ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        except (ValueError, RuntimeError) as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            why = "the port is in use" if "EADDRINUSE" in str(error) else str(error).splitlines()[0].rstrip(".")
            raise UserError(f"The processes cannot meet at {address}: {why}. {TORCHRUN}") from None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it survives a restart and holds addresses of the dead
            store = dist.PrefixStore(f"restart_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        # gloo for tensors in the machine's memory, NCCL for tensors on a GPU: flags need no wait for the GPU.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=TIMEOUT)
        world.barrier()  # if one ended at once, on a bad flag say, it would take the store from those still arriving
        yield world
        dist.destroy_process_group()  # not after an error: the other processes may be gone

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def local_batch_size(self, batch_size: int) -> int:
        """This process's number of images in a batch, the same in every process. Raises FlagError."""
        if batch_size % self.size:
            below = batch_size // self.size * self.size
            near = " or ".join(str(size) for size in (below, below + self.size) if size)
            found = f"got {batch_size}, the images per pass of all {self.size} processes together. Each takes the same number"
            raise FlagError(f"--batch_size: {found}, so allowed are multiples of {self.size}, for example {near}.")
        return batch_size // self.size

    def shard(self, items: Any) -> Any:
        """Every size-th item of a sequence, starting at this rank. Together the processes cover all items."""
        return items[self.rank :: self.size]

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.sum(torch.zeros(1))  # on the CPU, by gloo: dist.barrier would take the GPU

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the block on the main process, then on one per machine, then on the rest, which find what the first have made."""
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self.barrier()
        yield
        for _ in range(2 - turn):
            self.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place, on any device."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def max(self, *values: int) -> list[int]:
        """The largest value of any process, one by one."""
        largest = torch.tensor(values)
        if self.size > 1:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def check_same(self, number: int, what: str) -> None:
        """Raise UserError if the number is not the same in all processes."""
        low, high = self.max(-number, number)
        if -low != high:
            advice = "Start all of them with the same flags, on a --checkpoint_path that all machines share."
            raise UserError(f"The processes do not agree on {what}. {advice}")

    def parallel(self, network: nn.Module, device: torch.device) -> Any:
        """The network with gradients that are the mean over all processes, summed during the backward pass."""
        if self.size == 1:
            return network
        devices = [device] if device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True)

    def no_sync(self, network: Any, unless: bool) -> contextlib.AbstractContextManager:
        """Keep gradients in this process during the block. The last pass of a step sends them: unless=True."""
        return network.no_sync() if self.size > 1 and not unless else contextlib.nullcontext()


TORCHRUN = "Start several processes with torchrun (docs/scaling.md). For one process, unset WORLD_SIZE."


def from_environment() -> World:
    """Which process this is, as torchrun says. Clusters also set some of these names for a single process: empty, or to 1.
    Raises UserError if several processes are announced and something is missing or no number."""
    found = {name: os.environ.get(name, "").strip() for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")}
    if found["WORLD_SIZE"] in ("", "0", "1"):
        return World()
    for name, text in {**found, "MASTER_ADDR": os.environ.get("MASTER_ADDR", "")}.items():
        if not text:
            raise UserError(f"WORLD_SIZE is {found['WORLD_SIZE']}, but {name} is not set. {TORCHRUN}")
        if name in found and not text.isdecimal():
            raise UserError(f"The environment has {name}={text}, expected a number. {TORCHRUN}")
    size, rank, local_rank, _ = map(int, found.values())
    if not rank < size:
        raise UserError(f"The environment has RANK={rank}, expected a number below WORLD_SIZE={size}. {TORCHRUN}")
    return World(rank, local_rank, size)


def lost_contact(error: BaseException) -> bool:
    """Whether the error says that another process is gone. gloo has no type for it, only words."""
    words = ("gloo", "onnection closed", "onnection reset", "NCCL", "Socket", "TCPStore")
    is_told = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return "WORLD_SIZE" in os.environ and (isinstance(error, dist.DistError) or is_told)
