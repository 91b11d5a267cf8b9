"""Faults of docs/reliability.md: settings and pictures."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.runs import ROOT, Process, Runner
from tests.runtime.faults import fault, kept, saved_run

# --- settings -----------------------------------------------------------------------------------------

UNREADABLE = """
import os
scandir = os.scandir

def refuse(path):
    if str(path).endswith("red circle"):
        raise PermissionError(13, "Permission denied", str(path))
    return scandir(path)

os.scandir = refuse
"""

NO_LOCKS = """
import _multiprocessing, errno

class Full(_multiprocessing.SemLock):
    def __new__(cls, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

_multiprocessing.SemLock = Full
"""


@fault("A flag that cannot be", BATCH_SIZE="many")
@fault("Fewer pictures than a step takes", BATCH_SIZE=64, GRAD_ACCUM_STEPS=2)
@fault("A folder of pictures that cannot be read", setup=UNREADABLE)
@fault("/dev/shm is full or read-only", setup=NO_LOCKS, CACHE_PATH="cache", NUM_WORKERS=2)
def settings_at_fault(run, setup="", **settings):
    return run.start_train(setup, **settings).wait()


@fault("config.py lacks a constant", line="BATCH_SIZE = .*\n", by="")
@fault("config.py has a misspelt constant", line="BATCH_SIZE", by="BATCH_SIZ")
@fault("config.py has a value that cannot be", line=r"BATCH_SIZE = \d+", by="BATCH_SIZE = 'many'")
@fault("A path in config.py has a single backslash", line='DATA_PATH = "[^"]*"', by=r'DATA_PATH = "D:\\new"')
def with_config(run: Runner, line: str, by: str) -> Process:
    """A run in a copy of the repository whose config.py has another line."""
    text, count = re.subn(f"(?m)^{line}", by, (ROOT / "config.py").read_text(encoding="utf-8"))
    assert count == 1
    (run.folder / "config.py").write_text(text, encoding="utf-8")
    setup = f"import sys; sys.path.insert(0, {str(run.folder)!r}); sys.modules.pop('config')"
    return run.start_train(setup, BATCH_SIZE=None).wait()


@fault("config.py is no Python, or raises an error")
def no_python(run):
    process = with_config(run, "EPOCHS = 100", "EPOCHS = many")
    assert "cannot be read: name 'many' is not defined." in process.err
    process = with_config(run, "EPOCHS = 100", "EPOCHS = = 100")
    assert "(config.py, line " in process.err
    return process


# --- pictures -----------------------------------------------------------------------------------------


def put(content: bytes | np.ndarray, name: str = "red circle/x.png") -> Callable[[Path], object]:
    """A change of a folder of pictures: one file more, of these bytes or this image."""

    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content) if isinstance(content, bytes) else Image.fromarray(content).save(folder / name)

    return change


def flip_a_bit(folder: Path) -> None:
    path = next((folder / "red circle").glob("*.png"))
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@fault("The folder of pictures is not there", change=shutil.rmtree)
@fault("A bit of a PNG has flipped", change=flip_a_bit)
@fault("Pictures that are git-LFS pointers", change=put(LFS))
@fault("A class whose only picture is damaged", change=put(b"damaged", "green/x.png"), SKIP_DAMAGED=True)
@fault("12 bits in a file of 16, and no word about it", change=put(np.full((9, 9), 3000, np.uint16)))
def with_pictures(run: Runner, change: Callable[[Path], object], **settings) -> Process:
    """A run on a copy of the pictures, changed, that leaves no half-made cache."""
    folder = run.folder / "pictures"
    shutil.copytree(run.pictures, folder)
    change(folder)
    process = run.start_train(DATA_PATH=folder, CACHE_PATH="cache", **settings).wait()
    assert not run.files(".*part-*")
    return process


@fault("The folder holds no pictures")
def no_pictures(run):
    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "notes.txt").touch()

    process = with_pictures(run, change)
    assert "Found there besides: 1 .txt (notes.txt)." in process.err
    return process


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
    everything = run.folder / "everything"
    shutil.copytree(run.pictures, everything)
    paths = {name: everything / name.lower() for name in ("OUTPUT_PATH", "CHECKPOINT_PATH", "LOG_PATH", "CACHE_PATH")}
    run.train(DATA_PATH=everything, max_steps=20, **paths)
    words = ["--checkpoint", everything / "checkpoint_path/latest.pth", "--output_dir", everything / "drawn"]
    run.sample(*words, "--num_samples", 2, "--steps", 2, "--gif")
    process = run.start_train(DATA_PATH=everything, **paths).wait()
    assert "80 images of 4 classes" in process.out and "decoding" not in process.out
    assert "made by this program (drawn, ...)" in process.out
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
    process = with_pictures(run, put(b"not a picture"))
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


@fault("The same, with `--skip_damaged`")
def skipped(run):
    process = with_pictures(run, put(b"damaged"), SKIP_DAMAGED=True)
    assert "80 images of 4 classes" in process.out
    return process


@fault("A stack of pages, or an animation", save_all=True, append_images=[Image.new("RGB", (9, 9))] * 2)
@fault("A picture longer than 2:1", size=(36, 9))
@fault("A picture smaller than IMAGE_SIZE", size=(5, 7))
@fault("A broken colour profile", name="x.jpg", icc_profile=b"x")
def with_picture(run: Runner, size: tuple[int, int] = (9, 9), name: str = "x.tif", **options) -> Process:
    return with_pictures(run, lambda folder: Image.new("RGB", size).save(folder / "red circle" / name, **options))


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


@fault("Tiny ImageNet with files missing")
def half_of_tiny_imagenet(run):
    (run.folder / "tiny" / "train").mkdir(parents=True)
    return run.start_train(DATASET="tiny-imagenet", DATA_PATH="tiny").wait()


@fault("Own pictures without --dataset folder")
def own_pictures_as_tiny_imagenet(run):
    process = run.start_train(DATASET="tiny-imagenet").wait()
    assert "Done: step" in run.to("advised").train(DATASET="folder", max_steps=1).out
    return process


@fault("A mistyped folder for a dataset that is downloaded")
def mistyped_folder(run):
    process = run.start_train(DATASET="tiny-imagenet", DATA_PATH="my_pictuers", DATA_URL="http://127.0.0.1:9/a.zip").wait()
    assert not list(run.folder.glob("*tiny*")) and not (run.folder / "my_pictuers").exists()
    return process
