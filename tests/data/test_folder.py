"""Any folder of pictures: classes, splits, and what is passed over."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from src.data.folder import SUFFIXES, ImageFolder
from src.dataset import prepare
from src.utils import UserError

no_links = pytest.mark.skipif(os.name == "nt", reason="links need a permission there")


def make(path, *names):
    """A folder with pictures and other files of these names."""
    path.mkdir(exist_ok=True)
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.lower().endswith(SUFFIXES) and not name.rpartition("/")[2].startswith("."):
            Image.new("RGB", (8, 8)).save(path / name, "JPEG" if name.lower().endswith((".jpe", ".jfif")) else None)
        else:
            (path / name).write_text("x")
    return path


def found(path):
    """The names of all pictures, as the two splits together have them."""
    return sorted(
        Path(file).relative_to(path).as_posix() for split in ("train", "val") for file in ImageFolder(path, split).files
    )


def passed_over(path, capsys):
    """What the one note of the two splits says."""
    capsys.readouterr()
    found(path)
    notes = re.findall(r"note: passed over in .*?: (.*)\. Pictures that are read end in", capsys.readouterr().out)
    assert len(notes) <= 1
    return set(re.split(r", (?=\d)", notes[0])) if notes else set()


# --- classes and splits -----------------------------------------------------------------------------
def test_about_one_picture_in_twenty_is_held_out_spread_over_the_classes(tmp_path):
    make(tmp_path, *[f"{kind}/deep/{i}.png" for kind in "abcd" for i in range(50)])
    train, val = ImageFolder(tmp_path, "train"), ImageFolder(tmp_path, "val")
    assert (len(train), len(val)) == (190, 10) and not set(train.files) & set(val.files)
    assert train.classes == val.classes == list("abcd") and set(val.labels) == {0, 1, 2, 3}
    for split in (train, val):
        assert [split.classes[label] for label in split.labels] == [Path(file).parts[-3] for file in split.files]
    assert ImageFolder(tmp_path, "val").files == val.files


def test_which_pictures_are_held_out_follows_from_their_names_below_the_folder(tmp_path):
    make(tmp_path / "one", *[f"{kind}/{i}.png" for kind in "ab" for i in range(30)], *[f"c/x/{i} é.JPG" for i in range(7)])
    (tmp_path / "one").rename(tmp_path / "two")
    held_out = [Path(file).relative_to(tmp_path / "two").as_posix() for file in ImageFolder(tmp_path / "two", "val").files]
    assert held_out == ["a/19.png", "b/25.png", "c/x/6 é.JPG"]  # as the first version of this program chose them


def test_the_class_of_pictures_without_sub_folder_survives_a_renaming(tmp_path):
    make(tmp_path / "mine", "1.PNG", "2.jpg")
    train, val = ImageFolder(tmp_path / "mine", "train"), ImageFolder(tmp_path / "mine", "val")
    assert train.classes == ["all"] and len(train) == len(val) == 1
    make(tmp_path / "mine", "dogs/3.png")
    (tmp_path / "mine").rename(tmp_path / "yours")
    assert ImageFolder(tmp_path / "yours", "train").classes == ["all", "dogs"]


@pytest.mark.parametrize("val_name", ["val", "Validation", "valid"])
def test_a_tree_that_is_split_already_keeps_its_splits(tmp_path, val_name, capsys):
    for side, count in {"train": 20, val_name: 3, "test": 2}.items():
        make(tmp_path, *[f"{side}/{kind}/{i}.png" for kind in ("cat", "dog") for i in range(count)])
    train, val = ImageFolder(tmp_path, "train"), ImageFolder(tmp_path, "val")
    assert train.classes == val.classes == ["cat", "dog"] and (len(train), len(val)) == (40, 6)
    assert all(f"/{val_name}/" in Path(file).as_posix() for file in val.files)
    said = capsys.readouterr().out
    assert "is split already" in said and "4 in test (cat/0.png, ...)" in said


def test_a_tree_with_test_or_nothing_beside_train_holds_pictures_out_of_train(tmp_path):
    make(tmp_path, *[f"train/{kind}/{i}.png" for kind in ("cat", "dog") for i in range(20)])
    val = ImageFolder(tmp_path, "val").files
    assert len(val) == 2 and ImageFolder(tmp_path, "val").classes == ["cat", "dog"]
    make(tmp_path, "test/1.png", "test/2.png")  # without classes, as a competition gives it
    assert ImageFolder(tmp_path, "val").files == val == ImageFolder(tmp_path / "train", "val").files


def test_a_split_tree_whose_sides_do_not_fit_is_refused_with_a_command_that_works(tmp_path):
    make(tmp_path, *[f"train/{kind}/{i}.png" for kind in ("cat", "dog") for i in range(20)], "val/1.png", "val/2.png")
    with pytest.raises(UserError, match=r"its class 'all' has validation pictures and no training pictures") as refusal:
        ImageFolder(tmp_path, "train")
    path = re.search(r"--data_path (\S+)$", str(refusal.value))[1]
    assert ImageFolder(path, "train").classes == ["cat", "dog"]


def test_folders_that_are_called_train_among_others_are_classes(tmp_path):
    make(tmp_path, *[f"{kind}/{i}.png" for kind in ("train", "bus", "test") for i in range(3)])
    assert ImageFolder(tmp_path, "train").classes == ["bus", "test", "train"]
    make(tmp_path / "loose", "train/1.png", "val/1.png", "2.png")
    assert ImageFolder(tmp_path / "loose", "train").classes == ["all", "train", "val"]


# --- what is read and what is passed over -----------------------------------------------------------
def test_every_suffix_of_a_format_is_read_in_any_case(tmp_path):
    names = ["a.jpg", "b.JPEG", "c.jpe", "d.JFIF", "e.png", "f.WebP", "g.bmp", "h.gif", "i.tif", "j.TIFF", "k.ppm", "l.pgm"]
    assert found(make(tmp_path, *names)) == names
    assert len(prepare("folder", tmp_path, "train", 8, tmp_path / "cache", 0)) == 11


@no_links
def test_what_is_passed_over_is_counted_and_named_once(tmp_path, capsys):
    kept = ["A.JPG", "b.Tiff", "a name with späces ☃.png", "sub/c.webp", "sub/deep/er/d.ppm"]
    strays = ["._A.JPG", ".thumbs/e.png", "__MACOSX/f.png", "Thumbs.db", "IMG_1.HEIC", "sub/IMG_2.heic", "x.CR2", "jpg"]
    make(tmp_path, *kept, *strays)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "sub" / "up").symlink_to("..")
    os.mkfifo(tmp_path / "pipe.png")
    assert found(tmp_path) == sorted(kept)
    assert passed_over(tmp_path, capsys) == {
        "3 hidden (._A.JPG, ...)", "2 .heic (IMG_1.HEIC, ...)", "2 dangling (gone.png, ...)", "1 .cr2 (x.CR2)",
        "1 .db (Thumbs.db)", "1 .png (pipe.png)", "1 without a suffix (jpg)", "1 read already by another link (sub/up)",
    }  # fmt: skip


@no_links
def test_links_to_pictures_and_folders_elsewhere_are_followed_once(tmp_path, capsys):
    make(tmp_path / "elsewhere", "1.png", "2.png", "3.png")
    make(tmp_path / "data", "cat/0.png")
    (tmp_path / "data" / "cat" / "9.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "hound").symlink_to(tmp_path / "elsewhere")
    assert found(tmp_path / "data") == ["cat/0.png", "cat/9.png", "dog/1.png", "dog/2.png", "dog/3.png"]
    assert passed_over(tmp_path / "data", capsys) == {"1 read already by another link (hound)"}


def test_pictures_that_this_program_made_are_passed_over(tmp_path, capsys):
    mine = [f"cats/{i}.png" for i in range(3)] + ["samples/own.png", "cats/settings.json", "cats/labels.csv"]
    train = ["outputs/samples/epoch_005.png", "outputs/demo/samples/epoch_100.png", "checkpoints/latest.pth"]
    sample = [f"outputs/pictures/001/{name}" for name in ("images/000000.png", "grid.png", "settings.json")]
    older = ["old/000000.png", "old/grid.png", "old/labels.csv", "walk/interpolation_000.png", "walk/interpolation.png"]
    evaluate = ["reports/best-20261125-101010-nearest-pixels.png", "reports/best-20261125-101010.json"]
    make(tmp_path, *mine, *train, *sample, *older, *evaluate)
    assert found(tmp_path) == [name for name in mine if name.endswith("png")]
    made = [note for note in passed_over(tmp_path, capsys) if "this program" in note]
    assert made == ["6 made by this program (old, ...)"]
    assert len(found(tmp_path / "outputs" / "pictures" / "001")) == 2, "a folder that is asked for by name is read"


# --- faults -----------------------------------------------------------------------------------------
def test_a_folder_without_pictures_says_what_is_there(tmp_path):
    make(tmp_path / "some", "1.txt", "2.txt", "3.csv", "deep/IMG.HEIC")
    make(tmp_path / "one", "1.png")
    for name, says in {
        "some": r"holds 0 pictures, .* besides: 2 .txt \(1.txt, ...\), 1 .csv \(3.csv\), 1 .heic \(deep/IMG.HEIC\)\.",
        "one": r"holds 1 picture, at least 2 are needed. Pictures that are read end in .jpg",
        "some/1.txt": r"Cannot read .*1.txt: a file stands where a folder is needed. Name the folder",
    }.items():
        with pytest.raises(UserError, match=says):
            ImageFolder(tmp_path / name, "train")


@pytest.mark.parametrize("name, mode, says", [
    ("data/b/deep", 0, "b/deep: Permission denied. .* move it elsewhere"),
    ("data/b", 0o400, "b(/deep)?: Permission denied"),  # its names can be read, and nothing else
    ("data", 0, ": Permission denied. Fix its permissions, or name the folder"),
    ("secret", 0, "a/4.png: Permission denied"),  # a link leads into it
])  # fmt: skip
def test_a_folder_that_cannot_be_read_is_an_error_that_names_it(commons, name, mode, says):
    make(commons.path, "data/a/1.png", "data/a/2.png", "data/b/deep/3.png", "secret/4.png")
    (commons.path / "data" / "a" / "4.png").symlink_to(commons.path / "secret" / "4.png")
    (commons.path / name).chmod(mode)
    with commons.as_user(), pytest.raises(UserError, match=f"Cannot read .*{says}"):
        ImageFolder(commons.path / "data", "train")
    (commons.path / name).chmod(0o777)  # so that it can be removed


def test_all_pictures_that_cannot_be_read_are_named(commons):
    make(commons.path / "data", *[f"{i}.png" for i in range(12)])
    for file in ImageFolder(commons.path / "data", "train").files[::2]:
        os.chmod(file, 0)
    with commons.as_user(), pytest.raises(UserError) as refusal:
        prepare("folder", commons.path / "data", "train", 8, commons.path / "cache", 0)
    lines = str(refusal.value).splitlines()
    assert len(lines) == 6 and all(re.match(r"Cannot read .*png: Permission denied. .*permissions", line) for line in lines)


# --- twenty pictures as people have them --------------------------------------------------------------
def odd_pictures(folder):
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    folder.mkdir()
    noise.convert("CMYK").save(folder / "cmyk.jpg")
    noise.convert("CMYK").save(folder / "cmyk.tiff")
    noise.convert("RGBA").save(folder / "alpha.png")
    noise.convert("LA").save(folder / "grey alpha.png")
    noise.convert("P").save(folder / "palette.png", transparency=3)
    noise.convert("1").save(folder / "black and white.bmp")
    noise.convert("L").save(folder / "grey.JPG")
    noise.save(folder / "rotated.jpeg", exif=exif)
    noise.save(folder / "progressive.jpg", progressive=True)
    noise.save(folder / "animated.gif", save_all=True, append_images=[noise.rotate(90)])
    noise.save(folder / "animated.webp", save_all=True, append_images=[noise.rotate(90)])
    noise.save(folder / "a name with späces.webp", lossless=True)
    noise.save(folder / "a.ppm")
    noise.save(folder / "really a png.jpg", format="PNG")
    Image.fromarray(random.integers(0, 65536, (30, 30), dtype=np.uint16)).save(folder / "16 bit.png")
    Image.fromarray(random.random((30, 30), dtype=np.float32)).save(folder / "float.tif")
    Image.new("RGB", (6000, 4000), "green").save(folder / "huge.jpg")
    Image.new("RGB", (1, 1), "blue").save(folder / "one pixel.png")
    Image.new("RGB", (900, 2), "blue").save(folder / "a line.png")
    Image.new("L", (3, 500)).save(folder / "a tower.tif", compression="tiff_lzw")
    return folder


def test_train_py_copes_with_odd_pictures(run):
    folder = odd_pictures(run.folder / "pictures")
    assert "19 images of 1 class at 8x8" in run.train(DATA_PATH=folder, CACHE_PATH="cache", VAL_IMAGES=1, max_steps=1).out
