"""Fetch one file over HTTP so that a cut costs nothing."""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import requests
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from src.progress import Bar
from src.utils import UserError, count, make_folders, need_space, writing

try:
    import fcntl
except ImportError:  # Windows: there two processes must not download one file at once
    fcntl = None  # type: ignore[assignment]

NETWORK_BLOCK = 1 << 14  # bytes; a cut loses at most these, since requests drops a block that is not whole
TIMEOUT = (10.0, 30.0)  # seconds to connect, and seconds without a byte until the line counts as dropped
ATTEMPTS = 5
PAUSE = 1.0  # seconds between the first two attempts; then it doubles, or is as long as the server asks for
LONGEST_WAIT = 120  # seconds; if a server asks for more, that is for the user to decide
OTHER_FILE = "It is another file or version: check DATA_URL and DATA_SIZE."


class Failed(Exception):
    """One try did not get the whole file. args: why, and the seconds to wait before the next; None if another try is no use."""


def fetch(url: str, path: str | os.PathLike, size: int = 0, md5: str = "") -> None:
    """Download `url` to `path`, which appears whole and checked, or not at all.

    size: bytes, md5: hex digits that the file must have; 0 and "" skip the check.
    The bytes collect in `path`.part, which outlives a cut or Ctrl-C and is continued at the next call. One process at a time
    writes it. Raises UserError, with what to do, for everything that the network, the server or the disk does.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    by_hand = f"To do it by hand, download it with a browser or another mirror and put it at {path.absolute()}."
    headers = {"Accept-Encoding": "identity"}  # a compressed transfer would make ranges count other bytes than ours
    with writing(part, "--data_path", "The same command then continues."), alone(part):
        for attempt in range(1, ATTEMPTS + 1):
            if path.exists():  # another process was faster
                return
            try:
                receive(url, part, size, headers)
                break
            except Failed as error:
                (why, wait), have = error.args, part.stat().st_size
                if wait is None:
                    raise UserError(f"{url}: {why} {by_hand}") from error
                if attempt == ATTEMPTS or wait > LONGEST_WAIT:
                    tries = count(ATTEMPTS, "try", "tries") if wait <= LONGEST_WAIT else f"it asks to wait {wait:,.0f} s"
                    kept = f"What has arrived, {count(have, 'byte')}, is kept: run the same command again to continue. "
                    raise UserError(f"{url}: {why} ({tries}). {kept if have else ''}{by_hand}") from error
                wait = max(wait, PAUSE * 2 ** (attempt - 1))
                print(f"{why} at {count(have, 'byte')}; trying again in {wait:g} s", flush=True)
                time.sleep(wait)
        found = hashlib.md5(part.read_bytes(), usedforsecurity=False).hexdigest() if md5 else ""
        if found != md5.lower():
            part.write_bytes(b"")  # it cannot be continued
            raise UserError(
                f"{url}: the checksum (md5) is {found}, expected {md5}; the download was removed. "
                f"Run the same command again; if it repeats, the file at DATA_URL is another one: "
                f'use a mirror, or set DATA_MD5 and DATA_SIZE to its own ("" and 0 skip the check).'
            )
        os.replace(part, path)


@contextlib.contextmanager
def alone(part: Path) -> Iterator[None]:
    """Hold the partial file, made if need be, against other processes. Waits for the one that has it, and says so."""
    make_folders(part.parent)
    with open(part, "ab") as file:
        if fcntl is None:
            file.close()  # Windows renames no open file
        else:
            with contextlib.suppress(OSError):  # a file system without locks
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    print(f"another process is downloading {part}: waiting for it", flush=True)
                    fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if part.exists() and part.stat().st_size == 0:
                part.unlink()


def receive(url: str, part: Path, size: int, headers: dict[str, str]) -> None:
    """One request: add to `part` what it lacks. headers: kept from one try to the next, which must continue the same file."""
    have = part.stat().st_size
    if size and have == size:
        return
    have = 0 if size and have > size else have  # the rest of another file
    headers["Range"] = f"bytes={have}-"
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            have, total = begin(response, part, have, size)
            if response.status_code == 416:
                return
            if response.headers.get("ETag", "").startswith('"'):
                headers["If-Range"] = response.headers["ETag"]  # if its file is another one by then, the server sends all of it
            missing = max(total, size) - have
            need_space(part.parent, missing, f"the download needs {missing / 1e6:,.0f} MB more")
            bar = Bar(total=total or size or None, initial=have, unit="B", unit_scale=True, desc=part.stem)
            with bar, open(part, "r+b") as file:
                file.seek(have)
                file.truncate()
                for block in response.iter_content(NETWORK_BLOCK):
                    have += file.write(block)
                    bar.update(len(block))
                    if size and have > size:
                        raise Failed(f"the server sends more than {count(size, 'byte')}, the size expected. {OTHER_FILE}", None)
                file.flush()
                os.fsync(file.fileno())
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        raise Failed(plain_reason(error), 0) from error
    except requests.RequestException as error:
        raise Failed(f"{error}. Check DATA_URL / --data_url.", None) from error
    except OSError as error:
        if error.errno is None:  # a bundle of certificates that is gone; faults of the disk have a number
            raise Failed(f"{error}.", None) from error
        raise
    if have < max(total, size):
        raise Failed("the line dropped", 0)


def begin(response: requests.Response, part: Path, have: int, size: int) -> tuple[int, int]:
    """(bytes of `part` to keep, bytes of the whole file or 0 if unknown), from the head of an answer."""
    status, said = response.status_code, f"the server answered {response.status_code} {response.reason}"
    if status in (408, 425, 429) or status >= 500:
        try:
            raise Failed(said, Retry().parse_retry_after(response.headers.get("Retry-After", "0")))
        except InvalidHeader:
            raise Failed(said, 0) from None
    if status not in (200, 206, 416):
        raise Failed(f"{said}. Check DATA_URL / --data_url.", None)
    span, _, length = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    if status == 416 and length == str(have) and size in (0, have):  # there is nothing beyond what we have
        return have, have
    if status == 416 or (status == 206 and not span.startswith(f"{have}-")):
        part.write_bytes(b"")
        raise Failed("the partial file and what the server sends do not fit; starting over", 0)
    if "text/html" in response.headers.get("Content-Type", ""):
        what = "the server sent a web page, not a file (a login or error page perhaps)."
        raise Failed(f"{what} Open the address in a browser to see it.", None)
    if status == 200:  # from the start, whatever was asked for
        have, length = 0, response.headers.get("Content-Length", "")
    total = int(length) if length.isdigit() else 0
    if size and total and total != size:
        raise Failed(f"the server offers {count(total, 'byte')}, expected {size:,}; nothing was downloaded. {OTHER_FILE}", None)
    return have, total


def plain_reason(error: BaseException) -> str:
    """A few words for what requests says in a paragraph, and the innermost reason if it is about TLS or a proxy."""
    reason = error
    while causes := [e for e in (getattr(reason, "reason", None), *reason.args[::-1]) if isinstance(e, BaseException)]:
        reason = causes[0]
    if isinstance(error, requests.exceptions.SSLError):
        return f"no secure connection to the server ({reason})"
    if isinstance(error, requests.exceptions.ProxyError):
        return f"no connection through the proxy ({reason})"
    if isinstance(error, requests.Timeout) or "timed out" in str(error):
        return "the server does not answer"
    if isinstance(error, requests.exceptions.ChunkedEncodingError) or "IncompleteRead" in str(error):
        return "the line dropped"
    return "no connection to the server (is there a network?)"
