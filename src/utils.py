"""Errors that the user can fix, files that are whole or absent, and images on disk."""

import contextlib
import errno
import os
import secrets
import shutil
import unicodedata
from collections.abc import Iterator
from itertools import count as count_from
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class UserError(Exception):
    """Something that the user can fix. The scripts print its sentence without a traceback and exit with `exit_code`."""

    exit_code = 1


class FlagError(UserError):
    """A flag or constant that is not allowed. It is raised before data is read or a GPU is touched."""

    exit_code = 2


def count(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: "1 image", "2,000 images"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def printable(name: Any) -> str:
    """A name on one line of UTF-8: bytes that are not UTF-8, line breaks and control characters are spelled out."""
    letters = str(name).encode("utf-8", "backslashreplace").decode()
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in letters)


# --- files ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, flush: bool = True) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears at `path` whole or not at all. flush: its folder, too; of many files in one folder
    the caller does that once.

    The bytes go to `.NAME.part-RANDOM` in the same folder, are flushed to the disk, and take the name in one rename. If the
    body raises or the disk is full, what stood at `path` stays, and the part is removed. An OSError has `path` as its filename.
    """
    path = Path(path)
    make_folders(path.parent)
    part = path.with_name(f".{path.name[:100]}.part-{secrets.token_hex(4)}")  # random: other machines share the folder
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        if flush:
            flush_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(part)):
            error.filename = str(path)
        raise


def flush_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut. Windows and some network drives cannot, and need not."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def reading(path: str | os.PathLike, advice: str = "Choose another one.") -> Iterator[None]:
    """Turn an OSError in the block into a UserError that says why `path`, or the file in it that failed, could not be read.
    advice: what to do instead of fixing the permissions, where these are the cause."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            advice = f"Fix its permissions, or {advice[0].lower()}{advice[1:]}"
        raise UserError(f"Cannot read {error.filename or path}: {reason(error)}. {advice}") from error


@contextlib.contextmanager
def writing(path: str | os.PathLike, flag: str, note: str = "") -> Iterator[None]:
    """Turn an OSError in the block into a UserError that says what could not be written, and why: as `reading` does.
    flag: the setting that chose the place, such as --output_dir.   note: a sentence to add, on what is kept."""
    try:
        yield
    except OSError as error:
        path = error.filename or path
        advice = f"Choose another place with {flag}."
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = f"Free some space{free_space(Path(path))}, or choose another place with {flag}."
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = f"Fix the permissions, or choose another place with {flag}."
        raise UserError(f"Cannot write to {path}: {reason(error)}. {advice} {note}".rstrip()) from error


def reason(error: Exception) -> str:
    """The cause in words, on one line."""
    if isinstance(error, IsADirectoryError):
        return "it is a folder, and a file is needed"
    if isinstance(error, (NotADirectoryError, FileExistsError)):
        leads_nowhere = error.filename and os.path.islink(error.filename) and not os.path.exists(error.filename)
        return f"a {'link that leads nowhere' if leads_nowhere else 'file'} stands where a folder is needed"
    return next(iter((getattr(error, "strerror", "") or str(error)).splitlines()), "") or type(error).__name__


def need_space(folder: Path, size: int, why: str = os.strerror(errno.ENOSPC)) -> None:
    """Raise OSError, before the work, if so many bytes do not fit on the disk."""
    if size > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, why)


def stand_in(path: str | os.PathLike) -> str:
    """What a file is that came in place of the one wanted, such as "is an HTML page"; "" if that cannot be told."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        start = file.read(200).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
        if not start and not os.path.getsize(path):
            return "is empty"
        if start.startswith(b"version https://git-lfs"):
            return "is a git-LFS pointer; 'git lfs pull' in its repository fetches the file itself"
        if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
            kind = "XML" if start.startswith(b"<?xml") else "HTML"
            return f"is an {kind} page, perhaps of a login or an error, and not the file itself"
    return ""


def free_space(path: Path) -> str:
    """ " (12 MB are free there)", or nothing where that cannot be told."""
    for folder in [path, *path.absolute().parents]:
        with contextlib.suppress(OSError):
            return f" ({shutil.disk_usage(folder).free / 1e6:,.0f} MB are free there)"
    return ""


MADE: list[Path] = []  # the folders that this process has made, outer ones first, and names that it has taken


def make_folders(folder: Path) -> None:
    """Make a folder and those around it. Raises OSError."""
    MADE.extend(path.absolute() for path in [*reversed(folder.parents), folder] if not path.exists())
    folder.mkdir(parents=True, exist_ok=True)


def remove_empty() -> None:
    """Remove what this process has made and left empty: a command that is refused leaves nothing behind."""
    while MADE:
        path = MADE.pop()
        with contextlib.suppress(OSError):  # a folder that is not empty
            if path.is_dir() and os.listdir(path) == [".run"]:  # whose it would have been
                (path / ".run").unlink()
            if path.is_dir() or not path.stat().st_size:
                (path.rmdir if path.is_dir() else path.unlink)()


def take_free(names: Iterator[Path], is_folder: bool = False) -> Path:
    """Make the first of these names that nothing has, an empty file or folder, and return it. A name is taken by making it: of
    several processes that look at once each gets one of its own. Raises OSError."""
    while True:
        path = next(names)
        make_folders(path.parent)
        with contextlib.suppress(FileExistsError):
            path.mkdir() if is_folder else path.touch(exist_ok=False)
            MADE.append(path.absolute())
            return path


def numbered(path: Path) -> Iterator[Path]:
    """x.json, x-2.json, x-3.json, ..."""
    return (path.with_stem(f"{path.stem}{f'-{n}' if n > 1 else ''}") for n in count_from(1))


# --- images on disk -------------------------------------------------------------------------------------


def to_uint8(x: Tensor) -> Tensor:
    """[B, C, S, S] float in [-1, 1] to uint8 in [0, 255], rounded to the nearest, on the CPU."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def to_pil(image: Tensor) -> Image.Image:
    """[3, H, W] or [1, H, W] uint8 to a PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).squeeze(2).contiguous().numpy())


def save_png(image: Tensor, path: Path, flush: bool = True) -> None:
    """Write [3, H, W] uint8 as a PNG that is whole or absent. flush: as in atomic_file."""
    with atomic_file(path, flush) as file:
        to_pil(image).save(file, format="PNG")


def load_png(path: Path) -> Tensor:
    """[C, H, W] uint8."""
    with reading(path), Image.open(path) as image:
        return torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1)
