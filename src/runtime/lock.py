"""One run at a time on a folder of checkpoints."""

import contextlib
import os
import socket
from pathlib import Path
from typing import IO

from src.utils import UserError, make_folder, writing_to


class FolderLock:
    """`with FolderLock(folder):` makes the folder and holds it until the block ends or the process dies, however it
    dies: the operating system keeps the lock, not the file `.lock`. Raises UserError while another run lives, or
    without write permission. flag: which setting named the folder, for the message."""

    def __init__(self, folder: Path, flag: str):
        self.folder, self.flag = folder, flag

    def __enter__(self) -> "FolderLock":
        make_folder(self.folder, self.flag)
        with writing_to(self.folder, self.flag):
            self.file = open(self.folder / ".lock", "a+", encoding="utf-8")
        try:
            take(self.file)
        except (BlockingIOError, PermissionError):  # other errors: a file system without locks, which goes without
            self.file.seek(0)
            owner = self.file.read().strip() or "another process"
            self.file.close()
            raise UserError(
                f"{self.folder} is in use by {owner}. Wait for that run to end, or give this one {self.flag} of its own."
            ) from None
        except OSError as error:
            print(f"Warning: {self.folder} cannot be locked ({error.strerror}); see that only one run uses it at a time.")
        with contextlib.suppress(OSError):  # a full disk: the lock holds, only without its owner's name
            os.ftruncate(self.file.fileno(), 0)
            os.write(self.file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def take(file: IO[str]) -> None:
    """Lock the open file, or raise BlockingIOError or PermissionError at once where another process has it."""
    if os.name == "nt":
        import msvcrt

        file.seek(1 << 30)  # Windows locks bytes against reading too: lock one that is never read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        file.seek(0)
    else:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which a child that outlives us would go on holding
