"""What the program says never costs what it does: output that cannot be written is lost, and nothing else."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class Unfailing:
    """A stream on which no write raises, whether the reader is gone, the terminal is closed or the disk of the log is full.
    Each line is passed on at once, and what its encoding lacks is spelled out. All else is as on the stream itself."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        with contextlib.suppress(Exception):  # a host may have a stream of any kind
            self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        if "\n" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(Exception):
            self.stream.flush()


@contextlib.contextmanager
def unfailing_output() -> Iterator[None]:
    """Make sys.stdout and sys.stderr Unfailing in the block. A notebook has streams of its own; closed ones are None."""
    while (nowhere := os.open(os.devnull, os.O_RDWR)) < 3:  # one of the three is closed: else a checkpoint could get its place
        os.set_inheritable(nowhere, True)
    streams = [Unfailing(stream or open(os.devnull, "w")) for stream in (sys.stdout, sys.stderr)]  # noqa: SIM115
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):  # type: ignore[type-var]
            yield
    finally:
        for stream in streams:
            with contextlib.suppress(Exception):
                try:
                    stream.stream.flush()
                except OSError:  # the interpreter flushes once more at its end, and would exit with 120
                    if stream.fileno() < 3:
                        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
