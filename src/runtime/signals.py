"""Ctrl-C, SIGTERM, a closed terminal and the signals of clusters stop a run where nothing is lost, and how the scripts end."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from src.runtime.device import is_out_of_memory
from src.runtime.distributed import World, from_environment, lost_contact
from src.runtime.streams import unfailing_output
from src.utils import UserError, remove_empty

SIGNALS = [getattr(signal, f"SIG{name}") for name in ("INT", "TERM", "HUP", "USR1", "USR2") if hasattr(signal, f"SIG{name}")]


class StopRequest:
    """Inside `with StopRequest() as stop:` a signal sets stop.signal and raises KeyboardInterrupt at once. Inside
    `with stop.postponed("step"):` it only sets stop.signal, which the loop there reads, and says what is being finished; a
    second Ctrl-C raises. What the parent process ignores stays ignored, as under nohup. Other threads get no handlers."""

    signal: int | None = None
    task: str = ""  # what a signal has to wait for; "" if nothing
    out_of_memory: str = "Out of memory."  # what to say if that ends the script

    def __enter__(self) -> "StopRequest":
        self.process = os.getpid()
        is_main_thread = threading.current_thread() is threading.main_thread()  # Python allows handlers there alone
        heeded = [number for number in SIGNALS if is_main_thread and signal.getsignal(number) is not signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.note) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def postponed(self, task: str) -> Iterator[None]:
        """A block that is worth finishing; task: what it does."""
        before, self.task = self.task, task
        try:
            yield
        finally:
            self.task = before

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A block in which nothing would be lost. One that the block swallowed or took for a fault raises at its end."""
        try:
            yield
        finally:
            if self.signal is not None:
                raise KeyboardInterrupt

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        if os.getpid() != self.process:
            return  # a process that decodes images gets Ctrl-C as well: it ends with this one
        is_second = self.signal is not None
        self.signal = number
        if not self.task or (is_second and number == signal.SIGINT):
            raise KeyboardInterrupt
        if not is_second:
            line = f"\n{signal.Signals(number).name}: finishing the {self.task}, then saving. A second Ctrl-C stops at once.\n"
            with contextlib.suppress(OSError):  # Ctrl-C has ended `| tee log` as well
                os.write(2, line.encode())  # not print: the signal may have come in the middle of one

    def agree(self, world: World) -> bool:
        """Whether a signal came to any process of the job; then all stop."""
        self.signal = world.max(self.signal or 0)[0] or None
        return self.signal is not None


def run_script(name: str, body: Callable[[StopRequest], None], stopped: str) -> int:
    """Run the body of a script and return its exit code: 0, 2 for flags, 1 for other errors of the user, 128 + the signal.
    Errors that the user can fix print one sentence to stderr. A traceback means a bug in this program.
    stopped: what is kept after a signal that ended the body at once."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large memory pages: 12% of a training step on a CPU
    stop = StopRequest()
    with unfailing_output(), contextlib.ExitStack() as at_end:
        at_end.callback(remove_empty)
        try:
            with stop:  # inside: a third Ctrl-C, amid the message below, ends without a traceback
                body(stop)
            return 128 + stop.signal if stop.signal else 0  # as shells report it: 143 for SIGTERM
        except SystemExit as end:  # of --help
            return int(end.code or 0)
        except UserError as error:
            message, code = str(error), error.exit_code
        except ModuleNotFoundError as error:
            message, code = f"{error.name} is not installed. Run 'pip install -r requirements.txt'.", 1
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                message, code = stop.out_of_memory, 1
            elif lost_contact(error):
                message, code = "Another process of this job is gone; its own message says why. Files are as last saved.", 1
            else:
                raise
        except FloatingPointError as error:
            message, code = f"{error}. Try --precision fp32; if that does not help, the weights are damaged or diverged.", 1
        except KeyboardInterrupt:
            message, code = stopped, 128 + (stop.signal or signal.SIGINT)
        rank = 0
        with contextlib.suppress(UserError):  # which is the message then
            rank = from_environment().rank
        if rank == 0 or code == 1:  # bad flags and signals reach all processes alike: once is enough
            print(f"{name}:{f' process {rank}:' if rank else ''} {message}", file=sys.stderr)
        return code
