"""Faults of docs/reliability.md: settings, pictures, downloads."""

import http.server
import io
import re
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.runs import ROOT, Process, Runner
from tests.runtime.faults import fault, kept, saved_run

# --- settings -----------------------------------------------------------------------------------------


@fault("A flag that cannot be")
def bad_flag(run):
    return run.start_train(BATCH_SIZE="many").wait()


def with_config(run: Runner, change: Callable[[str], str]) -> Process:
    """A run in a copy of the repository whose config.py has been changed."""
    text = (ROOT / "config.py").read_text(encoding="utf-8")
    assert change(text) != text
    (run.folder / "config.py").write_text(change(text), encoding="utf-8")
    setup = f"import sys; sys.path.insert(0, {str(run.folder)!r}); sys.modules.pop('config')"
    return run.start_train(setup, BATCH_SIZE=None).wait()


@fault("config.py lacks a constant")
def constant_missing(run):
    return with_config(run, lambda text: re.sub(r"(?m)^BATCH_SIZE = .*\n", "", text))


@fault("config.py has a misspelt constant")
def constant_misspelt(run):
    return with_config(run, lambda text: re.sub(r"(?m)^BATCH_SIZE = ", "BATCH_SIZ = ", text))


@fault("config.py is no Python, or raises an error")
def no_python(run):
    process = with_config(run, lambda text: text.replace("EPOCHS = 100", "EPOCHS = many"))
    assert "cannot be read: name 'many' is not defined." in process.err
    process = with_config(run, lambda text: text.replace("EPOCHS = 100", "EPOCHS = = 100"))
    assert "(config.py, line " in process.err
    return process


@fault("A path in config.py has a single backslash")
def backslash(run):
    return with_config(run, lambda text: re.sub('(?m)^DATA_PATH = "[^"]*"', r'DATA_PATH = "D:\\new"', text))


@fault("config.py has a value that cannot be")
def bad_constant(run):
    return with_config(run, lambda text: re.sub(r"(?m)^BATCH_SIZE = \d+", "BATCH_SIZE = 'many'", text))


# --- pictures -----------------------------------------------------------------------------------------


def with_pictures(run: Runner, change: Callable[[Path], object]) -> Process:
    """A run on a copy of the pictures, changed, that leaves no half-made cache."""
    folder = run.folder / "pictures"
    shutil.copytree(run.pictures, folder)
    change(folder)
    process = run.start_train(DATA_PATH=folder, CACHE_PATH="cache").wait()
    assert not run.files(".*part-*")
    return process


@fault("The folder of pictures is not there")
def no_folder(run):
    return with_pictures(run, shutil.rmtree)


@fault("The folder holds no pictures")
def no_pictures(run):
    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "notes.txt").touch()

    process = with_pictures(run, change)
    assert "Found there besides: 1 .txt (notes.txt)." in process.err
    return process


UNREADABLE = """
import os
scandir = os.scandir

def refuse(path):
    if str(path).endswith("red circle"):
        raise PermissionError(13, "Permission denied", str(path))
    return scandir(path)

os.scandir = refuse
"""


@fault("A folder of pictures that cannot be read")
def unreadable_folder(run):
    return run.start_train(UNREADABLE).wait()


@fault("Files that are no pictures, hidden, or of an unread kind")
def strays(run):
    def change(folder: Path) -> None:
        for name in ("IMG_1.HEIC", "red circle/.hidden.png", "red circle/Thumbs.db"):
            (folder / name).touch()

    process = with_pictures(run, change)
    assert ": 1 .heic (IMG_1.HEIC), 1 hidden (red circle/.hidden.png), 1 .db (red circle/Thumbs.db). Pictures" in process.out
    return process


@fault("Pictures that this program made lie below the folder")
def own_pictures(run):
    folder = run.folder / "pictures"
    shutil.copytree(run.pictures, folder)
    run.train(DATA_PATH=folder, OUTPUT_PATH=folder / "outputs", max_steps=20)
    process = run.start_train(DATA_PATH=folder, OUTPUT_PATH=folder / "outputs").wait()
    assert "80 images of 4 classes" in process.out
    return process


def split_pictures(folder: Path) -> None:
    """One of every seven pictures to val."""
    for i, path in enumerate(sorted(folder.rglob("*.png"))):
        target = folder / ("val" if i % 7 == 0 else "train") / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    for path in [path for path in folder.iterdir() if path.name not in ("train", "val")]:
        path.rmdir()


@fault("A folder that is split into train and val")
def split_already(run):
    process = with_pictures(run, split_pictures)
    assert "folder train: 72 images of 4 classes" in process.out and "folder val: 12 images of 4 classes" in process.out
    return process


@fault("CLASSES with a word that means no class")
def no_such_class(run):
    process = run.start_train(CLASSES="red star,red circel", CACHE_PATH="cache").wait()
    assert not run.files("*.npy")
    return process


@fault("CLASSES names others when a run goes on")
def other_choice(run):
    before = saved_run(run, CLASSES="red circle,blue circle")
    process = run.start_train(CLASSES="red circle,green square").wait()
    kept(run, before)
    return process


@fault("Its train and val have other classes")
def split_badly(run):
    def change(folder: Path) -> None:
        split_pictures(folder)
        (folder / "val" / "red circle").rename(folder / "val" / "circle of red")

    process = with_pictures(run, change)
    path = process.err.rpartition("--data_path ")[2].strip()
    assert "68 images of 4 classes" in run.to("advised").train(DATA_PATH=path, EPOCHS=1).out
    return process


@fault("A file that is not a picture")
def not_a_picture(run):
    process = with_pictures(run, lambda folder: (folder / "red circle" / "x.png").write_bytes(b"not a picture"))
    assert "red circle/x.png is not a picture" in process.err
    return process


@fault("A truncated picture")
def truncated_picture(run):
    def change(folder: Path) -> None:
        path = folder / "red circle" / "half.jpg"
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:600])

    process = with_pictures(run, change)
    assert "red circle/half.jpg cannot be decoded" in process.err
    return process


@fault("A bit of a PNG has flipped")
def flipped_bit_of_a_picture(run):
    def change(folder: Path) -> None:
        path = next((folder / "red circle").glob("*.png"))
        data = bytearray(path.read_bytes())
        data[-20] ^= 1
        path.write_bytes(data)

    return with_pictures(run, change)


@fault("A broken colour profile")
def broken_profile(run):
    return with_pictures(run, lambda folder: Image.new("RGB", (9, 9)).save(folder / "red circle" / "x.jpg", icc_profile=b"x"))


@fault("12 bits in a file of 16, and no word about it")
def twelve_bits(run):
    def change(folder: Path) -> None:
        Image.fromarray(np.full((9, 9), 3000, np.uint16)).save(folder / "red circle" / "x.png")

    return with_pictures(run, change)


# A user's own dataset, as it is added to src/dataset.py.
OWN = """
import multiprocessing
import numpy as np
from torch.utils.data import Dataset
from src.dataset import DATASETS

class Own(Dataset):
    def __init__(self, split):
        self.classes = {names}[split]
        self.transform = lambda image: image

    def __len__(self):
        return 200

    def __getitem__(self, index):
        return self.transform(np.full((8, 8, 3), index, np.uint8)), index % len(self.classes)

DATASETS["own"] = lambda path, split, image_size: Own(split)
"""


@fault("A dataset of your own with other classes in val")
def own_with_other_classes(run):
    setup = OWN.format(names={"train": ["cat", "cow", "dog"], "val": ["cat", "dog"]})
    process = run.start_train(setup, DATASET="own", CACHE_PATH="cache", CLASS_CONDITIONAL=True).wait()
    assert "the classes cat, cow, dog to train on and cat, dog to validate" in process.err and not run.files("*.pth")
    assert "Done: step" in run.to("unconditional").train(setup, DATASET="own", CACHE_PATH="cache", max_steps=1).out
    return process


@fault("A dataset of your own that no other process can get")
def own_that_cannot_be_pickled(run):
    setup = OWN.format(names={"train": ["cat"], "val": ["cat"]})
    setup += 'multiprocessing.get_start_method = lambda: "spawn"'  # as on Windows and macOS
    process = run.start_train(setup, DATASET="own", CACHE_PATH="cache", NUM_WORKERS=2).wait()
    assert not [path for path in (run.folder / "cache").rglob("*") if path.is_file()]
    settings = {"DATASET": "own", "CACHE_PATH": "cache", "NUM_WORKERS": 0, "max_steps": 1}
    assert "Done: step" in run.to("one process").train(setup, **settings).out
    return process


@fault("Fewer pictures than a step takes")
def too_few_pictures(run):
    return run.start_train(BATCH_SIZE=64, GRAD_ACCUM_STEPS=2).wait()


@fault("Tiny ImageNet with files missing")
def half_of_tiny_imagenet(run):
    (run.folder / "tiny" / "train").mkdir(parents=True)
    return run.start_train(DATASET="tiny-imagenet", DATA_PATH="tiny").wait()


# --- download -----------------------------------------------------------------------------------------

PATIENCE = "from src.data.download import fetch; fetch.__kwdefaults__.update(timeout=(2, 0.3), pause=0.01)"
DATA = bytes(200_000)


class Misbehaving(http.server.BaseHTTPRequestHandler):
    """The first part of the address says how; /file sends self.server.file."""

    def do_GET(self):
        way, body = self.path.split("/")[1], self.server.file
        if way == "missing":
            return self.send_error(404)
        if way == "later":
            self.send_response(429)
            self.send_header("Retry-After", "3600")
            return self.end_headers()
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if way == "html" else "application/zip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if way in ("cut", "stall") else body)
        if way == "stall":
            self.wfile.flush()
            time.sleep(0.6)

    def log_message(self, *args):
        pass


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving) as server:
        server.file = DATA
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def download(run: Runner, server, way: str, **settings) -> Process:
    """A run that has to download its pictures, and does not get them."""
    defaults = {"DATA_URL": f"http://127.0.0.1:{server.server_address[1]}/{way}/a.zip", "DATA_SIZE": 0, "DATA_MD5": "0" * 32}
    process = run.start_train(PATIENCE, DATASET="tiny-imagenet", DATA_PATH="data/tiny", **defaults | settings).wait()
    left = {path.name: path.stat().st_size for path in (run.folder / "data").glob("*")}
    expected = {"tiny-imagenet-200.zip.part"} if way in ("cut", "stall") else {"tiny-imagenet-200.zip"} & set(left)
    assert set(left) == expected, "something half-made is left"
    return process


@fault("The server does not have the file")
def http_404(run, server):
    return download(run, server, "missing")


@fault("The server stalls")
def http_stall(run, server):
    return download(run, server, "stall")


@fault("The line drops again and again")
def http_cut(run, server):
    return download(run, server, "cut")


@fault("There is no network")
def no_network(run, server):
    return download(run, server, "", DATA_URL="http://127.0.0.1:9/a.zip")


@fault("There is no network, for a dataset of torchvision")
def no_network_for_torchvision(run):
    setup = "from torchvision.datasets import MNIST; MNIST.mirrors = ['http://127.0.0.1:9/']"
    return run.start_train(setup, DATASET="mnist", DATA_PATH="digits").wait()


@fault("The server asks to wait for long")
def http_later(run, server):
    return download(run, server, "later")


@fault("The server sends a web page")
def http_page(run, server):
    return download(run, server, "html")


@fault("The server has a file of another size")
def http_other_size(run, server):
    return download(run, server, "file", DATA_SIZE=5)


@fault("The checksum is wrong")
def http_checksum(run, server):
    return download(run, server, "file")


@fault("The archive is damaged")
def damaged_archive(run, server):
    return download(run, server, "file", DATA_MD5="")


def archive(**files: int) -> bytes:
    """A zip of files by these names, which say that they unpack to so many bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        for name, size in files.items():
            target.writestr(name, b"x")
            target.filelist[-1].file_size = size
    return file.getvalue()


@fault("The archive reaches outside its folder")
def zip_traversal(run, server):
    server.file = archive(**{"top/../../../evil": 1})
    process = download(run, server, "file", DATA_MD5="")
    assert not list(run.folder.rglob("evil")) and not (run.folder.parent / "evil").exists()
    return process


@fault("The archive is a zip bomb")
def zip_bomb(run, server):
    server.file = archive(**{"top/a": 3 << 30, "top/b": 3 << 30})
    return download(run, server, "file", DATA_MD5="")
