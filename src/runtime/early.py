"""What is settled before torch is imported: every script calls `settle` first. Needs the standard library alone."""

import contextlib
import os
import signal
import time
from pathlib import Path

CPU_MAX, LOAD = Path("/sys/fs/cgroup/cpu.max"), Path("/proc/loadavg")  # of Linux: a container's limit; what is running now
SPINS = "20000"  # turns that a thread waits for the others before it sleeps, below a millisecond; OpenMP of gcc takes 300,000


def settle() -> None:
    """Let Ctrl-C end the imports without a traceback, and set what OpenMP reads at its start, where the user has not.

    Threads that wait spin, and beside other busy processes they spin on the core that the thread they wait for needs. So they
    spin for a short time, or not at all where other processes take all cores. The number of threads does not follow the load:
    the last bits of the weights depend on it, and a resumed run must get the same."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with contextlib.suppress(OSError, ValueError):  # no such file; "max" for no limit
        quota, period = map(int, CPU_MAX.read_text().split())
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(quota // period, cores()))))
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        os.environ["GOMP_SPINCOUNT"] = "0" if others() >= (os.cpu_count() or 1) else SPINS


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def others() -> int:
    """How many threads of other processes are running on this machine; 0 where Linux does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        looks = []
        for _ in range(5):
            time.sleep(0.002)
            looks.append(int(LOAD.read_text().split()[3].partition("/")[0]) - 1)  # one is this look
        return min(looks)  # a short burst does not count
    return 0
