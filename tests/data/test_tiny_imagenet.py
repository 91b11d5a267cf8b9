"""Tiny ImageNet as archives and people have it: labels, copies that were rearranged, and what is missing."""

import io
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.data.tiny_imagenet import TINY_IMAGENET, TinyImageNet
from src.dataset import prepare
from src.utils import UserError
from tests.data.conftest import pack

WNIDS = ["n02", "n01", "n03"]  # not sorted: labels follow the file
NEVER_ASKED = "http://127.0.0.1:9/never-asked"


def jpeg(random, mode="RGB", size=64):
    shape = (size, size) if mode == "L" else (size, size, 3)
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def files():
    """{name: bytes} in the layout of the real one: 3 classes x 6 in train, 9 in val, greyscale ones and strays among them."""
    random = np.random.default_rng(0)
    found = {
        "wnids.txt": "\n".join(WNIDS) + "\n",
        ".DS_Store": b"stray",
        "words.txt": "n00\tentity\nn01\tgoldfish, Carassius auratus\nn02\tmud turtle\n",
    }
    for wnid in WNIDS:
        found[f"train/{wnid}/{wnid}_boxes.txt"] = "x"
        found[f"train/{wnid}/images/Thumbs.db"] = found[f"train/{wnid}/images/._{wnid}_0.JPEG"] = b"stray"
        for i in range(6):
            found[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = jpeg(random, "L" if i == 5 else "RGB")
    lines = [f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t0\t62\t62" for i in range(9)]
    found["val/val_annotations.txt"] = "\n".join(lines) + "\n"
    return found | {f"val/images/val_{i}.JPEG": jpeg(random) for i in range(9)}


def zipped(path, files, top="tiny-imagenet-200/", **more):
    return pack(path, {top + name: data for name, data in files.items()} | more)


@pytest.fixture
def tiny(files, tmp_path):
    """The extracted folder, obtained as a user with a zip beside it obtains it."""
    path = tmp_path / "data" / "tiny-imagenet-200"
    path.parent.mkdir()
    archive = zipped(path.with_name("tiny-imagenet-200.zip"), files)
    TINY_IMAGENET.obtain(path, NEVER_ASKED)
    archive.unlink()
    return path


def labels(path, split="val"):
    """{name of the picture: class id}"""
    found = TinyImageNet(path, split)
    assert len({Path(file).name for file in found.files}) == len(found.files), "a picture twice"
    return {Path(file).name: found.class_ids[label] for file, label in zip(found.files, found.labels)}


VAL = {f"val_{i}.JPEG": WNIDS[i % 3] for i in range(9)}


# --- what is read -----------------------------------------------------------------------------------
def test_labels_follow_wnids_txt_and_names_come_from_words_txt(tiny, capsys):
    train = TinyImageNet(tiny, "train")
    assert train.class_ids == WNIDS and train.classes == ["mud turtle", "goldfish", "n03"]
    assert [WNIDS[label] in file for file, label in zip(train.files, train.labels)] == [True] * 18
    assert labels(tiny) == VAL
    said = capsys.readouterr().out
    assert "18 pictures of 3 classes; the official set has 100,000 of 200" in said
    assert "note: passed over in" in said and "3 .db (n01/images/Thumbs.db, ...)" in said and "_boxes" not in said


def test_its_pictures_are_decoded_as_they_are(tiny, tmp_path):
    images, source = prepare("tiny-imagenet", tiny, "train", 64, tmp_path / "cache", 0), TinyImageNet(tiny, "train")
    assert images.classes == source.classes and images.class_ids == WNIDS and images.labels.tolist() == source.labels
    for index in range(18):
        with Image.open(source.files[index]) as image:
            np.testing.assert_array_equal(images[index], np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def sort_val(tiny, count, deeper=""):
    """Move some pictures of val into class folders, as scripts for other programs do."""
    for name, wnid in list(VAL.items())[:count]:
        (tiny / "val" / wnid / deeper).mkdir(parents=True, exist_ok=True)
        os.rename(tiny / "val" / "images" / name, tiny / "val" / wnid / deeper / name)


@pytest.mark.parametrize("deeper", ["", "images"])
def test_a_val_that_was_sorted_into_class_folders_reads_the_same(tiny, deeper):
    sort_val(tiny, 9, deeper)
    assert labels(tiny) == VAL
    (tiny / "val" / "val_annotations.txt").unlink()
    (tiny / "val" / "images").rmdir()
    assert labels(tiny) == VAL


@pytest.mark.parametrize("count", range(1, 9))
def test_a_sorting_that_was_interrupted_reads_the_same(tiny, count):
    sort_val(tiny, count)
    assert labels(tiny) == VAL
    shutil.copy(tiny / "val" / "n02" / "val_0.JPEG", tiny / "val" / "images")  # copied, not moved
    assert labels(tiny) == VAL


def test_an_interrupted_sorting_without_the_labels_of_the_rest_is_refused(tiny):
    sort_val(tiny, 5)
    (tiny / "val" / "val_annotations.txt").unlink()
    with pytest.raises(UserError, match=r"it has no val/val_annotations.txt"):
        TinyImageNet(tiny, "val")


def test_train_without_images_folders_reads_the_same(tiny):
    before = labels(tiny, "train")
    for wnid in WNIDS:
        for file in list((tiny / "train" / wnid / "images").iterdir()):
            file.rename(tiny / "train" / wnid / file.name)
    assert labels(tiny, "train") == before


def test_text_files_of_windows_are_read(tiny):
    for name in ("wnids.txt", "words.txt", "val/val_annotations.txt"):
        text = (tiny / name).read_text()
        (tiny / name).write_text("\ufeff" + text, encoding="utf-8", newline="\r\n")
    assert TinyImageNet(tiny, "train").classes == ["mud turtle", "goldfish", "n03"] and labels(tiny) == VAL


def test_a_class_that_is_named_twice_is_one(tiny):
    (tiny / "wnids.txt").write_text("n02\nn01\nn02\nn03\n")
    assert TinyImageNet(tiny, "train").class_ids == WNIDS and labels(tiny) == VAL


def test_a_picture_that_was_renamed_as_damaged_is_not_missing(tiny):
    for name in ("val/images/val_3.JPEG", "train/n01/images/n01_3.JPEG"):
        (tiny / name).rename(tiny / f"{name}.damaged")
    assert labels(tiny) == {name: label for name, label in VAL.items() if name != "val_3.JPEG"}
    assert len(labels(tiny, "train")) == 17


def test_pictures_without_a_label_are_passed_over_and_said(tiny, capsys):
    shutil.copy(tiny / "val" / "images" / "val_1.JPEG", tiny / "val" / "images" / "val_99.JPEG")
    assert labels(tiny) == VAL
    assert "1 without a label (val_99.JPEG)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "top, more",
    [
        ("tiny-imagenet-200/", {}),
        ("archive/tiny-imagenet-200/", {}),
        ("tiny-imagenet-200/tiny-imagenet-200/", {"tiny-imagenet-200/readme.md": "x"}),
        ("tiny-imagenet-200/", {"readme.md": "x", "__MACOSX/tiny-imagenet-200/._wnids.txt": "x", "other/a.txt": "x"}),
        ("", {}),
    ],
    ids=["official", "one level deeper", "twice", "strays beside", "no folder"],
)
def test_archives_of_other_places_are_unpacked_to_the_same_folder(tmp_path, files, top, more):
    zipped(tmp_path / "tiny.zip", files, top, **more)
    (tmp_path / "tiny").mkdir()  # an empty folder counts as none
    TINY_IMAGENET.obtain(tmp_path / "tiny", NEVER_ASKED)
    assert labels(tmp_path / "tiny") == VAL and sorted(os.listdir(tmp_path)) == ["tiny", "tiny.zip"]
    TINY_IMAGENET.obtain(tmp_path / "tiny", NEVER_ASKED)  # it is there


def test_a_folder_that_was_unpacked_one_level_too_deep_is_read(tiny):
    (tiny.parent / "outer").mkdir()
    tiny.rename(tiny.parent / "outer" / "tiny-imagenet-200")
    assert labels(tiny.parent / "outer") == VAL


# --- what is missing --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "remove, split, says",
    [
        ("val/images/val_3.JPEG", "val", "it lacks 1 picture of val_annotations.txt, e.g. val_3.JPEG"),
        ("val/val_annotations.txt", "val", "it has no val/val_annotations.txt"),
        ("wnids.txt", "train", "it has no wnids.txt"),
        ("train/n01", "train", "train has no pictures for 1 of 3 classes, e.g. n01"),
        ("train", "train", "it has no train"),
        ("val", "val", "it has no val"),
    ],
)
def test_missing_parts_are_named_with_advice_that_ends_and_deletes_nothing(tiny, files, remove, split, says):
    os.rename(tiny / remove, tiny.parent / "elsewhere")
    with pytest.raises(UserError, match=f"{says}.* Name another folder with --data_path") as refusal:
        TinyImageNet(tiny, split)
    assert "elete" not in str(refusal.value) and "Move " not in str(refusal.value)
    as_folder = re.search(r"but \d+ pictures: to train on these, add --dataset folder\.", str(refusal.value))
    assert bool(as_folder) == (remove == "wnids.txt")
    zipped(tiny.with_name("tiny-imagenet-200.zip"), files)  # as incomplete perhaps: the folder advised is not made from it
    place = Path(re.search(r"get Tiny ImageNet with --data_path (\S+)\.$", str(refusal.value))[1])
    assert not place.exists() and not TINY_IMAGENET.beside(place) and place.name == "tiny-imagenet-200"


@pytest.mark.parametrize("name", ["my_pictures", "tiny", "tiny-imagenet-20"])
def test_a_mistyped_folder_starts_no_download_and_unpacks_nothing_into_it(tmp_path, files, name):
    zipped(tmp_path / "tiny-imagenet-200.zip", files)
    with pytest.raises(UserError, match=f"{name} is not there. Correct --data_path, or get Tiny ImageNet with ") as refusal:
        TINY_IMAGENET.obtain(tmp_path / name, NEVER_ASKED)
    assert os.listdir(tmp_path) == ["tiny-imagenet-200.zip"]
    place = str(refusal.value).rpartition("--data_path ")[2].removesuffix(".")
    TINY_IMAGENET.obtain(place, NEVER_ASKED)
    assert labels(Path(place)) == VAL


@pytest.mark.parametrize("content", [b"", b"\xff\xfen\x000\x001\x00"])
def test_lists_that_are_empty_or_no_text_are_refused(tiny, content):
    (tiny / "wnids.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"not a whole Tiny ImageNet: .*Name another folder"):
        TinyImageNet(tiny, "train")


def test_what_cannot_be_read_is_told_as_that(tiny, commons):
    with pytest.raises(UserError, match=r"Cannot read .*wnids.txt: a file stands where a folder is needed"):
        TinyImageNet(tiny / "words.txt", "train")
    with pytest.raises(UserError, match=r"Cannot read .*words.txt: a file stands where a folder is needed. Name a folder"):
        TINY_IMAGENET.obtain(tiny / "words.txt", NEVER_ASKED)
    (tiny / "words.txt").unlink()
    (tiny / "words.txt").mkdir()
    with pytest.raises(UserError, match=r"Cannot read .*words.txt: it is a folder, and a file is needed"):
        TinyImageNet(tiny, "train")
    (tiny / "words.txt").rmdir()
    os.rename(tiny, commons.path / "tiny")
    victims = {"wnids.txt": "train", "train/n01/images": "train", "val/images": "val", "val": "val", "": "val"}
    for victim, split in victims.items():
        path = commons.path / "tiny" / victim
        mode = path.stat().st_mode
        path.chmod(0)
        with commons.as_user(), pytest.raises(UserError, match=rf"Cannot read .*{victim}.*: Permission denied"):
            TinyImageNet(commons.path / "tiny", split)
        path.chmod(mode)
