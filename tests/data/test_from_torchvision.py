"""torchvision's datasets: by the preset, by their names, and by the comment of src/dataset.py as it stands."""

import gzip
import hashlib
import re
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from src.dataset import DATASETS
from src.utils import UserError
from tests.data.conftest import FolderHandler, serving
from tests.runs import ROOT, ended

RANDOM = np.random.default_rng(0)
PIXELS = {"train": RANDOM.integers(0, 256, (60, 28, 28), np.uint8), "t10k": RANDOM.integers(0, 256, (9, 28, 28), np.uint8)}
LABELS = {part: np.arange(len(pixels), dtype=np.uint8) % 10 for part, pixels in PIXELS.items()}
SMALL = "--max_steps 2 --batch_size 8 --num_samples 4 --preview_steps 2 --num_workers 0 --device cpu --precision fp32"


def raw_files() -> dict[str, bytes]:
    """As MNIST is published: a magic number, the sizes, the bytes."""
    files = {}
    for part, pixels in PIXELS.items():
        files[f"{part}-images-idx3-ubyte"] = struct.pack(">4I", 2051, *pixels.shape) + pixels.tobytes()
        files[f"{part}-labels-idx1-ubyte"] = struct.pack(">2I", 2049, len(pixels)) + LABELS[part].tobytes()
    return files


def write_raw(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, content in raw_files().items():
        (folder / name).write_bytes(content)


def test_the_preset_downloads_mnist_to_a_folder_of_its_own_once(run, tmp_path):
    files = {f"{name}.gz": gzip.compress(content, 1) for name, content in raw_files().items()}
    (tmp_path / "served").mkdir()
    for name, content in files.items():
        (tmp_path / "served" / name).write_bytes(content)
    with serving(partial(FolderHandler, directory=tmp_path / "served")) as server:
        resources = [(name, hashlib.md5(content).hexdigest()) for name, content in files.items()]
        setup = f"from torchvision.datasets import MNIST; MNIST.mirrors, MNIST.resources = ['{server.url}/'], {resources}"
        ended(run.start("train.py", "--preset", "mnist", *SMALL.split(), setup=setup), 0)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["cache", "mnist"]
    for split, part in (("train", "train"), ("val", "t10k")):
        cache = next((tmp_path / "data" / "cache").glob(f"mnist-{split}-28-grey-*"))
        assert np.array_equal(np.load(cache)[:, 0], PIXELS[part])
    again = ended(run.start("train.py", "--preset", "mnist", *SMALL.split(), setup=setup), 0).out  # the server is gone
    assert "going on after step 2" in again and "decoding" not in again


def test_the_comment_on_datasets_of_one_s_own_is_right(run, tmp_path):
    """Its line, typed as it stands, reads data/NAME."""
    line = re.search(r'\n# +("[\w-]+": from_torchvision\("\w+"\),)\n', (ROOT / "src" / "dataset.py").read_text())[1]
    name, kind = re.findall(r'"([\w-]+)"', line)
    write_raw(tmp_path / "data" / name / kind / "raw")
    setup = f"import src.dataset as d; d.DATASETS.update(eval('{{' + {line!r} + '}}', vars(d)))"
    out = run.train(setup, DATASET=name, DATA_PATH=None, CACHE_PATH="cache", max_steps=1).out
    assert f"{name} train: 60 images of 10 classes" in out and f"{name} val: 9 images" in out
    assert [path.name for path in (tmp_path / "data").iterdir()] == [name]


@pytest.mark.parametrize(("name", "kind"), [("cifar100", "CIFAR100"), ("mnist", "MNIST")])
def test_the_names_are_torchvision_s_with_their_test_set_as_val(monkeypatch, name, kind):
    monkeypatch.setattr(datasets, kind, lambda root, train, download: (root, train, download))
    assert [DATASETS[name](Path("p"), split, 32) for split in ("train", "val")] == [("p", True, True), ("p", False, True)]


@pytest.mark.parametrize("name", list(raw_files()))
def test_a_truncated_file_is_one_sentence(tmp_path, name):
    raw = tmp_path / "MNIST" / "raw"
    write_raw(raw)
    (raw / name).write_bytes((raw / name).read_bytes()[:-5])
    with pytest.raises(UserError, match=f"cannot download MNIST to {tmp_path}, or read it there: .* move them else"):
        for split in ("train", "val"):
            DATASETS["mnist"](tmp_path, split, 28)
