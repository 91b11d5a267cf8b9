"""One run at a time on a folder of checkpoints."""

import os
import socket
from pathlib import Path
from typing import IO

from src.utils import UserError


class FolderLock:
    """`with FolderLock(folder):` makes the folder and holds it until the block ends or the process dies, however it dies:
    the operating system keeps the lock, not the file `.lock`. Raises UserError while another run lives, or without write
    permission. flag: which setting named the folder, for the message."""

    def __init__(self, folder: Path, flag: str):
        self.folder, self.flag = folder, flag

    def __enter__(self) -> "FolderLock":
        make_folder(self.folder, self.flag)
        self.file = open(self.folder / ".lock", "a+", encoding="utf-8")
        try:
            take(self.file)
        except OSError:
            self.file.seek(0)
            owner = self.file.read().strip() or "another process"
            self.file.close()
            raise UserError(
                f"{self.folder} is in use by {owner}. Wait for that run to end, or give this one {self.flag} of its own."
            ) from None
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def take(file: IO[str]) -> None:
    """Lock the open file, or raise OSError at once where another process has it."""
    if os.name == "nt":
        import msvcrt

        file.seek(1 << 30)  # Windows locks bytes against reading too: lock one that is never read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        file.seek(0)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def make_folder(folder: Path, flag: str) -> None:
    """Make a folder that can be written to, or raise UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"Cannot write to {folder} ({error.strerror}). Mend its permissions, or choose another folder with {flag}."
        ) from None
