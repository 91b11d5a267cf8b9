"""Ctrl-C and SIGTERM as requests that the training loop reads between two steps."""

import signal
from types import FrameType


class StopRequest:
    """Inside `with StopRequest() as stop:` the first Ctrl-C or SIGTERM only sets stop.signal; a second Ctrl-C stops at once."""

    signal: int | None = None

    def __enter__(self) -> "StopRequest":
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM: 128 + the signal, as shells report it."""
        return 128 + self.signal if self.signal else 0
