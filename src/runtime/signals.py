"""Ctrl-C, SIGTERM and a closed terminal, met where nothing is lost."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from src.runtime.distributed import World

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class StopRequest:
    """Inside `with StopRequest() as stop:` a signal sets stop.signal and raises KeyboardInterrupt at once. Inside
    `with stop.postponed():` it only sets stop.signal, for the loop there to read; a second Ctrl-C still raises.

    What the starter of the process ignores stays ignored, as under nohup.
    """

    signal: int | None = None
    is_postponed = False

    def __enter__(self) -> "StopRequest":
        self.process = os.getpid()
        self.terminals = [handle for handle in (1, 2) if os.isatty(handle)]
        heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.note) for number in heeded}
        self.hook_before, sys.unraisablehook = sys.unraisablehook, self.note_unraisable
        return self

    def __exit__(self, *_: object) -> None:
        sys.unraisablehook = self.hook_before
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def postponed(self) -> Iterator[None]:
        """Where work is in hand that is worth finishing."""
        self.is_postponed = True
        try:
            yield
        finally:
            self.is_postponed = False

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Where nothing would be lost, also inside `postponed`. A signal that came before raises here, and so does one
        that ended the block by another error, such as the death of the processes that the signal reached as well."""
        before, self.is_postponed = self.is_postponed, False
        try:
            if self.signal is None:
                yield
        finally:
            self.is_postponed = before
            if self.signal is not None:
                raise KeyboardInterrupt

    def note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return  # a process that decodes images, which Ctrl-C reaches as well: it ends with this one
        if number == getattr(signal, "SIGHUP", None):
            self.leave_terminal()
        is_second = self.signal is not None
        self.signal = number
        if not self.is_postponed or (is_second and number == signal.SIGINT):
            raise KeyboardInterrupt

    def note_unraisable(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """What is raised amid a fork or a destructor Python prints with its traceback and throws away. Where a signal is the
        reason, print nothing, and if it was the signal's own error that went lost, ask again in a moment."""
        if self.signal is None:
            self.hook_before(unraisable)
        elif unraisable.exc_type is KeyboardInterrupt:
            threading.Timer(0.1, os.kill, [self.process, self.signal]).start()

    def leave_terminal(self) -> None:
        """Print to nowhere from now on: a closed terminal would answer each line with an error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for handle in self.terminals:
            os.dup2(nowhere, handle)

    def agree(self, world: World) -> bool:
        """Whether a signal came, to this process or to another that works with it: then to all."""
        number = world.max(self.signal or 0)[0]
        if number:
            self.signal = number
        return bool(number)

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP: 128 + the signal, as shells report it."""
        return 128 + self.signal if self.signal else 0
