"""Decode once: the file that keeps the pixels, when it is made again, and what the user reads when something is wrong."""

import errno
import itertools
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from src.data import cache
from src.data.cache import open_or_decode
from src.data.folder import ImageFolder
from src.data.workers import Task
from src.dataset import DATASETS, DeviceImages, prepare
from src.utils import UserError

ROOT = Path(__file__).parents[2]


class Numbered(Dataset):
    """A user's own: tensors that show their number, no names, no fingerprint."""

    def __init__(self, count=10, add=0):
        self.items = [(index + add, index % 4) for index in range(count)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        number, label = self.items[index]
        return torch.full((3, 8, 8), number, dtype=torch.uint8), label


def decode(dataset, folder, workers=0, size=8):
    task = Task(dataset, 3, size, range(len(dataset)))
    return open_or_decode(task, "mine", "train", "/data/mine", Path(folder), workers, skip_damaged=False, other=list)


def pictures(folder, count=6):
    """A folder of pictures, each of another brightness."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (40 * i,) * 3).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cache_holds_the_decoded_images_in_order(tmp_path, monkeypatch, workers):
    monkeypatch.setattr("src.data.workers.CHUNK", 4)
    state = torch.get_rng_state()
    images = decode(Numbered(), tmp_path, workers)
    assert torch.equal(state, torch.get_rng_state()), "decoding must not move the run's random numbers"
    assert images[:][:, 0, 0, 0].tolist() == list(range(10)) and images.shape == (10, 3, 8, 8)
    assert images.labels.dtype == torch.int64 and images.labels.tolist() == [i % 4 for i in range(10)]
    assert images.classes == images.class_ids == ["0", "1", "2", "3"]
    np.testing.assert_array_equal(np.load(images.path, mmap_mode="r"), images[:])


def test_one_picture_of_one_class_is_one(tmp_path, capsys):
    images = decode(ImageFolder(pictures(tmp_path / "mine", 2), "train"), tmp_path / "cache")
    out = capsys.readouterr().out
    assert f"mine train: decoding 1 image to {images.path}\n" in out
    assert f"mine train: 1 image of 1 class at 8x8, from {images.path}\n" in out


def test_decoding_works_in_processes_that_start_from_nothing(tmp_path):
    """spawn, as on macOS and Windows: everything handed to a worker has to pickle."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(ROOT)!r})
        import torch.multiprocessing
        from src.dataset import prepare
        if __name__ == "__main__":
            torch.multiprocessing.set_start_method("spawn")
            print(len(prepare("shapes", "", "val", 8, {str(tmp_path / "cache")!r}, 2)))
    """)
    )
    result = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert result.stdout.endswith("2000\n"), result.stderr


def test_a_choice_of_classes_is_a_view_of_the_one_cache(tmp_path, capsys):
    every = prepare("shapes", "", "val", 8, tmp_path, 0)
    assert re.search(r"(?m)^shapes val: 2,000 images of 10 classes at 8x8, from ", capsys.readouterr().out)
    chosen = {words: prepare("shapes", "", "val", 8, tmp_path, 0, words) for words in ("red star,1,green square", "1,9,2", "9")}
    for images, labels in zip(chosen.values(), ([9, 1, 2], [1, 9, 2], [9])):
        rows = [i for i, label in enumerate(every.labels.tolist()) if label in labels]
        assert images.classes == images.class_ids == [every.classes[label] for label in labels] and len(images) == len(rows)
        assert [labels[label] for label in images.labels.tolist()] == every.labels[rows].tolist()
        x_0, y = DeviceImages(images, "cpu").batch(torch.arange(len(rows)))
        assert torch.equal(x_0, DeviceImages(every, "cpu").batch(torch.tensor(rows))[0]) and torch.equal(y, images.labels)
        np.testing.assert_array_equal(images[5:9], every[np.array(rows[5:9])])
        assert images.file.base is not None and images.path == every.path  # mapped, not copied
    assert "decoding" not in capsys.readouterr().out
    assert len({images.fingerprint for images in (every, *chosen.values())}) == 4
    assert prepare("shapes", "", "val", 8, tmp_path, 0, "9").fingerprint == chosen["9"].fingerprint
    assert prepare("shapes", "", "val", 8, tmp_path, 0, "0,1,2,3,4,5,6,7,8,9").fingerprint == every.fingerprint


# --- when it is made again --------------------------------------------------------------------------
def why_decoded(dataset, folder, capsys):
    capsys.readouterr()
    images = decode(dataset, folder)
    return next((line for line in capsys.readouterr().out.splitlines() if "decoding" in line), ""), images


def test_the_cache_is_made_again_when_it_is_no_longer_true(tmp_path, capsys, monkeypatch):
    assert "decoding 10 images" in why_decoded(Numbered(), tmp_path, capsys)[0]
    assert why_decoded(Numbered(), tmp_path, capsys)[0] == ""
    assert "the pictures have changed" in why_decoded(Numbered(9), tmp_path, capsys)[0]
    assert "the pictures have changed" in why_decoded(Numbered(9, add=1), tmp_path, capsys)[0]
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:1000], whole[:3], b"", whole + b"x", b"\x00" * 300, b"PK\x03\x04" + whole):
        file.write_bytes(damaged)
        assert "the cache is damaged" in why_decoded(Numbered(9, add=1), tmp_path, capsys)[0]
    assert file.read_bytes() == whole
    monkeypatch.setattr(cache, "FORMAT", 99)
    assert "another version" in why_decoded(Numbered(9, add=1), tmp_path, capsys)[0]


def test_a_folder_s_cache_follows_its_files(tmp_path, capsys):
    folder = pictures(tmp_path / "pictures")
    for change, said in [
        (lambda: None, "decoding 5 images"),
        (lambda: None, ""),
        (lambda: Image.new("RGB", (8, 8), "red").save(folder / "3.png"), "the pictures have changed"),
        (lambda: (folder / "3.png").unlink(), "decoding 4 images"),
        (lambda: (folder / "4.png").rename(folder / "7.png"), "the pictures have changed"),
    ]:
        change()
        assert said in why_decoded(ImageFolder(folder, "train"), tmp_path / "cache", capsys)[0]


def test_two_folders_two_splits_and_two_sizes_have_a_file_each(tmp_path):
    for name in ("one", "two"):
        pictures(tmp_path / name, 2)
    kinds = itertools.product(("one", "two"), ("train", "val"), (8, 16))
    assert len({prepare("folder", tmp_path / name, *kind, tmp_path / "cache", 0).path for name, *kind in kinds}) == 8


def test_an_own_dataset_is_one_entry(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "mine", lambda path, split, image_size: Numbered())
    assert len(prepare("mine", tmp_path, "train", 16, tmp_path / "cache", 0)) == 10
    with pytest.raises(UserError, match=r"no dataset 'yours': choose one of .*shapes"):
        prepare("yours", tmp_path, "train", 16)
    wrong = Numbered()
    wrong.classes = ["only one"]
    with pytest.raises(UserError, match=r"labels from 0 to 3 but 1 class name;"):
        decode(wrong, tmp_path / "cache")


# --- the fingerprint, by which a checkpoint knows its data --------------------------------------------
def test_the_fingerprint_stays_when_the_data_are_moved_copied_and_renamed(tmp_path):
    before = decode(ImageFolder(pictures(tmp_path / "here"), "train"), tmp_path / "one").fingerprint
    (tmp_path / "here").rename(tmp_path / "there")
    for file in (tmp_path / "there").iterdir():
        os.utime(file, (0, 0))
    assert decode(ImageFolder(tmp_path / "there", "train"), tmp_path / "two").fingerprint == before != ""
    assert decode(ImageFolder(tmp_path / "there", "train"), tmp_path / "two").fingerprint == before  # read back


def test_the_fingerprint_notices_another_picture_label_order_and_size(tmp_path):
    other, relabelled, turned = Numbered(), Numbered(), Numbered()
    other.items[7] = (8, 3)
    relabelled.items[7] = (7, 0)
    turned.items.reverse()
    kinds = [Numbered(), Numbered(9), other, relabelled, turned]
    found = {decode(kind, tmp_path / str(i)).fingerprint for i, kind in enumerate(kinds)}
    found.add(decode(Numbered(), tmp_path, size=16).fingerprint)
    assert len(found) == 6


# --- names that are not text ------------------------------------------------------------------------
@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_utf_8_become_text_that_every_file_can_hold(tmp_path):
    for folder in (b"caf\xe9", b"caf\xe8", "☃".encode(), b"new\nline", b'"quoted"'):
        path = os.path.join(os.fsencode(tmp_path), b"data\xff", folder)
        os.makedirs(path)
        for i in range(4):
            Image.new("RGB", (8, 8)).save(os.fsdecode(os.path.join(path, b"%d\xff.png" % i)))
    images = prepare("folder", os.fsdecode(os.path.join(os.fsencode(tmp_path), b"data\xff")), "train", 8, tmp_path / "cache", 0)
    assert images.classes == ['"quoted"', "caf\\udce8", "caf\\udce9", "new\\nline", "☃"] and len(images) == 19  # of 20
    for name in images.classes:
        assert json.loads(json.dumps(name, ensure_ascii=False).encode()) == name
    torch.save({"classes": images.classes}, tmp_path / "x.pth")
    assert torch.load(tmp_path / "x.pth", weights_only=True)["classes"] == images.classes


# --- faults -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_guessed_is_said_once_for_all_pictures(tmp_path, capfd, monkeypatch, workers):
    monkeypatch.setattr("src.data.workers.CHUNK", 2)
    folder = pictures(tmp_path / "pictures", 8)
    for i in range(6):
        Image.fromarray(np.full((8, 8), 3000, np.uint16)).save(folder / f"{i}.png")
    for _ in range(2):
        decode(ImageFolder(folder, "train"), tmp_path / "cache", workers)
    said = capfd.readouterr()
    assert len(re.findall(r"note: [56] pictures have samples .* taken as 12 bits; e.g. .*\d.png\n", said.out)) == 1
    assert said.err == "" or "decoding" in said.err


class Gone(Numbered):
    fingerprint = "x"

    def __getitem__(self, index):
        return Image.open("/nowhere/at/all"), 0


def test_a_user_s_dataset_that_cannot_read_its_files_is_no_fault_of_the_cache(tmp_path):
    with pytest.raises(UserError, match=r"Image 0 of the dataset cannot be read: .*/nowhere/at/all"):
        decode(Gone(), tmp_path)


def test_what_a_killed_run_left_is_removed_once_it_is_old(tmp_path):
    old, young = (tmp_path / f".shapes-val-8.npy.part-{name}" for name in ("00aa", "11bb"))
    old.touch()
    young.touch()
    os.utime(old, (0, 0))
    prepare("shapes", "", "val", 8, tmp_path, 0)
    assert not old.exists() and young.exists()


def test_two_runs_that_decode_at_once_end_with_one_whole_cache(tmp_path):
    """The second finds the file of the first, which may be mapped by now, and leaves it in place."""

    class Same(Numbered):
        fingerprint = "the same"

    class Meanwhile(Same):
        def __getitem__(self, index):
            if index == 9:
                self.first = decode(Same(), tmp_path).path.stat().st_ino
            return super().__getitem__(index)

    dataset = Meanwhile()
    images = decode(dataset, tmp_path)
    assert images.path.stat().st_ino == dataset.first and len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_cache_that_cannot_be_read_is_not_made_again(tmp_path, monkeypatch, number):
    decode(Numbered(), tmp_path)

    def failing(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(np.lib.format, "read_magic", failing)
    with pytest.raises(UserError, match=rf"Cannot read .*npy: {os.strerror(number)}"):
        decode(Numbered(), tmp_path)


def test_a_right_cache_in_a_read_only_folder_is_used_and_a_wrong_one_is_one_sentence(commons):
    folder = commons.path / "cache"
    decode(Numbered(), folder)
    folder.chmod(0o555)
    with commons.as_user():
        assert len(decode(Numbered(), folder)) == 10
        with pytest.raises(UserError, match=r"Cannot write to .*npy: Permission denied. .*--cache_path"):
            decode(Numbered(9), folder)
        assert len(decode(Numbered(), folder)) == 10


@pytest.mark.skipif(os.name == "nt", reason="no resource limits on Windows")
def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    program = textwrap.dedent(f"""
        import resource
        from src.dataset import prepare
        from src.utils import UserError
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        try:
            prepare("shapes", "", "val", 32, {str(tmp_path / "cache")!r}, 0)
        except UserError as error:
            print(error)
    """)
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "It needs 6 MB" in result.stdout and "--cache_path" in result.stdout, result.stderr
    assert result.returncode == 0 and os.listdir(tmp_path / "cache") == []
