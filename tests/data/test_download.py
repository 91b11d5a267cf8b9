"""fetch against servers that misbehave."""

import email.utils
import hashlib
import http.server
import os
import random
import shutil
import ssl
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from src.data import download
from src.data.download import fetch
from src.utils import UserError
from tests.data.conftest import serving

ROOT = Path(__file__).parents[2]
DATA, OTHER = (random.Random(seed).randbytes(300_000) for seed in (0, 1))
MD5 = hashlib.md5(DATA).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the server's `file` at every address; the first part of the path says how it misbehaves, once or always."""

    protocol_version = "HTTP/1.0"

    def do_GET(self):
        way, wanted = self.path.split("/")[1], self.headers.get("Range")
        self.server.requests.append((way, wanted))
        first_time = len(self.server.requests) == 1 or way.startswith("always-")
        way = way.removeprefix("always-")
        data, etag = (self.server.file, '"1"') if way != "replaced" or first_time else (OTHER, '"2"')
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and way != "no-range" else 0
        if self.headers.get("If-Range", etag) != etag:
            start = 0
        if way == "missing":
            return self.send_error(404)
        if way in ("busy", "later", "date", "much-later") and first_time:
            self.send_response(503 if way == "busy" else 429)
            if way != "busy":
                until = email.utils.formatdate(time.time() + 2, usegmt=True)
                self.send_header("Retry-After", {"later": "1", "much-later": "3600", "date": until}[way])
            return self.end_headers()
        if start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.end_headers()
            return self.wfile.write(b"no such range")
        body = b"<html>please log in</html>" if way == "html" else data[start:]
        self.send_response(206 if start else 200)
        self.send_header("ETag", etag)
        self.send_header("Content-Type", "text/html" if way == "html" else "application/zip")
        if way != "no-length":
            self.send_header("Content-Length", str(len(body) + (1000 if way == "lie" else 0)))
        if start:
            moved = 7 if way == "elsewhere" and len(self.server.requests) == 1 else 0
            self.send_header("Content-Range", f"bytes {start + moved}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if way in ("cut", "no-range", "replaced") and first_time:
            body = body[: len(body) // 3]
        if way == "stall" and first_time:
            self.wfile.write(body[: len(body) // 3])
            self.wfile.flush()
            return time.sleep(1.0)
        if way == "slow":
            for at in range(0, len(body), 30_000):
                self.wfile.write(body[at : at + 30_000])
                time.sleep(0.1)
            return None
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", (2.0, 0.5))
    monkeypatch.setattr(download, "PAUSE", 0.01)


@pytest.fixture
def server():
    with serving(Handler) as server:
        server.file = DATA
        yield server


# --- the file arrives -------------------------------------------------------------------------------
@pytest.mark.parametrize("way", ["plain", "no-length", "cut", "no-range", "stall", "busy"])
def test_the_file_arrives_whole_whatever_the_line_does(server, tmp_path, way):
    fetch(f"{server.url}/{way}/a.zip", tmp_path / "new" / "a.zip", len(DATA), MD5)
    assert (tmp_path / "new" / "a.zip").read_bytes() == DATA
    assert os.listdir(tmp_path / "new") == ["a.zip"]


@pytest.mark.parametrize("way", ["cut", "replaced"])
def test_without_size_and_checksum_a_cut_is_noticed_and_two_files_are_not_mixed(server, tmp_path, way):
    fetch(f"{server.url}/{way}/a.zip", tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == (DATA if way == "cut" else OTHER)


def test_a_cut_keeps_the_partial_file_and_the_next_start_continues_it(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    with pytest.raises(UserError, match="run the same command again to continue"):
        fetch(f"{server.url}/always-cut/a.zip", tmp_path / "a.zip", len(DATA), MD5)
    kept = (tmp_path / "a.zip.part").read_bytes()
    assert 100_000 - download.NETWORK_BLOCK < len(kept) <= 100_000 and DATA.startswith(kept)
    fetch(f"{server.url}/plain/a.zip", tmp_path / "a.zip", len(DATA), MD5)
    assert server.requests[-1] == ("plain", f"bytes={len(kept)}-")
    assert (tmp_path / "a.zip").read_bytes() == DATA


@pytest.mark.parametrize("way, part, size, asks", [
    ("plain", DATA, len(DATA), False),
    ("plain", DATA, 0, True),  # the server says 416: there is no more
    ("plain", b"x" * 400_000, len(DATA), True),  # longer than the download
    ("plain", b"x" * 400_000, 0, True),
    ("plain", DATA + b"more", len(DATA), True),
    ("plain", DATA + b"more", 0, True),
    ("elsewhere", DATA[:5000], len(DATA), True),  # the server sends another part than the one asked for
], ids=range(7))  # fmt: skip
def test_a_partial_file_is_completed_or_started_over(server, tmp_path, way, part, size, asks):
    (tmp_path / "a.zip.part").write_bytes(part)
    fetch(f"{server.url}/{way}/a.zip", tmp_path / "a.zip", size, MD5)
    assert (tmp_path / "a.zip").read_bytes() == DATA and bool(server.requests) == asks


@pytest.mark.parametrize("way", ["later", "date"])
def test_a_server_that_asks_to_wait_is_given_the_time(server, tmp_path, way, capsys):
    start = time.monotonic()
    fetch(f"{server.url}/{way}/a.zip", tmp_path / "a.zip", len(DATA), MD5)
    assert time.monotonic() - start > 0.9 and "429 Too Many Requests at 0 bytes; trying again in" in capsys.readouterr().out


def test_two_at_once_share_one_download(server, tmp_path, capsys):
    """The second waits for the first: they never write into one file."""
    arguments = f"{server.url}/slow/a.zip", tmp_path / "a.zip", len(DATA), MD5
    threads = [threading.Thread(target=fetch, args=arguments) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a.zip").read_bytes() == DATA and os.listdir(tmp_path) == ["a.zip"]
    assert len(server.requests) == 1 and capsys.readouterr().out.count("another process is downloading") == 1


def test_the_second_process_goes_on_where_the_first_was_killed(server, tmp_path):
    program = textwrap.dedent(f"""
        from src.data.download import fetch
        fetch("{server.url}/slow/a.zip", {str(tmp_path / "a.zip")!r}, {len(DATA)}, "{MD5}")
    """)
    part = tmp_path / "a.zip.part"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    while not part.exists() or part.stat().st_size == 0:
        time.sleep(0.01)
    thread = threading.Timer(0.3, process.kill)
    thread.start()
    fetch(f"{server.url}/plain/a.zip", tmp_path / "a.zip", len(DATA), MD5)
    assert process.wait() != 0 and (tmp_path / "a.zip").read_bytes() == DATA
    assert server.requests[-1][1] is not None, "it began anew"


# --- it does not ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "way, size, says",
    [
        ("lie", len(DATA), "offers 301,000 bytes, expected 300,000"),
        ("no-length", 5, "more than 5 bytes, the size expected"),
    ],
)
def test_what_cannot_be_right_is_refused_at_once(server, tmp_path, way, size, says):
    with pytest.raises(UserError, match=says):
        fetch(f"{server.url}/{way}/a.zip", tmp_path / "a.zip", size, "0" * 32)
    assert len(server.requests) == 1 and os.listdir(tmp_path) == ["a.zip.part"] * (way == "no-length")


def test_bad_addresses_are_one_sentence(tmp_path):
    for url in ("not a url", "ftp://127.0.0.1/a.zip", "http://"):
        with pytest.raises(UserError, match="DATA_URL"):
            fetch(url, tmp_path / "a.zip")
    assert os.listdir(tmp_path) == []


def test_a_certificate_that_is_not_trusted_and_a_proxy_say_their_reason(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    key = tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    made = subprocess.run([*command, "-keyout", key, "-out", key.with_name("cert.pem")], capture_output=True)
    if made.returncode:
        pytest.skip("no openssl here")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(key.with_name("cert.pem"), key)
    with serving(Handler) as secure:
        secure.socket = context.wrap_socket(secure.socket, server_side=True)
        with pytest.raises(UserError, match=r"no secure connection to the server \(.*certificate verify failed: self.signed"):
            fetch(secure.url.replace("http", "https") + "/plain/a.zip", tmp_path / "a.zip")
    monkeypatch.setenv("HTTPS_PROXY", server.url)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    with pytest.raises(UserError, match=r"no connection through the proxy \(.*(501|Tunnel)"):
        fetch("https://example.invalid/a.zip", tmp_path / "a.zip")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/gone/ca.pem")
    with pytest.raises(UserError, match=r"^https://localhost/a.zip: .*/gone/ca.pem\. To do it by hand"):
        fetch("https://localhost/a.zip", tmp_path / "a.zip")


def test_a_full_disk_is_told_before_and_a_bad_place_at_once(server, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
        with pytest.raises(UserError, match=r"needs 0 MB more. Free some space .0 MB are free there., or choose another place"):
            fetch(f"{server.url}/plain/a.zip", tmp_path / "a.zip")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Cannot write to .*--data_path"):
        fetch(f"{server.url}/plain/a.zip", tmp_path / "file" / "a.zip")
    assert os.listdir(tmp_path) == ["file"]
