"""What the tests of the data share."""

import contextlib
import http.server
import io
import os
import shutil
import stat
import tarfile
import tempfile
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest


@contextlib.contextmanager
def as_user():
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


def pack(path, files):
    """A zip or tar.gz, by the name. files: {name: bytes or text}; a name ends in a slash for a folder, (text,) is a link to
    there."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
            for name, data in files.items():
                member = zipfile.ZipInfo(name)
                member.compress_type = zipfile.ZIP_DEFLATED
                member.external_attr = (stat.S_IFLNK | 0o777) << 16 if isinstance(data, tuple) else 0
                target.writestr(member, data[0] if isinstance(data, tuple) else data)
        return path
    with tarfile.open(path, "w:gz", compresslevel=1) as target:
        for name, data in files.items():
            member = tarfile.TarInfo(name.rstrip("/"))
            if name.endswith("/"):
                member.type = tarfile.DIRTYPE
            elif isinstance(data, tuple):
                member.type, member.linkname, data = tarfile.SYMTYPE, data[0], ""
            content = data.encode() if isinstance(data, str) else data
            member.size = len(content)
            target.addfile(member, io.BytesIO(content))
    return path


class FolderHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files; the server's `requests` has the lines that it would log."""

    def log_message(self, *args):
        self.server.requests.append(args)


@contextlib.contextmanager
def serving(handler):
    """A server on a free port, with its `url` and a list `requests`."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.requests, server.url = [], f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def commons():
    """A folder that every user may write to. In `with commons.as_user():` permissions count, even if root runs the tests."""
    if not hasattr(os, "geteuid"):
        pytest.skip("Windows has permissions of another kind")
    path = Path(tempfile.mkdtemp())  # not tmp_path, which is for its owner alone
    path.chmod(0o777)
    yield SimpleNamespace(path=path, as_user=as_user)
    shutil.rmtree(path)
