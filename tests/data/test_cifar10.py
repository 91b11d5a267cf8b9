"""CIFAR-10 in the format of its binary archive: downloaded over HTTP, read, and refused where something is wrong."""

import hashlib
import os
from functools import partial

import numpy as np
import pytest
from PIL import Image

import config
from src.data.cifar10 import CIFAR10, CIFAR_10, FILES, RECORD
from src.dataset import prepare
from src.runtime.build import open_images
from src.runtime.settings import as_flags, resolve
from src.utils import UserError
from tests.data.conftest import FolderHandler, pack, serving

NEVER_ASKED = "http://127.0.0.1:9/never-asked"
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PER_FILE = 20


@pytest.fixture(scope="module")
def files():
    """{name: bytes} of a small archive in the real format: a label, then 1,024 red, green and blue bytes, row by row."""
    random = np.random.default_rng(0)
    found = {"batches.meta.txt": "\n".join(NAMES).encode() + b"\n\n", "readme.html": b"<html></html>"}
    for name in FILES["train"] + FILES["val"]:
        records = random.integers(0, 256, (PER_FILE, RECORD), dtype=np.uint8)
        records[:, 0] = np.arange(PER_FILE) % 10
        found[name] = records.tobytes()
    return found


def packed(path, files):
    return pack(path, {f"cifar-10-batches-bin/{name}": data for name, data in files.items()})


@pytest.fixture
def cifar(files, tmp_path):
    """The extracted folder, obtained as a user with an archive beside it obtains it."""
    path = tmp_path / "data" / "cifar-10-batches-bin"
    path.parent.mkdir()
    archive = path.with_name("cifar-10-binary.tar.gz")
    packed(archive, files)
    CIFAR_10.obtain(path, NEVER_ASKED)
    archive.unlink()
    return path


@pytest.fixture
def server(files, tmp_path):
    """Serves the archive. settings: of a run that gets it from there."""
    (tmp_path / "served").mkdir()
    archive = packed(tmp_path / "served" / "cifar-10-binary.tar.gz", files).read_bytes()
    with serving(partial(FolderHandler, directory=tmp_path / "served")) as server:
        paths = dict(DATA_PATH=f"{tmp_path}/data/cifar-10-batches-bin", CACHE_PATH=f"{tmp_path}/cache", NUM_WORKERS=0)
        file = dict(DATA_SIZE=len(archive), DATA_MD5=hashlib.md5(archive).hexdigest())
        server.settings = paths | file | dict(DATA_URL=f"{server.url}/cifar-10-binary.tar.gz", DATASET="cifar10")
        yield server


# --- where it comes from ------------------------------------------------------------------------------


def test_the_dataset_alone_brings_its_folder_address_size_and_checksum():
    alone, preset = (resolve(config, words.split()).settings for words in ("--dataset cifar10", "--preset cifar10"))
    for s in (alone, preset):
        assert s.DATA_PATH == "./data/cifar-10-batches-bin"
        assert s.DATA_URL == "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
        assert (s.DATA_SIZE, s.DATA_MD5) == (170_052_171, "c32a1d4ab5d03f1284b67883e8d87530")
    assert (alone.IMAGE_SIZE, preset.IMAGE_SIZE) == (64, 32)
    typed = resolve(config, ["--data_path", "mine", "--dataset", "cifar10", "--data_md5", ""]).settings
    assert (typed.DATA_PATH, typed.DATA_MD5, typed.DATA_SIZE) == ("mine", "", 170_052_171)


def test_it_is_downloaded_checked_unpacked_and_decoded_once(server, files, tmp_path, capsys):
    s = resolve(config, f"--preset cifar10 {as_flags(server.settings)}".split()).settings
    train, val = open_images(s, "train"), open_images(s, "val")
    assert (len(train), len(val)) == (5 * PER_FILE, PER_FILE) and train.classes == val.classes == NAMES
    for images, names in ((train, FILES["train"]), (val, FILES["val"])):
        records = np.frombuffer(b"".join(files[name] for name in names), dtype=np.uint8).reshape(-1, RECORD)
        np.testing.assert_array_equal(images[:], records[:, 1:].reshape(-1, 3, 32, 32))
        assert images.labels.tolist() == records[:, 0].tolist()
    assert sorted(os.listdir(tmp_path / "data")) == ["cifar-10-batches-bin", "cifar-10-binary.tar.gz"]
    assert "has 20 pictures; each of the official set has 10,000" in capsys.readouterr().out
    written = train.path.stat().st_mtime_ns
    assert open_images(s, "train").path.stat().st_mtime_ns == written and len(server.requests) == 1


def test_a_folder_that_was_unpacked_by_hand_is_read(cifar):
    (cifar.parent / "outer").mkdir()
    cifar.rename(cifar.parent / "outer" / "cifar-10-batches-bin")
    assert len(CIFAR10(cifar.parent / "outer", "val")) == PER_FILE


# --- what is read -------------------------------------------------------------------------------------


def test_a_picture_is_upright_and_in_colour(cifar):
    """Byte 1 + 1024 c + 32 y + x of a record is channel c of the pixel at (x, y)."""
    record = np.zeros((PER_FILE, RECORD), dtype=np.uint8)
    record[0, 1 + 1024 * 2 + 32 * 5 + 7] = 200
    (cifar / "test_batch.bin").write_bytes(record.tobytes())
    image, label = CIFAR10(cifar, "val")[0]
    assert Image.fromarray(image).getpixel((7, 5)) == (0, 0, 200) and image.sum() == 200 and label == 0


def test_the_cache_is_made_again_when_a_file_changes(cifar, files, tmp_path):
    before = prepare("cifar10", cifar, "val", 32, tmp_path / "cache", 0).fingerprint
    (cifar / "test_batch.bin").write_bytes(files["data_batch_1.bin"])
    assert prepare("cifar10", cifar, "val", 32, tmp_path / "cache", 0).fingerprint != before


# --- what is wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    "name, change, says",
    [
        ("data_batch_3.bin", lambda data: data[:-1], "data_batch_3.bin has 61,459 bytes, expected 61,460"),
        ("data_batch_3.bin", lambda data: data[:-RECORD], "data_batch_3.bin has 58,387 bytes, expected 61,460"),
        ("data_batch_3.bin", lambda data: b"", "data_batch_3.bin has 0 bytes, expected 61,460"),
        ("test_batch.bin", lambda data: data[:100], "test_batch.bin has 100 bytes, expected 61,460"),
        ("data_batch_5.bin", None, "it has no data_batch_5.bin"),
        ("test_batch.bin", None, "it has no test_batch.bin"),
        ("batches.meta.txt", None, "it has no batches.meta.txt"),
        ("batches.meta.txt", lambda data: b"\xff\xfe", "batches.meta.txt is not text in UTF-8"),
        ("batches.meta.txt", lambda data: b"cat\n", "has label 9, and batches.meta.txt has 1 class"),
    ],
)
def test_missing_and_truncated_files_are_named(cifar, split, name, change, says):
    data = (cifar / name).read_bytes()
    (cifar / name).unlink()
    if change:
        (cifar / name).write_bytes(change(data))
    with pytest.raises(UserError, match=rf"is not a whole CIFAR-10: .*{says}\. Name another folder with --data_path"):
        CIFAR10(cifar, split)


def test_a_label_that_there_is_not_is_named_with_its_place(cifar):
    data = bytearray((cifar / "data_batch_2.bin").read_bytes())
    data[3 * RECORD] = 10
    (cifar / "data_batch_2.bin").write_bytes(data)
    with pytest.raises(UserError, match=r"picture 3 of data_batch_2\.bin has label 10, and batches\.meta\.txt has 10 classes"):
        CIFAR10(cifar, "train")


# --- the experiment -----------------------------------------------------------------------------------


def test_the_preset_is_the_papers_network_and_nothing_but_scale_more():
    from src.model import ResBlock, parameter_count
    from src.runtime.build import build_model

    s = resolve(config, ["--preset", "cifar10"]).settings
    model = build_model(s, 10)
    blocks = [block for block in model.modules() if isinstance(block, ResBlock)]
    more = sum((block.scale_shift.in_features + 1) * block.conv_2.out_channels for block in blocks)
    assert parameter_count(model) == 38_307_203 and parameter_count(model) - more == 35_746_307
    assert s.EPOCHS * (50_000 // s.BATCH_SIZE) - 800_000 in range(50_000 // s.BATCH_SIZE)
