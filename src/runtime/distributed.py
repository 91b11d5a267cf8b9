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

PATIENCE = timedelta(days=1)  # for what one process does while the others wait: a download, a save to a slow disk


@dataclass(frozen=True)
class World:
    """Process number `rank` of `size`, number `local_rank` on its machine. Alone, every method does nothing and gives back
    what it was given, and torch.distributed is never called."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @staticmethod
    @contextlib.contextmanager
    def join() -> Iterator["World"]:
        """Meet the processes that torchrun started, by the variables in which it says who is who. All but the first
        print nothing, so that a line appears once; their errors they do say."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        world = World(*(int(os.environ[name]) for name in names)) if "WORLD_SIZE" in os.environ else World()
        if world.size == 1:
            yield world
            return
        if not world.is_main:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # sys.stdout, and what torch's own code prints past it
        store, *_ = next(dist.rendezvous("env://", timeout=PATIENCE))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it outlives a restart, with addresses of the dead
            store = dist.PrefixStore(f"restart_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        # gloo for what lies in the machine's memory, NCCL for what lies on a GPU: flags need no wait for the GPU.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=PATIENCE)
        world.barrier()  # one that ends at once, on a bad flag say, must not take the store from those still arriving
        yield world
        dist.destroy_process_group()  # after an error the process ends without: the others may be gone

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    @property
    def hides_bars(self) -> bool | None:
        """tqdm's `disable`: None, which shows bars on a terminal alone, or True where another process shows them."""
        return None if self.is_main else True

    def share(self, batch_size: int) -> int:
        """How many of the images of a batch are this process's, as many as every other's. Raises FlagError."""
        if batch_size % self.size:
            below = batch_size // self.size * self.size
            near = " or ".join(str(size) for size in (below, below + self.size) if size)
            raise FlagError(
                f"--batch_size: got {batch_size}, the images per pass of all {self.size} processes together; each takes the "
                f"same share, so allowed are multiples of {self.size}, for example {near}."
            )
        return batch_size // self.size

    def mine(self, items: Any) -> Any:
        """This process's of the items of a sequence, every size-th: what the processes divide among them, batch by batch."""
        return items[self.rank :: self.size]

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.sum(torch.zeros(1))  # on the CPU, by gloo: dist.barrier would take the GPU

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """What must not be done by all at once: first one process does it, then one on each other machine, then the rest.
        So the second and third find what the first has made."""
        turn = 0 if self.is_main else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self.barrier()
        yield
        for _ in range(2 - turn):
            self.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place, on whatever device."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def max(self, *values: int) -> list[int]:
        """The largest that any process gives, one by one."""
        if self.size == 1:
            return list(values)
        largest = torch.tensor(values)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def check_same(self, number: int, what: str) -> None:
        """Raise UserError where the number is not the same in all processes."""
        low, high = self.max(-number, number)
        if -low != high:
            raise UserError(f"The processes do not agree on {what}. {ADVICE}")

    def parallel(self, network: nn.Module, device: torch.device) -> Any:
        """The network with gradients that are the mean over all processes, summed while the backward pass goes on."""
        if self.size == 1:
            return network
        devices = [device] if device.type == "cuda" else None
        return DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True)

    def keeping_gradients(self, network: Any) -> contextlib.AbstractContextManager:
        """For all passes of a step but the last: gradients stay in their process until the last pass sends them."""
        return network.no_sync() if self.size > 1 else contextlib.nullcontext()


ADVICE = "Start all of them with the same flags, on a --checkpoint_path that all machines share."


def lost_contact(error: BaseException) -> bool:
    """Whether the error says that another process is gone. gloo has no type for it, only words."""
    is_told = isinstance(error, (dist.DistError, RuntimeError)) and "WORLD_SIZE" in os.environ
    words = ("gloo", "onnection closed", "onnection reset", "NCCL", "Socket", "TCPStore")
    return is_told and (isinstance(error, dist.DistError) or any(word in str(error) for word in words))
