"""Archives that are whole, damaged, or made to do harm: zip and tar.gz alike."""

import gzip
import os
import shutil
import tarfile

import pytest

from src.data import archive
from src.data.archive import extract
from src.utils import UserError
from tests.data.conftest import pack

KINDS = ["zip", "tar.gz"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_that_holds_the_file_takes_the_name_asked_for(tmp_path, kind):
    (tmp_path / ".images.part-left_old").mkdir()
    (tmp_path / ".images.part-left_old" / "left by a kill").touch()
    os.utime(tmp_path / ".images.part-left_old", (0, 0))
    (tmp_path / ".images.part-of_today").mkdir()
    files = {"top/": "", "top/a/b.txt": "b", "top/c.txt": "c", "top/empty/": "", "__MACOSX/._c": "x", "d/e/c.txt": ""}
    path = pack(tmp_path / f"a.{kind}", files)
    extract(path, tmp_path / "new" / "images", "c.txt")
    extract(path, tmp_path / "images", "c.txt")
    for folder in (tmp_path / "images", tmp_path / "new" / "images"):
        assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == ["a", "a/b.txt", "c.txt", "empty"]
        assert folder.stat().st_mode & 0o777 == (tmp_path / "new").stat().st_mode & 0o777
    assert sorted(os.listdir(tmp_path)) == [".images.part-of_today", path.name, "images", "new"]


def test_two_processes_that_unpack_at_once_end_with_one_whole_folder(tmp_path, monkeypatch):
    path, rename = pack(tmp_path / "a.zip", {"top/c.txt": "c"}), os.rename

    def after_another(source, target):
        monkeypatch.setattr(os, "rename", rename)
        extract(path, target, "c.txt")
        rename(source, target)

    monkeypatch.setattr(os, "rename", after_another)
    extract(path, tmp_path / "images", "c.txt")
    assert sorted(os.listdir(tmp_path)) == ["a.zip", "images"] and os.listdir(tmp_path / "images") == ["c.txt"]


def test_a_folder_in_the_way_is_left_alone(tmp_path):
    path = pack(tmp_path / "a.zip", {"top/c.txt": "c"})
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.txt").touch()
    with pytest.raises(UserError, match="Cannot write to"):
        extract(path, tmp_path / "images", "c.txt")
    assert os.listdir(tmp_path / "images") == ["mine.txt"] and len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "files, says",
    [
        ({"top/ok": "", "top/../../evil": "x"}, "outside"),
        ({"top/ok": "", "/tmp/evil": "x"}, "outside"),
        ({"top/ok": "", "C:/evil": "x"}, "outside"),
        ({"top/ok": "", "top\\..\\evil": "x"}, "outside"),
        ({"top/ok": "", "top/link": ("/etc",), "top/link/evil": "x"}, "link"),
        ({"top/a": "", "other/b": ""}, "there is no ok in it"),
        ({}, "there is no ok in it"),
        ({"top/ok": bytes(20_000)}, "20,000 bytes in 1 file or more; allowed are 10,000 in 50"),
        ({"top/ok": ""} | {f"top/{i}": "" for i in range(60)}, "0 bytes in 51 files or more; allowed are 10,000 in 50"),
    ],
)
def test_archives_that_could_do_harm_are_refused_and_leave_nothing(tmp_path, monkeypatch, kind, files, says):
    monkeypatch.setattr(archive, "MAX_BYTES", 10_000)
    monkeypatch.setattr(archive, "MAX_ENTRIES", 50)
    inner = tmp_path / "inner"
    inner.mkdir()
    path = pack(inner / f"a.{kind}", files)
    with pytest.raises(UserError, match=says):
        extract(path, inner / "images", "ok")
    assert os.listdir(inner) == [path.name] and os.listdir(tmp_path) == ["inner"]


@pytest.mark.parametrize("type", [tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_a_tar_with_a_device_or_a_hard_link_is_refused(tmp_path, type):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as target:
        member = tarfile.TarInfo("top/ok")
        member.type, member.linkname = type, "/etc/passwd"
        target.addfile(member)
    with pytest.raises(UserError, match="its entry 'top/ok' is a link"):
        extract(tmp_path / "a.tar.gz", tmp_path / "images", "ok")
    assert os.listdir(tmp_path) == ["a.tar.gz"]


def test_no_owner_and_no_permission_of_a_tar_reaches_the_disk(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as target:
        member = tarfile.TarInfo("top/ok")
        member.mode, member.uid = 0o4777, 12345
        target.addfile(member)
    extract(tmp_path / "a.tar.gz", tmp_path / "images", "ok")
    (tmp_path / "plain").touch()
    found, plain = ((path.stat().st_mode, path.stat().st_uid) for path in (tmp_path / "images" / "ok", tmp_path / "plain"))
    assert found == plain


ANY = [
    lambda data: data[:-3000],
    lambda data: b"",
    lambda data: b"<html>",
    lambda data: data[:9000] + bytes(50) + data[9050:],
]
DAMAGE = {
    "zip": [
        *ANY,
        lambda data: data.replace(b"\0\0\x08\0", b"\0\0\x63\0"),  # a way of compression that there is not
        lambda data: data.replace(b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\x01\0"),  # a password
        lambda data: data.replace(b"PK\x01\x02\x14\x03\x14", b"PK\x01\x02\x14\x03\xff"),  # a version that there is not
        lambda data: data.replace(b"\x14\0\0\0\x08\0", b"\x14\0\0\x08\x08\0").replace(b"top/1", b"top/\xff"),  # not UTF-8
    ],
    "tar.gz": [
        *ANY,
        lambda data: data[:-4],  # the end of the checksum
        lambda data: data[:-6] + bytes(2) + data[-4:],  # the checksum is another one
        lambda data: gzip.compress(b"<html>" * 1000),
    ],
}


@pytest.mark.parametrize("kind, damage", [(kind, damage) for kind in KINDS for damage in DAMAGE[kind]])
def test_a_damaged_archive_is_named_and_left(tmp_path, kind, damage):
    path = pack(tmp_path / f"a.{kind}", {f"top/{i}": os.urandom(500) for i in range(40)})
    path.write_bytes(damage(path.read_bytes()))
    what = rf"(not a whole {kind} archive \(.+\)|an HTML page.*|empty)\. Move it else|refused: its entry .* encrypted .* away"
    with pytest.raises(UserError, match=rf"a.{kind} is ({what})"):
        extract(path, tmp_path / "images", "3")
    assert os.listdir(tmp_path) == [path.name]


def test_a_bomb_that_declares_less_than_it_holds_stops_at_what_it_declares(tmp_path):
    path = pack(tmp_path / "a.zip", {"top/bomb": bytes(5_000_000)})
    data = path.read_bytes()
    path.write_bytes(data.replace((5_000_000).to_bytes(4, "little"), (100).to_bytes(4, "little")))
    with pytest.raises(UserError, match="is not a whole zip archive"):
        extract(path, tmp_path / "images", "bomb")
    assert os.listdir(tmp_path) == ["a.zip"]


def test_an_archive_that_cannot_be_read_is_told_as_that(commons):
    pack(commons.path / "a.zip", {"top/ok": ""}).chmod(0)
    with commons.as_user(), pytest.raises(UserError, match=r"Cannot read .*a.zip: Permission denied"):
        extract(commons.path / "a.zip", commons.path / "images", "ok")
    assert os.listdir(commons.path) == ["a.zip"]


def test_too_little_space_is_said_before_the_unpacking(tmp_path, monkeypatch):
    path = pack(tmp_path / "a.zip", {"top/ok": bytes(3_000_000)})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(UserError, match=r"unpacking a.zip needs 3 MB. Free some space .* --data_path"):
        extract(path, tmp_path / "images", "ok")
    assert os.listdir(tmp_path) == ["a.zip"]


def test_ctrl_c_while_unpacking_leaves_nothing(tmp_path, monkeypatch):
    path = pack(tmp_path / "a.zip", {"top/a": "a", "top/b": "b"})

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfileobj", interrupt)
    with pytest.raises(KeyboardInterrupt):
        extract(path, tmp_path / "images", "a")
    assert os.listdir(tmp_path) == ["a.zip"]
