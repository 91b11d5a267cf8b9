"""Pictures per second prepared once and read in training, ours and PIL with a DataLoader, in turns, as a Markdown table.

    python -m benchmarks.data --data_path data/tiny-imagenet-200
    python -m benchmarks.data

Without --data_path it writes 2,000 JPEGs of shapes to a temporary folder. Reading is what a training batch needs: an index,
a random flip, float32 in [-1, 1]. One core each, unless the row says otherwise: torch runs with one thread.
"""

import contextlib
import io
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from src.images import DeviceImages, Images
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

from benchmarks.common import Row, alternate, main, quartiles, ratios, report, spread
from src import noise
from src.data.cache import cpu_cores
from src.data.shapes import Shapes
from src.dataset import prepare
from src.runtime.device import pick_device
from src.runtime.flags import FOLDER, whole
from src.runtime.settings import RULES

JPEGS, TINY_JPEGS = 2000, 100

COLUMNS = {
    "what": "name",
    "processes": "processes",
    "img/s": "{images_per_second:,.0f} ({images_per_second_quartiles[0]:,.0f} to {images_per_second_quartiles[1]:,.0f})",
    "of the DataLoader": "{times_dataloader:.2f}",
}


def write_jpegs(folder: Path, count: int, size: int) -> None:
    shapes = Shapes("train", size)
    for index in range(count):
        pixels, label = shapes[index]
        path = folder / shapes.classes[label] / f"{index:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)


def fresh_cache(folder: Path, path: Path, size: int, workers: int) -> DeviceImages:
    """Decode all training pictures to a cache that is not there yet."""
    kind = "tiny-imagenet" if (path / "wnids.txt").exists() else "folder"
    with tempfile.TemporaryDirectory(dir=folder) as cache, contextlib.redirect_stdout(io.StringIO()):
        return prepare(kind, path, "train", size, cache, workers).to("cpu")  # the file stays readable while it is mapped


def reading(images: DeviceImages, batch: int, batches: int) -> Callable[[], None]:
    """So many batches in a random order, as TrainBatches draws them."""
    order = torch.randperm(len(images))
    count = itertools.count()

    def read() -> None:
        for _ in range(batches):
            k = next(count)
            places = torch.arange(k * batch, (k + 1) * batch)
            flip = noise.bernoulli(noise.key(0, noise.TRAIN_FLIP, places), 0.5)
            images.batch(order[places % len(images)], flip)

    return read


def usual(path: Path, size: int, batch: int, batches: int, workers: int) -> Callable[[], None]:
    """So many batches of torchvision's ImageFolder by a DataLoader."""
    folder = datasets.ImageFolder(str(path / "train" if (path / "wnids.txt").exists() else path))
    with Image.open(folder.samples[0][0]) as first:
        fit = [] if first.size == (size, size) else [transforms.Resize(size), transforms.CenterCrop(size)]
    to_tensor = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    folder.transform = transforms.Compose(fit + to_tensor)
    chosen = Subset(folder, torch.randperm(len(folder))[: batch * batches].tolist())
    loader = DataLoader(chosen, batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0)

    def read() -> None:
        for _ in loader:
            pass

    read()  # starts the workers, which then stay, and warms the disk's cache
    return read


def measure(flags: SimpleNamespace) -> None:
    device = pick_device(flags.device)
    torch.set_num_threads(1)
    rounds = flags.rounds or (2 if flags.tiny else 5)
    cores = cpu_cores()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(flags.data_path or f"{folder}/jpegs")
        if not flags.data_path:
            write_jpegs(path, TINY_JPEGS if flags.tiny else JPEGS, flags.image_size)
        images = fresh_cache(Path(folder), path, flags.image_size, 0)
        usual_batches = max(1, min(len(images), JPEGS) // flags.batch_size)  # of the slow way
        batches = 10 if flags.tiny else 1000
        shape = (path, flags.image_size, flags.batch_size, usual_batches)
        seen = usual_batches * flags.batch_size
        # what: (processes, pictures a call, call)
        ways: dict[str, tuple[int, int, Callable[[], object]]] = {
            "PIL + DataLoader, no workers": (1, seen, usual(*shape, 0)),
            "PIL + DataLoader, one worker per core": (cores, seen, usual(*shape, cores)),
            "ours, from the cache": (1, batches * flags.batch_size, reading(images, flags.batch_size, batches)),
        }
        if device.type == "cuda":
            on_gpu = Images(images.source, images.labels, [], [], path).to(device)
            ways["ours, from the GPU"] = (1, batches * flags.batch_size, reading(on_gpu, flags.batch_size, batches))
        for name, workers in {"ours, preparing, one process": 0, "ours, preparing, one per core": -1}.items():
            processes = 1 if workers == 0 else cores
            ways[name] = (processes, len(images), partial(fresh_cache, Path(folder), path, flags.image_size, workers))
        times = alternate({name: call for name, (_, _, call) in ways.items()}, rounds, 1, device)
        report(flags, device, COLUMNS, list(rows(ways, times)), batch=flags.batch_size, image_size=flags.image_size)


def rows(ways: dict[str, tuple[int, int, Callable[[], object]]], times: dict[str, list[float]]) -> Iterator[Row]:
    speeds = {name: [count / seconds for seconds in times[name]] for name, (_, count, _) in ways.items()}
    first = next(iter(speeds.values()))
    for name, (processes, _, _) in ways.items():
        yield {
            "name": name,
            "processes": processes,
            **spread("images_per_second", speeds[name]),
            "times_dataloader": quartiles(ratios(speeds[name], first))[1],
            "rounds": len(first),
        }


FLAGS = [
    ("--data_path", FOLDER, "Tiny ImageNet or any folder of pictures in classes (default: writes shapes)", None),
    ("--image_size", RULES["IMAGE_SIZE"], "pixels per side (default: 64)", 64),
    ("--batch_size", RULES["BATCH_SIZE"], "pictures a batch (default: 16)", 16),
    ("--rounds", whole(1), "turns of each (default: 5)", None),
]

if __name__ == "__main__":
    sys.exit(main("data", __doc__, FLAGS, measure))
