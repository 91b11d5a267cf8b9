"""Datasets that are published as one archive: obtained, and unpacked so that they can do no harm."""

import contextlib
import glob
import gzip
import os
import shlex
import shutil
import stat
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from src.data.download import fetch
from src.data.folder import MOVE_IT, find_pictures
from src.progress import Bar
from src.utils import UserError, count, make_folders, need_space, reading, stand_in, writing

MAX_BYTES = 4 << 30  # of an archive, unpacked; tiny-imagenet has 0.25 GB, cifar10 0.18 GB
MAX_ENTRIES = 1_000_000  # files and folders in an archive; tiny-imagenet has 120,000
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError, RuntimeError)
ABANDONED = 86400  # seconds after which a half-unpacked folder is left over from a killed run


class Published(NamedTuple):
    """A dataset that is published as one archive.

    title: its name, for messages.   archive: the name of the file, .zip or .tar.gz.   holds: a file that its folder has.
    folder: the name of a folder that it is downloaded to. A folder of another name that does not exist is a mistyped one.
    """

    title: str
    archive: str
    holds: str
    folder: str

    def obtain(self, path: str | os.PathLike, url: str, size: int = 0, md5: str = "") -> None:
        """Make the folder `path` exist: as it is, or from an archive beside it, or downloaded from `url` (see fetch)."""
        path = Path(os.path.abspath(path))
        with reading(path, f"Name a folder with --data_path; {self.archive} beside it is unpacked to there."):
            if path.exists() and os.listdir(path):
                return
            found, is_meant = self.beside(path), path.name == self.folder or path.exists()
        archive = found[0] if found else path.with_name(self.archive)
        if not found and not is_meant:
            raise UserError(f"{path} is not there. Correct --data_path, or get {self.title} with {self.elsewhere(path)}.")
        if not found:
            print(f"{path} is not there: downloading {url}")
            fetch(url, archive, size, md5)
        print(f"unpacking {archive} to {path}")
        extract(archive, path, self.holds)

    def beside(self, path: Path) -> list[Path]:
        """The archives beside the folder from which it may come."""
        names = [f"{path.name}.zip", f"{path.name}.tar.gz", *[self.archive] * (path.name == self.folder or path.exists())]
        return [archive for archive in map(path.with_name, names) if archive.is_file()]

    def elsewhere(self, path: Path) -> str:
        """A flag that gets the data where the folder `path` does not have them."""
        own = path.with_name(self.folder)
        return f"--data_path {shlex.quote(str(own if own != path else path.parent / 'download' / self.folder))}"

    def open(self, path: str | os.PathLike) -> tuple[Path, list[str]]:
        """The folder that has the file `holds`, `path` or its one sub-folder that has it; and the words of that file."""
        root = Path(os.path.abspath(path))
        with reading(root, MOVE_IT):
            if not (root / self.holds).exists():
                inside = [file.parent for file in root.glob(f"*/{self.holds}")]
                root = inside[0] if len(inside) == 1 else root
        return root, self.read(root, self.holds).split()

    def incomplete(self, root: Path, what: str) -> UserError:
        """The advice never deletes, since the folder may hold other things, and does not lead back to here."""
        if not (root / self.holds).exists():
            with contextlib.suppress(UserError):
                if pictures := find_pictures(root)[0]:
                    what += f", but {count(len(pictures), 'picture')}: to train on these, add --dataset folder"
        advice = f"Name another folder with --data_path, or get {self.title} with {self.elsewhere(root)}."
        return UserError(f"{root} is not a whole {self.title}: {what}. {advice}")

    def read(self, root: Path, name: str) -> str:
        """The text of a file in the folder. Raises UserError."""
        with reading(root / name, "Name another folder with --data_path."):
            try:
                return (root / name).read_text(encoding="utf-8-sig")  # without the byte-order mark of Windows
            except FileNotFoundError:
                raise self.incomplete(root, f"it has no {name}") from None
            except UnicodeDecodeError:
                raise self.incomplete(root, f"{name} is not text in UTF-8") from None


class Member(NamedTuple):
    """A file or folder in an archive."""

    name: str
    size: int  # bytes, unpacked
    is_plain: bool  # no link, device, password or rare compression
    unpack: Callable[[Path], object]  # into a folder: the name and at most `size` bytes, no owner or permission


def zip_members(file: IO[bytes]) -> Iterator[Member]:
    archive = zipfile.ZipFile(file)
    for info in archive.infolist():
        is_zipped = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) and not info.flag_bits & 1
        is_plain = is_zipped and stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
        yield Member(info.filename, info.file_size, is_plain, partial(archive.extract, info))


def tar_members(file: IO[bytes]) -> Iterator[Member]:
    stream = gzip.GzipFile(fileobj=file)
    archive = tarfile.TarFile(fileobj=stream)
    archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.2 has none, and safe_members suffices
    for info in archive:
        yield Member(info.name, info.size, info.isreg() or info.isdir(), partial(archive.extract, info, set_attrs=False))
    while stream.read(1 << 20):  # on to the checksum of the whole
        pass


def extract(path: Path, folder: Path, holds: str) -> None:
    """Unpack the folder of the archive that holds the file `holds`, at whatever depth, as `folder`: whole, or not at all.

    The files collect beside it in a folder of this process, which takes the name in one rename and is removed on any failure,
    Ctrl-C included. Raises UserError for an archive that is damaged, too large, or reaches outside its folder.
    """
    kind = "zip" if path.suffix == ".zip" else "tar.gz"
    with contextlib.ExitStack() as undo:
        with reading(path):
            file = undo.enter_context(open(path, "rb"))
        undo.enter_context(writing(folder, "--data_path"))
        make_folders(folder.parent)
        for left in folder.parent.glob(f".{glob.escape(folder.name)}.part-{8 * '?'}"):  # as mkdtemp names them
            if time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.part-", dir=folder.parent))
        undo.callback(shutil.rmtree, part, ignore_errors=True)
        try:
            found = zip_members(file) if kind == "zip" else tar_members(file)
            top, members = safe_members(found, path, holds)
            needed = sum(member.size for member in members)
            need_space(part, needed, f"unpacking {path.name} needs {needed / 1e6:,.0f} MB")
            for member in Bar(members, desc="unpacking", unit=" file"):
                member.unpack(part / "all")
        except DAMAGED as error:
            what = stand_in(path) or f"is not a whole {kind} archive ({error})"
            advice = "Move it elsewhere and run the same command again to download it afresh."
            raise UserError(f"{path} {what}. {advice}") from error
        if hasattr(os, "sync"):
            os.sync()  # one flush for all files, before the rename: a power cut leaves no empty pictures behind
        with contextlib.suppress(OSError):
            folder.rmdir()  # an empty folder counts as none
        try:
            os.rename(part / "all" / top, folder)
        except OSError:
            if not (folder / holds).exists():  # otherwise another process was faster
                raise


def safe_members(found: Iterator[Member], path: Path, holds: str) -> tuple[PurePosixPath, list[Member]]:
    """The folder that holds the file, and what lies in it. All members are checked before anything is written."""

    def refuse(why: str) -> UserError:
        advice = "It is not the archive expected; move it away and get it from a place you trust."
        return UserError(f"{path} is refused: {why}. {advice}")

    members: list[Member] = []
    total = 0
    for member in found:
        members.append(member)
        total, name = total + member.size, member.name
        if total > MAX_BYTES or len(members) > MAX_ENTRIES:
            found_here = f"{total:,} bytes in {count(len(members), 'file')} or more"
            raise refuse(f"it would unpack to {found_here}; allowed are {MAX_BYTES:,} in {MAX_ENTRIES:,}")
        # a colon is a drive letter or a hidden stream on Windows, a backslash a separator there
        if not name or name.startswith("/") or ".." in PurePosixPath(name).parts or set(name) & set(":\\\0"):
            raise refuse(f"its entry {name!r} points outside the folder")
        if not member.is_plain:
            raise refuse(f"its entry {name!r} is a link, encrypted or compressed in an unusual way")
    paths = [PurePosixPath(member.name) for member in members]
    tops = sorted((path.parent for path in paths if path.name == holds), key=lambda top: len(top.parts))
    if not tops:
        raise refuse(f"there is no {holds} in it")
    return tops[0], [member for member, path in zip(members, paths) if path.is_relative_to(tops[0])]
