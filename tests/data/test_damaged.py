"""Damaged pictures are named at once and moved aside or left out; what else is left out is counted."""

import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.data.archive import extract
from src.data.folder import Picture, hold_out
from src.dataset import prepare
from src.evaluation.picture_set import read_set
from src.runtime.checkpoint import load_checkpoint
from src.utils import UserError

NAMES = [f"{kind}/it's {i}\n.png" for kind in "ab" for i in range(40)]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 132735\n"
PAGE = b"\n<!DOCTYPE html>\n<html><title>Sign in</title></html>"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """80 pictures with names that a shell has to quote. Each third is damaged, in both splits and in several chunks."""
    monkeypatch.setattr("src.data.workers.CHUNK", 8)
    for i, name in enumerate(NAMES):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (3 * i, 0, 0)).save(path)
        path.write_bytes(path.read_bytes()[: -20 if i % 3 == 0 else None])
    return tmp_path / "data"


def opened(folder, split="train", skip=False, workers=0):
    return prepare("folder", folder, split, 8, folder.parent / "cache", workers, skip_damaged=skip)


@pytest.mark.parametrize("workers", [0, 2])
def test_all_of_both_splits_are_named_at_once_and_the_advice_moves_them(folder, workers):
    with pytest.raises(UserError, match=r"; and 24 more\. 'sh .*--skip_damaged' goes on without them\.$") as refusal:
        opened(folder, workers=workers)
    (script,) = (folder.parent / "cache").iterdir()  # and no cache
    assert script.read_text().startswith("# 27 pictures that cannot be decoded\n")
    assert script.read_text().count("# ") == 28
    subprocess.run(re.search("'(sh .*?)' renames", str(refusal.value))[1], shell=True, check=True)
    assert len(list(folder.rglob("*.damaged"))) == 27 and len(opened(folder)) + len(opened(folder, "val")) == 53


def test_without_them_the_rest_is_there_and_the_cache_knows(folder, capsys):
    left_out = [opened(folder, split, skip=True) for split in ("train", "val")]
    red = np.concatenate([images[:][:, 0, 0, 0] for images in left_out])
    assert sorted(red) == [3 * i for i in range(80) if i % 3] and sum(images.skipped for images in left_out) == 27
    assert f"note: {left_out[0].skipped} damaged pictures left out of train; " in capsys.readouterr().out
    opened(folder, skip=True)
    assert "decoding" not in (said := capsys.readouterr().out) and "damaged pictures left out of train" in said
    with pytest.raises(UserError, match="and 24 more"):
        opened(folder)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"is not a picture .*; and 77 more\."):
        opened(folder, skip=True)


def test_what_came_in_place_of_a_file_is_called_so(tmp_path):
    pages = [PAGE, b"\xef\xbb\xbf" + PAGE, b"<head><title>Sign in"]
    wrong = [(POINTER, "is a git-LFS pointer; 'git lfs pull'"), *((page, "is an HTML page") for page in pages)]
    for content, says in [*wrong, (b"<?xml version='1.0'?><Error>", "is an XML page"), (b"", "is empty")]:
        for name in ("x/0.png", "x.npz", "x.pth", "x.zip"):
            (tmp_path / "x").mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        for read in (
            lambda: read_set(tmp_path / "x", "", tmp_path / "cache"),
            lambda: read_set(tmp_path / "x.npz", ""),
            lambda: load_checkpoint(tmp_path / "x.pth"),
            lambda: extract(tmp_path / "x.zip", tmp_path / "out", "wnids.txt"),
        ):
            with pytest.raises(UserError, match=f"/x(/0.png|.npz|.pth|.zip) .*{says}"):
                read()


def test_pictures_to_compare_with_are_named_at_once_too(folder):
    with pytest.raises(UserError, match=r"; and 24 more\. 'sh .*damaged.sh' renames .* passed over\.$") as refusal:
        read_set(folder, "--reference", folder.parent / "cache")
    subprocess.run(re.search("'(sh .*?)' renames", str(refusal.value))[1], shell=True, check=True)
    assert len(read_set(folder, "--reference")) == 53


def test_what_is_left_out_of_whole_pictures_is_counted(tmp_path, capsys):
    frames = [Image.new("L", (16, 16), 9 * i) for i in range(4)]
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for name in ("a.gif", "b.webp", "c.tif", "d.tif", "e.png"):
            options = {"compression": "tiff_lzw"} if name == "d.tif" else {}
            frames[0].save(tmp_path / "data" / split / name, save_all=True, append_images=frames[1:], **options)
        for i, size in enumerate([(16, 16), (32, 16), (33, 16), (16, 160), (6, 7)]):
            Image.new("L", size).save(tmp_path / "data" / split / f"{i}.png")
    images = prepare("folder", tmp_path / "data", "train", 16, tmp_path / "cache", 0, channels=1)
    assert (images[:] < 5).all(), "the first frame is the picture"
    assert sorted(re.findall("note: (.*); e.g. ", capsys.readouterr().out)) == [
        "1 picture has fewer than 16 pixels a side, the smallest 6: enlarged",
        "2 pictures have sides of more than 2:1; the square in the middle is used, 10% of the longest",
        "5 pictures have further pages or frames, which are left out, 15 in all",
    ]


@pytest.mark.parametrize("sizes", [(10, 1), (1, 10), (1, 1, 30, 1), (1, 1), (1,) * 50, (40, 60), (3, 100, 1, 77)])
def test_the_only_picture_of_a_class_is_never_held_out(sizes):
    """Where all classes have one there is no other."""
    classes = [f"c{n}" for n in range(len(sizes))]
    entries = {f"{kind}/{i}": os.DirEntry for kind, size in zip(classes, sizes) for i in range(size)}
    train, val = hold_out([Picture(tuple(name.split("/")), entry) for name, entry in entries.items()], classes)
    assert {picture.name for picture in train} | {picture.name for picture in val} == entries.keys()
    assert len(train) + len(val) == sum(sizes) and 1 <= len(val) <= max(1, round(sum(sizes) / 20))
    lacking = set(classes) - Counter(picture.group for picture in train).keys()
    assert len(lacking) == (max(sizes) == 1)
