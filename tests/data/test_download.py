"""fetch and extract against a server and archives that misbehave."""

import hashlib
import http.server
import os
import stat
import threading
import time
import zipfile

import pytest

from src.data import download
from src.data.download import extract, fetch
from src.utils import UserError

DATA = bytes(os.urandom(300_000))
MD5 = hashlib.md5(DATA).hexdigest()
QUICK = {"timeout": (2.0, 0.5), "pause": 0.01}


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves DATA at every address; the first part of the path says how it misbehaves."""

    protocol_version = "HTTP/1.0"

    def do_GET(self):
        way, wanted = self.path.split("/")[1], self.headers.get("Range")
        self.server.requests.append((way, wanted))
        first_time = len(self.server.requests) == 1
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and way != "no-range" else 0
        if way == "missing":
            return self.send_error(404)
        if way == "busy" and first_time:
            return self.send_error(503)
        if start >= len(DATA):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(DATA)}")
            return self.end_headers()
        body = b"<html>please log in</html>" if way == "html" else DATA[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", "text/html" if way == "html" else "application/zip")
        if way != "no-length":
            self.send_header("Content-Length", str(len(body) + (1000 if way == "lie" else 0)))
        if start:
            moved = 7 if way == "elsewhere" and len(self.server.requests) == 1 else 0
            self.send_header("Content-Range", f"bytes {start + moved}-{len(DATA) - 1}/{len(DATA)}")
        self.end_headers()
        if (way in ("cut", "no-range") and first_time) or way == "always-cut":
            body = body[:100_000]
        if way == "stall" and first_time:
            self.wfile.write(body[:100_000])
            self.wfile.flush()
            time.sleep(1.0)
            return
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests = []
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("way", ["plain", "no-length", "cut", "no-range", "stall", "busy"])
def test_the_file_arrives_whole_whatever_the_line_does(server, tmp_path, way):
    fetch(f"{server.url}/{way}/a.zip", tmp_path / "new" / "a.zip", len(DATA), MD5, **QUICK)
    assert (tmp_path / "new" / "a.zip").read_bytes() == DATA
    assert os.listdir(tmp_path / "new") == ["a.zip"]


def test_without_size_and_checksum_a_cut_is_still_noticed(server, tmp_path):
    fetch(f"{server.url}/cut/a.zip", tmp_path / "a.zip", **QUICK)
    assert (tmp_path / "a.zip").read_bytes() == DATA


def test_a_cut_keeps_the_partial_file_and_the_next_start_continues_it(server, tmp_path):
    with pytest.raises(UserError, match="run the same command again to continue"):
        fetch(f"{server.url}/always-cut/a.zip", tmp_path / "a.zip", len(DATA), MD5, attempts=1, **QUICK)
    kept = (tmp_path / "a.zip.part").read_bytes()
    assert 100_000 - download.NETWORK_BLOCK < len(kept) <= 100_000 and DATA.startswith(kept)
    fetch(f"{server.url}/plain/a.zip", tmp_path / "a.zip", len(DATA), MD5, **QUICK)
    assert server.requests[-1] == ("plain", f"bytes={len(kept)}-")
    assert (tmp_path / "a.zip").read_bytes() == DATA


def test_a_complete_partial_file_is_not_asked_for_again(server, tmp_path):
    (tmp_path / "a.zip.part").write_bytes(DATA)
    fetch(f"{server.url}/plain/a.zip", tmp_path / "a.zip", len(DATA), MD5, **QUICK)
    assert not server.requests
    (tmp_path / "b.zip.part").write_bytes(DATA)
    fetch(f"{server.url}/plain/b.zip", tmp_path / "b.zip", md5=MD5, **QUICK)  # size unknown: the server says 416
    assert (tmp_path / "b.zip").read_bytes() == DATA


@pytest.mark.parametrize("stale", [b"x" * 400_000, DATA + b"more"])
@pytest.mark.parametrize("size", [0, len(DATA)])
def test_a_partial_file_longer_than_the_download_is_started_over(server, tmp_path, stale, size):
    (tmp_path / "a.zip.part").write_bytes(stale)
    fetch(f"{server.url}/plain/a.zip", tmp_path / "a.zip", size, MD5, **QUICK)
    assert (tmp_path / "a.zip").read_bytes() == DATA


def test_a_server_that_continues_elsewhere_is_started_over(server, tmp_path):
    (tmp_path / "a.zip.part").write_bytes(DATA[:5000])
    fetch(f"{server.url}/elsewhere/a.zip", tmp_path / "a.zip", len(DATA), MD5, **QUICK)
    assert (tmp_path / "a.zip").read_bytes() == DATA


def test_a_wrong_checksum_names_both_and_removes_the_file(server, tmp_path):
    with pytest.raises(UserError, match=f"{MD5}.*{'0' * 32}"):
        fetch(f"{server.url}/plain/a.zip", tmp_path / "a.zip", len(DATA), "0" * 32, **QUICK)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "way, size, says",
    [
        ("missing", 0, "404.*by hand.*a.zip"),
        ("html", 0, "web page"),
        ("plain", 5, "offers 300,000 bytes, expected 5; nothing was downloaded"),
        ("lie", len(DATA), "offers 301,000 bytes, expected 300,000"),
        ("no-length", 5, "more than the 5 bytes"),
    ],
)
def test_what_cannot_be_right_is_refused_at_once(server, tmp_path, way, size, says):
    with pytest.raises(UserError, match=says):
        fetch(f"{server.url}/{way}/a.zip", tmp_path / "a.zip", size, **QUICK)
    assert len(server.requests) == 1 and not (tmp_path / "a.zip").exists()


def test_no_network_and_bad_addresses_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no connection"):
        fetch("http://127.0.0.1:9/a.zip", tmp_path / "a.zip", attempts=2, **QUICK)
    for url in ("not a url", "ftp://127.0.0.1/a.zip"):
        with pytest.raises(UserError, match="DATA_URL"):
            fetch(url, tmp_path / "a.zip", **QUICK)


def test_a_full_disk_is_told_before_and_during_the_download(server, tmp_path, monkeypatch):
    usage = download.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "disk_usage", lambda _: usage._replace(free=10))
        with pytest.raises(UserError, match="Make room"):
            fetch(f"{server.url}/plain/a.zip", tmp_path / "a.zip", **QUICK)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write"):
        fetch(f"{server.url}/plain/a.zip", tmp_path / "file" / "a.zip", **QUICK)


# --- extract ----------------------------------------------------------------------------------------
def make_zip(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_the_one_folder_takes_the_name_asked_for(tmp_path):
    (tmp_path / ".images.part").mkdir()
    (tmp_path / ".images.part" / "left by a kill").touch()
    extract(
        make_zip(tmp_path / "a.zip", {"top/": "", "top/a/b.txt": "b", "top/c.txt": "c", "__MACOSX/._c": "x"}),
        tmp_path / "new" / "images",
    )
    extract(tmp_path / "a.zip", tmp_path / "images")
    assert (tmp_path / "images" / "a" / "b.txt").read_text() == "b"
    assert (tmp_path / "new" / "images" / "c.txt").read_text() == "c"
    assert sorted(os.listdir(tmp_path)) == ["a.zip", "images", "new"]


def link(name, target):
    member = zipfile.ZipInfo(name)
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member, target


@pytest.mark.parametrize(
    "files, says",
    [
        ({"top/ok": "", "top/../../evil": "x"}, "outside"),
        ({"top/ok": "", "/tmp/evil": "x"}, "outside"),
        ({"top/ok": "", "C:/evil": "x"}, "outside"),
        ({"top/ok": "", "top\\..\\evil": "x"}, "outside"),
        (dict([link("top/link", "/etc"), ("top/link/evil", "x")]), "link"),
        ({"top/a": "", "other/b": ""}, "expected one folder in it, found other, top"),
        ({}, "found nothing"),
        ({"top/a": bytes(20_000)}, "more than 10,000"),
        ({f"top/{i}": "" for i in range(60)}, "more than 50"),
    ],
)
def test_archives_that_could_do_harm_are_refused_and_leave_nothing(tmp_path, files, says):
    inner = tmp_path / "inner"
    inner.mkdir()
    make_zip(inner / "a.zip", files)
    with pytest.raises(UserError, match=says):
        extract(inner / "a.zip", inner / "images", max_bytes=10_000, max_entries=50)
    assert os.listdir(inner) == ["a.zip"] and os.listdir(tmp_path) == ["inner"]


def test_a_bomb_that_declares_less_than_it_holds_stops_at_what_it_declares(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"top/bomb": bytes(5_000_000)})
    data = path.read_bytes()
    path.write_bytes(data.replace((5_000_000).to_bytes(4, "little"), (100).to_bytes(4, "little")))
    with pytest.raises(UserError, match="Delete it"):
        extract(path, tmp_path / "images")
    assert os.listdir(tmp_path) == ["a.zip"]


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-3000], lambda data: b"", lambda data: b"<html>", lambda data: data[:2000] + bytes(50) + data[2050:]],
)
def test_a_damaged_archive_is_named_and_to_be_deleted(tmp_path, damage):
    path = make_zip(tmp_path / "a.zip", {f"top/{i}": os.urandom(500) for i in range(40)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"a.zip is not a whole zip archive.*Delete it"):
        extract(path, tmp_path / "images")
    assert os.listdir(tmp_path) == ["a.zip"]


def test_ctrl_c_while_unpacking_leaves_nothing(tmp_path, monkeypatch):
    path = make_zip(tmp_path / "a.zip", {"top/a": "a", "top/b": "b"})

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(download.shutil, "copyfileobj", interrupt)
    with pytest.raises(KeyboardInterrupt):
        extract(path, tmp_path / "images")
    assert os.listdir(tmp_path) == ["a.zip"]
