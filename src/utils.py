"""What every other module may lean on: the user's errors, files that are whole or not there, the cores."""

import contextlib
import os
import shutil
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


@contextlib.contextmanager
def writing_to(folder: Path, flag: str) -> Iterator[None]:
    """Say what to do where something in `folder` cannot be written. flag: the setting that named the folder."""
    try:
        yield
    except OSError as error:
        existing = next((parent for parent in [folder, *folder.absolute().parents] if parent.is_dir()), Path("/"))
        raise UserError(
            f"Cannot write to {folder}: {error.strerror or error}. {shutil.disk_usage(existing).free / 1e6:,.0f} MB are "
            f"free there. Make room, mend its permissions, or choose another folder with {flag}."
        ) from None


def make_folder(folder: Path, flag: str) -> None:
    """Make a folder and see that it can be written to, or raise UserError as `writing_to` does."""
    with writing_to(folder, flag):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
