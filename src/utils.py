"""What every other module may lean on: the user's errors, and files that are whole or not there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


class UserError(Exception):
    """Something that the user can mend. The scripts print its one sentence, no traceback, and exit with `exit_code`."""

    exit_code = 1


class FlagError(UserError):
    """A flag or constant that cannot be: what was given, what is allowed. Found before data or a GPU is touched."""

    exit_code = 2


def flush_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut. Windows has no such call and needs none."""
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears at `path` whole, or not at all.

    The bytes go to a neighbour named `.NAME.part-PID`, are flushed to the disk, and take the name in one
    rename. Where the body raises, or the disk is full, what stood at `path` stays and the neighbour is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        flush_folder(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
