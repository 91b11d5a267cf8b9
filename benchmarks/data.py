"""Images per second read in training and decoded once, ours and PIL with a DataLoader, in turns, as a Markdown table.

    python -m benchmarks.data --data_path data/tiny-imagenet-200

Without --data_path it writes JPEGs of shapes. Reading is what a batch needs: an index, a random flip, float32 in [-1, 1].
"""

import contextlib
import io
import sys
import tempfile
from collections import deque
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision import datasets
from torchvision import transforms as tf

from benchmarks import common
from benchmarks.common import Args, Call, Table
from src.data.cache import cpu_cores
from src.data.shapes import Shapes
from src.dataset import DeviceImages, Images, prepare
from src.runtime.device import pick_device

SIZE, BATCH = 64, 16


def decode(path: Path, workers: int) -> Images:
    """Decode all training images to a cache file that is not there yet."""
    kind = "tiny-imagenet" if (path / "wnids.txt").exists() else "folder"
    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(io.StringIO()):
        return prepare(kind, path, "train", SIZE, cache, workers)  # the file stays readable while it is mapped


def read(images: DeviceImages, batches: int) -> None:
    """As TrainBatches reads them."""
    for rows in torch.randint(len(images), (batches, BATCH)):
        images.batch(rows, torch.rand(BATCH) < 0.5)


def usual_loader(path: Path, workers: int) -> DataLoader:
    """At most 2,000 images of torchvision's ImageFolder in a DataLoader."""
    fitted = [tf.Resize(SIZE), tf.CenterCrop(SIZE), tf.RandomHorizontalFlip(), tf.ToTensor(), tf.Normalize(0.5, 0.5)]
    folder = datasets.ImageFolder(str(path / "train" if (path / "wnids.txt").exists() else path), tf.Compose(fitted))
    few = Subset(folder, torch.randperm(len(folder))[:2000].tolist())
    return DataLoader(few, BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0)


def measure(args: Args) -> None:
    device, cores, shapes = pick_device(args.device), cpu_cores(), Shapes("train", SIZE)
    torch.set_num_threads(1)  # one core, unless there are workers
    with tempfile.TemporaryDirectory() as folder:
        path = Path(args.data_path or folder)
        if not args.data_path:
            (path / "shapes").mkdir()
            for index in range(100 if args.tiny else 2000):
                Image.fromarray(shapes[index][0]).save(path / "shapes" / f"{index:05}.jpg", quality=90)
        images, batches = decode(path, 0), 10 if args.tiny else 1000
        ways: dict[str, tuple[int, int, Call]] = {}  # name: (processes, images a call, call)
        for workers in (0, cores):
            loader = usual_loader(path, workers)
            drain: Call = partial(deque, loader, maxlen=0)
            drain()  # starts the workers, which then stay, and warms the disk's cache
            ways[f"PIL + DataLoader, {workers} workers"] = (max(1, workers), len(loader) * BATCH, drain)
        ways["ours, from the cache"] = (1, batches * BATCH, partial(read, DeviceImages(images, "cpu"), batches))
        if device.type == "cuda":
            ways["ours, from the GPU"] = (1, batches * BATCH, partial(read, DeviceImages(images, device), batches))
        for workers in (0, cores):
            ways[f"ours, decoding, {workers} workers"] = (max(1, workers), len(images), partial(decode, path, workers))
        times = common.in_turns({name: call for name, (_, _, call) in ways.items()}, args.rounds, 1, device)
    table = Table("data", args, device, batch=BATCH, image_size=SIZE, rounds=args.rounds)
    speeds = {name: [count / seconds for seconds in times[name]] for name, (_, count, _) in ways.items()}
    for name, speed in speeds.items():
        figures = common.spread("images_per_second", speed) | common.spread("over_first", speed, next(iter(speeds.values())))
        table.add(name=name, processes=ways[name][0], **figures)
    table.print()


FLAGS: common.Flags = {
    "data_path": dict(type=Path, help="Tiny ImageNet or any folder of images in classes (default: shapes)"),
    "rounds": dict(type=int, default=5, help="turns of each (default: 5)"),
}

if __name__ == "__main__":
    sys.exit(common.main("data", __doc__, measure, FLAGS))
