"""Sets of pictures: what is read, what makes two of them the same, and what is refused."""

import os

import numpy as np
import pytest
from PIL import Image

from src.evaluation.picture_set import PictureSet, read_set
from src.utils import UserError
from tests.evaluation.conftest import random_pictures, write_folder

PIXELS = random_pictures(4, seed=1)


def test_a_folder_and_an_npz_give_back_the_pixels_and_one_fingerprint(tmp_path):
    np.savez(tmp_path / "set.npz", arr_0=PIXELS.transpose(0, 2, 3, 1))
    sets = [read_set(write_folder(tmp_path / "set", PIXELS), ""), read_set(tmp_path / "set.npz", ""), PictureSet("", PIXELS)]
    assert all(np.array_equal(each.pixels, PIXELS) and each.size == "16x16" for each in sets)
    assert len({each.fingerprint for each in sets}) == 1
    assert PictureSet("", PIXELS[::-1]).fingerprint != sets[0].fingerprint
    assert PictureSet("", PIXELS.transpose(0, 1, 3, 2).reshape(4, 3, 8, 32)).fingerprint != sets[0].fingerprint


def test_of_what_sample_writes_only_the_pictures_count(tmp_path, capsys):
    for beside in ("grid.png", "labels.csv", "settings.json"):
        out = tmp_path / beside
        write_folder(out / "images", PIXELS)
        (out / beside).write_bytes(b"not to be read")
        (out / "interpolation.png").write_bytes(b"neither")
        assert np.array_equal(read_set(out, "").pixels, PIXELS)
    flat = write_folder(tmp_path / "flat", PIXELS)  # as it wrote them before
    (flat / "grid.png").write_bytes(b"not to be read")
    assert np.array_equal(read_set(flat, "").pixels, PIXELS)
    assert "grid.png in" in capsys.readouterr().out


def test_a_name_that_is_no_utf_8_is_a_name(tmp_path):
    folder = write_folder(tmp_path / os.fsdecode(b"p\xff"), PIXELS)
    os.rename(folder / "0003.png", folder / os.fsdecode(b"\xfe.png"))
    assert len(read_set(folder, "")) == 4


@pytest.mark.parametrize(
    "name, expected",
    [
        ("nowhere", "is not there; expected train, val, a folder of pictures or an .npz file."),
        ("file.txt", "is a file, but no .npz; expected"),
        ("empty", "holds no pictures, only 1 .txt (notes.txt). Pictures that are read end in .jpg"),
        ("mixed", "/0004.png is 32x32, the first picture 16x16"),
        ("broken.npz", "cannot be read as an .npz (File is not a zip file)"),
        ("empty.npz", "cannot be read as an .npz (is empty)"),
        ("array.npz", "cannot be read as an .npz ("),
        ("pickle.npz", "cannot be read as an .npz (Object arrays cannot be loaded when allow_pickle=False)"),
        ("other.npz", "holds pictures; expected arr_0"),
        ("float.npz", "holds arr_0, float64 [2, 16, 16, 3]; expected arr_0, uint8"),
        ("none.npz", "holds arr_0, uint8 [0, 16, 16, 3]; expected"),
    ],
)
def test_what_cannot_be_a_set_is_refused_by_its_name(tmp_path, name, expected):
    (tmp_path / "file.txt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    Image.new("RGB", (32, 32)).save(write_folder(tmp_path / "mixed", PIXELS) / "0004.png")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 not a zip")
    (tmp_path / "empty.npz").touch()
    with open(tmp_path / "array.npz", "wb") as file:
        np.save(file, PIXELS)
    np.savez(tmp_path / "pickle.npz", arr_0=np.array([{}], dtype=object))
    np.savez(tmp_path / "other.npz", pictures=np.zeros(3))
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 16, 16, 3)))
    np.savez(tmp_path / "none.npz", arr_0=np.zeros((0, 16, 16, 3), np.uint8))
    with pytest.raises(UserError) as error:
        read_set(tmp_path / name, "--samples")
    assert str(error.value).startswith(f"--samples: {tmp_path / name}") and expected in str(error.value)


def test_a_dangling_link_is_no_picture_and_a_fault_of_reading_is_told_as_one(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "set", PIXELS)
    (folder / "0004.png").symlink_to(tmp_path / "gone")
    assert len(read_set(folder, "--samples")) == 4

    def fail(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("src.evaluation.picture_set.find_pictures", fail)
    with pytest.raises(UserError, match=r"Cannot read .*set: Permission denied\. .*--samples"):
        read_set(folder, "--samples")
