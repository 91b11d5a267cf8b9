"""Which run owns a folder: one run at a time on its checkpoints, and none among the previews and curves of another."""

import contextlib
import os
import socket
from pathlib import Path
from typing import IO

from src.utils import UserError, atomic_file, make_folder, reading, reason, writing


class FolderLock:
    """`with FolderLock(folder, flag):` makes the folder and holds it until the block ends or the process dies. The operating
    system keeps the lock, not the file `.lock`. flag: the setting that named the folder, for the message.
    Raises UserError while another run lives, or without write permission."""

    def __init__(self, folder: Path, flag: str):
        self.folder, self.flag = folder, flag

    def __enter__(self) -> "FolderLock":
        make_folder(self.folder, self.flag)
        with writing(self.folder, self.flag):
            self.file = open(self.folder / ".lock", "a+", encoding="utf-8")
        try:
            take(self.file)
        except (BlockingIOError, PermissionError):  # other errors: a file system without locks
            self.file.seek(0)
            owner = self.file.read().strip() or "another process"
            self.file.close()
            raise UserError(
                f"{self.folder} is in use by {owner}. Wait for that run to end, or give this one a name: --run NAME."
            ) from None
        except OSError as error:
            print(f"Warning: {self.folder} cannot be locked ({reason(error)}). Make sure that only one run uses it at a time.")
        with contextlib.suppress(OSError):  # a full disk: the lock holds, only without its owner's name
            os.ftruncate(self.file.fileno(), 0)
            os.write(self.file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        for part in self.folder.glob(".*.part-*"):  # what a run that was killed while saving left half-written
            part.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def claim(folder: Path, checkpoints: Path, is_resumed: bool) -> None:
    """Note in `folder` which run writes there, by the way from it to the run's checkpoints. Raises UserError if it is another
    run's: a run never hides or overwrites what another one wrote. Folders without a note go to a run that is resumed."""
    file, ours = folder / ".run", os.path.relpath(checkpoints, folder)
    with reading(file):
        owner = file.read_text(encoding="utf-8", errors="surrogateescape") if file.exists() else ours
        is_foreign = not file.exists() and not is_resumed and any([*folder.glob("samples/*"), *folder.glob("events.out.*")])
    if owner != ours or is_foreign:
        whose = f"the run in {os.path.normpath(folder / owner)}" if owner != ours else "another run"
        raise UserError(
            f"{folder} holds previews or curves of {whose}. Give this run a name: --run NAME keeps its checkpoints, outputs "
            f"and logs apart."
        )
    with atomic_file(file) as part:
        part.write(ours.encode("utf-8", "surrogateescape"))


def take(file: IO[str]) -> None:
    """Lock the open file, or raise BlockingIOError or PermissionError at once if another process has it."""
    if os.name == "nt":
        import msvcrt

        file.seek(1 << 30)  # Windows locks bytes against reading too: lock one that is never read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        file.seek(0)
    else:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: a child that outlives us would keep holding it
