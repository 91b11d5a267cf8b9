"""Fetch one archive over HTTP so that a cut costs nothing, and unpack it so that it can do no harm."""

import hashlib
import os
import shutil
import stat
import time
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import requests
from tqdm import tqdm

from src.utils import UserError

BLOCK = 1 << 20  # bytes moved at a time on the disk
NETWORK_BLOCK = 1 << 14  # and over the line: what a cut loses at most, as requests drops a block begun
MAX_BYTES = 4 << 30  # of an archive, unpacked; tiny-imagenet has 0.25 GB
MAX_ENTRIES = 1_000_000  # files and folders in an archive; tiny-imagenet has 120,000
DROPPED_LINE = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)


class Interrupted(Exception):
    """The transfer stopped early; what has arrived is kept and can be continued."""


def fetch(
    url: str,
    path: str | os.PathLike,
    size: int = 0,
    md5: str = "",
    *,
    timeout: tuple[float, float] = (10.0, 30.0),
    attempts: int = 5,
    pause: float = 1.0,
) -> None:
    """Download `url` to `path`, which appears whole and checked, or not at all.

    size: bytes, md5: hex digits that the file must have; 0 and "" skip the check.
    timeout: seconds to connect, and seconds without a byte until the line counts as dropped.
    attempts: tries in all, `pause` seconds apart at first, doubling.
    The bytes collect in `path`.part, which outlives a cut or Ctrl-C and is continued at the next call.
    Raises UserError, with what to do, for everything that the network, the server or the disk does.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    by_hand = f"To do it by hand, download it with a browser or another mirror and put it at {path.absolute()}."
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, attempts + 1):
            try:
                receive(url, part, size, timeout, by_hand)
                break
            except (*DROPPED_LINE, Interrupted) as error:
                have = part.stat().st_size if part.exists() else 0
                reason = str(error) if isinstance(error, Interrupted) else plain_reason(error)
                if attempt == attempts:
                    raise UserError(
                        f"{url}: {reason} ({attempts} tries). The {have:,} bytes so far are kept: "
                        f"run the same command again to continue. {by_hand}"
                    ) from error
                wait = pause * 2 ** (attempt - 1)
                print(f"{reason} at {have:,} bytes; trying again in {wait:g} s")
                time.sleep(wait)
        check(part, url, size, md5)
        os.replace(part, path)
    except requests.RequestException as error:  # an OSError too, so it comes before the disk's own
        raise UserError(f"{url} cannot be downloaded: {error}. Check DATA_URL / --data_url. {by_hand}") from error
    except OSError as error:
        raise UserError(
            f"Cannot write {part}: {error.strerror or error}; {free_megabytes(path.parent)} MB are free "
            f"there. Make room or mend the permissions, then run the same command again to continue."
        ) from error


def receive(url: str, part: Path, size: int, timeout: tuple[float, float], by_hand: str) -> None:
    """One request: add to `part` what it lacks. Returns when the server has sent all of it."""
    have = part.stat().st_size if part.exists() else 0
    if size and have == size:
        return
    if size and have > size:
        part.unlink()  # the rest of some other file
        have = 0
    # identity: a compressed transfer would make lengths and ranges count other bytes than ours
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        if response.status_code == 416:  # nothing beyond what we have: complete, or left over from another file
            if response.headers.get("Content-Range", "") == f"bytes */{have}" and size in (0, have):
                return
            part.unlink(missing_ok=True)
            raise Interrupted("the partial file was not of this download; starting over")
        if response.status_code in (408, 425, 429) or response.status_code >= 500:
            raise Interrupted(f"the server answered {response.status_code} {response.reason}")
        if response.status_code not in (200, 206):
            raise UserError(
                f"{url}: the server answered {response.status_code} {response.reason}. Check DATA_URL / --data_url. {by_hand}"
            )
        if "text/html" in response.headers.get("Content-Type", ""):
            raise UserError(
                f"{url}: the server sent a web page, not a file (a login or error page perhaps). "
                f"Open the address in a browser to see it. {by_hand}"
            )
        if response.status_code == 206:
            start, total = content_range(response)
            if start != have:
                part.unlink(missing_ok=True)
                raise Interrupted("the server continued at another place than asked; starting over")
        else:
            have, total = 0, int(response.headers.get("Content-Length", 0))
        if size and total and total != size:
            raise UserError(
                f"{url}: the server offers {total:,} bytes, expected {size:,}; nothing was downloaded. "
                f"It is another file or version: check DATA_URL and DATA_SIZE. {by_hand}"
            )
        missing = (total or size) - have
        if missing > shutil.disk_usage(part.parent).free:
            raise UserError(
                f"{part.parent} has {free_megabytes(part.parent)} MB free and the download needs "
                f"{missing / 1e6:.0f} MB more. Make room, or choose another DATA_PATH / --data_path."
            )
        with (
            open(part, "ab" if have else "wb") as file,
            tqdm(total=total or size or None, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None) as bar,
        ):
            for block in response.iter_content(NETWORK_BLOCK):
                have += len(block)
                if size and have > size:
                    raise UserError(
                        f"{url}: the server sends more than the {size:,} bytes expected. "
                        f"It is another file or version: check DATA_URL and DATA_SIZE. {by_hand}"
                    )
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
    if have < (total or size):
        raise Interrupted("the line dropped")


def content_range(response: requests.Response) -> tuple[int, int]:
    """(first byte, length of the whole file; 0 unknown) of a 206 answer; first byte -1 if it does not say."""
    try:
        span, total = response.headers["Content-Range"].removeprefix("bytes ").split("/")
        return int(span.split("-")[0]), int(total) if total != "*" else 0
    except (KeyError, ValueError):
        return -1, 0


def plain_reason(error: Exception) -> str:
    """A few words for what requests says in a paragraph."""
    if isinstance(error, requests.Timeout) or "timed out" in str(error):
        return "the server does not answer"
    if isinstance(error, requests.exceptions.SSLError):
        return "no secure connection to the server"
    if isinstance(error, requests.exceptions.ChunkedEncodingError) or "IncompleteRead" in str(error):
        return "the line dropped"
    return "no connection to the server (is there a network?)"


def check(part: Path, url: str, size: int, md5: str) -> None:
    """Compare with the size and checksum expected. A file that differs is removed: it cannot be continued."""
    found_size = part.stat().st_size
    if size and found_size != size:
        part.unlink()
        raise UserError(f"{url}: received {found_size:,} bytes, expected {size:,}; removed. Run the same command again.")
    if not md5:
        return
    digest = hashlib.md5(usedforsecurity=False)
    with open(part, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    if digest.hexdigest() != md5.lower():
        part.unlink()
        raise UserError(
            f"{url}: the checksum (md5) is {digest.hexdigest()}, expected {md5}; the download was removed. "
            f"Run the same command again; if it repeats, the file at DATA_URL is another one: "
            f'use a mirror, or set DATA_MD5 and DATA_SIZE to its own ("" and 0 skip the check).'
        )


def free_megabytes(folder: Path) -> str:
    """Free space where `folder` is or would be, in MB, as text; "?" if there is no such disk."""
    folder = folder.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:.0f}"
    except OSError:
        return "?"


def extract(
    zip_path: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    max_bytes: int = MAX_BYTES,
    max_entries: int = MAX_ENTRIES,
) -> None:
    """Unpack the one folder that the archive holds, whatever its name, as `folder`: whole, or not at all.

    The files collect in a neighbour `.NAME.part`, which takes the name in one rename, is removed on any
    failure, Ctrl-C included, and if a kill left it behind, at the next start.
    Raises UserError for an archive that is damaged, too large, or reaches outside its folder.
    """
    zip_path, folder = Path(zip_path), Path(folder)
    part = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(zip_path) as archive:
            top, members = safe_members(archive, zip_path, max_bytes, max_entries)
            needed = sum(member.file_size for member in members)
            if needed > shutil.disk_usage(folder.parent).free:
                raise UserError(
                    f"{folder.parent} has {free_megabytes(folder.parent)} MB free and unpacking "
                    f"{zip_path.name} needs {needed / 1e6:.0f} MB. Make room and run it again."
                )
            unpack(archive, members, part)
        if hasattr(os, "sync"):
            os.sync()  # one flush for all files, before the rename: a power cut leaves no empty pictures behind
        os.rename(part / top, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(
            f"{zip_path} is not a whole zip archive ({error}). Delete it and run the same command again to download it afresh."
        ) from error
    except OSError as error:
        raise UserError(
            f"Cannot unpack {zip_path} to {folder}: {error.strerror or error}; "
            f"{free_megabytes(folder.parent)} MB are free there. Make room or mend the permissions, "
            f"and run it again."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def safe_members(
    archive: zipfile.ZipFile, zip_path: Path, max_bytes: int, max_entries: int
) -> tuple[str, list[zipfile.ZipInfo]]:
    """The name of the archive's one folder, and its members, each checked before anything is written."""

    def refuse(why: str) -> UserError:
        return UserError(
            f"{zip_path} is refused: {why}. It is not the archive expected; delete it and get it from a place you trust."
        )

    members = [member for member in archive.infolist() if not member.filename.startswith("__MACOSX/")]
    if len(members) > max_entries:
        raise refuse(f"it holds {len(members):,} entries, more than {max_entries:,}")
    total = sum(member.file_size for member in members)
    if total > max_bytes:
        raise refuse(f"it would unpack to {total:,} bytes, more than {max_bytes:,}")
    for member in members:
        name, kind = member.filename, stat.S_IFMT(member.external_attr >> 16)
        # a colon is a drive letter or a hidden stream on Windows, a backslash a separator there
        if not name or name.startswith("/") or ".." in PurePosixPath(name).parts or ":" in name or "\\" in name:
            raise refuse(f"its entry {name!r} points outside the folder")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise refuse(f"its entry {name!r} is a link or a device, not a file")
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise refuse(f"its entry {name!r} is encrypted or compressed in an unusual way")
    tops = {PurePosixPath(member.filename).parts[0] for member in members}
    if len(tops) != 1 or not any("/" in member.filename for member in members):
        raise refuse(f"expected one folder in it, found {', '.join(sorted(tops)[:4]) or 'nothing'}")
    return tops.pop(), members


def unpack(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], part: Path) -> None:
    """Write the members below `part`, with a progress bar, none longer than it declares."""
    made = set()
    for member in tqdm(members, desc="unpacking", unit=" files", disable=None):
        target = f"{part}/{member.filename}"
        folder = target.rpartition("/")[0]
        if folder not in made:  # 400 folders, 110,000 files: ask the disk once for each folder
            os.makedirs(folder, exist_ok=True)
            made.add(folder)
        if member.is_dir():
            continue
        with archive.open(member) as source, open(target, "wb") as file:
            # ZipExtFile stops at the declared size and then compares the CRC, so a bomb that
            # declares less than it holds ends as BadZipFile with no more than the declared bytes written.
            shutil.copyfileobj(source, file, BLOCK)
