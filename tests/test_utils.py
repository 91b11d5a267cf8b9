"""Files that are whole or absent, and sentences about what the disk did."""

import errno
import os
from pathlib import Path

import pytest

from src.utils import UserError, atomic_file, count, make_folders, reading, writing


def test_a_file_appears_whole_or_not_at_all_and_is_flushed_before_it_takes_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def is_folder(handle: int) -> bool:
        return os.path.isdir(f"/proc/self/fd/{handle}") if os.path.exists("/proc/self/fd") else len(calls) == 2

    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("folder" if is_folder(handle) else "file"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    with atomic_file(tmp_path / "new" / "file") as file:
        file.write(b"whole")
        assert not (tmp_path / "new" / "file").exists()
    assert calls == ["file", "rename", "folder"]
    assert (tmp_path / "new" / "file").read_bytes() == b"whole"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(error), atomic_file(tmp_path / "file") as file:
        file.write(b"new")
        raise error
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_flush_a_folder_is_no_failure(tmp_path, monkeypatch, code):
    fsync = os.fsync

    def refuse_folders(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(code, os.strerror(code))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    with atomic_file(tmp_path / "file") as file:
        file.write(b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "error, says",
    [
        (OSError(errno.ENOSPC, "No space left on device"), r"No space left on device. Free some space \([\d,]+ MB are free"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied. Fix the permissions, or choose another place"),
        (IsADirectoryError(errno.EISDIR, "Is a directory"), "it is a folder, and a file is needed. Choose another place"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), "a file stands where a folder is needed. Choose another"),
        (OSError(errno.ENAMETOOLONG, "File name too long"), "File name too long. Choose another place with --output_dir."),
        (OSError("odd"), "odd. Choose another place with --output_dir."),
    ],
)
def test_what_could_not_be_written_is_said_with_its_cause(tmp_path, error, says):
    with pytest.raises(UserError, match=f"^Cannot write to .*/x: {says}"), writing(tmp_path / "x", "--output_dir"):
        raise error
    advice = "Fix its permissions, or choose" if isinstance(error, PermissionError) else "Choose"
    says = rf"^Cannot read .*/x: .*\. {advice} another one\.$"
    with pytest.raises(UserError, match=says), writing("y", "--output_dir"), reading(tmp_path / "x"):
        raise error  # what was read is not blamed on what is written


def test_a_link_that_leads_nowhere_is_not_called_a_file(tmp_path):
    for name, target in (("lost", "nowhere"), ("loop", "loop")):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(UserError, match="a link that leads nowhere stands where"), writing(tmp_path / name, "--output_dir"):
            make_folders(tmp_path / name)


def test_the_sentence_does_not_fail_where_the_place_is_gone_or_its_name_too_long(tmp_path):
    for path in (Path("/nowhere/at/all"), tmp_path / ("x" * 5000), "\udcff"):
        with pytest.raises(UserError, match="Cannot write to"), writing(path, "--output_dir"):
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_count_agrees_with_its_noun():
    assert [count(n, "image") for n in (0, 1, 2, 2000)] == ["0 images", "1 image", "2 images", "2,000 images"]
    assert [count(n, "class", "classes") for n in (1, 2)] == ["1 class", "2 classes"]
