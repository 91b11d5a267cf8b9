"""The images: which datasets there are, and the batches of training and validation.

Every dataset takes the same path. It is decoded once to a uint8 cache file (src/data/cache.py), which is mapped into memory
or lives on the GPU; a batch is then an index, a flip and a scale. Each batch depends on (seed, step) and on the position of an
image in its step alone: there is no state that a resumed run would have to restore, and processes that share a batch draw
what one process would have drawn.
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from src import noise
from src.data.cache import Images, open_or_decode
from src.data.cifar10 import CIFAR10, CIFAR_10
from src.data.classes import find_labels, parse_classes, same_classes  # noqa: F401 (this is the one door to src/data)
from src.data.folder import ImageFolder
from src.data.shapes import Shapes
from src.data.tiny_imagenet import TINY_IMAGENET, TinyImageNet
from src.data.workers import Task
from src.utils import UserError, count


def from_torchvision(name: str) -> Callable[[str | os.PathLike, str, int], Any]:
    """For torchvision.datasets.NAME, one of those that take (root, train, download); "val" is its test set.
    The entry raises UserError: no network, or files that are damaged."""

    def open_dataset(path: str | os.PathLike, split: str, image_size: int) -> Any:
        from torchvision import datasets  # here, because this import takes longer than many a drawing

        try:
            return getattr(datasets, name)(os.fspath(path), train=split == "train", download=True)
        except (OSError, RuntimeError, ValueError, AssertionError) as error:  # as torchvision has them
            why = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            advice = "Type the same command again with a network; if files there are damaged, move them elsewhere first."
            raise UserError(f"torchvision cannot download {name} to {path}, or read it there: {why}. {advice}") from error

    return open_dataset


# name -> function of (path, split "train" or "val", image_size) that gives a Dataset of (image, label).
# An image is a PIL image, a uint8 array [H, W, 3], or a tensor [3, H, W], uint8 or float in [0, 1]; its size is free.
# A dataset of your own is one line here, without random augmentation, because it is decoded once. Another of torchvision's:
#     "fashion-mnist": from_torchvision("FashionMNIST"),
# Its data lie in data/NAME, unless --data_path or a row of SOURCES in config.py says otherwise.
# The Dataset may have `classes` (names by label), `class_ids`, and `fingerprint` (text that changes when the
# images do; otherwise a few images are compared at each start).
DATASETS: dict[str, Callable[[Any, str, int], Any]] = {
    "tiny-imagenet": lambda path, split, image_size: TinyImageNet(path, split),
    "cifar10": lambda path, split, image_size: CIFAR10(path, split),
    "cifar100": from_torchvision("CIFAR100"),
    "mnist": from_torchvision("MNIST"),
    "folder": lambda path, split, image_size: ImageFolder(path, split),
    "shapes": lambda path, split, image_size: Shapes(split, image_size),
}

# name -> function of (path, url, size, md5) that downloads and unpacks the data of a dataset, if they are not there yet.
OBTAIN: dict[str, Callable[[Any, str, int, str], None]] = {"tiny-imagenet": TINY_IMAGENET.obtain, "cifar10": CIFAR_10.obtain}


def obtain(name: str, path: str | os.PathLike, url: str, size: int = 0, md5: str = "") -> None:
    """Make the data of dataset `name` exist at `path`, if it is one that can be downloaded. Raises UserError."""
    if name in OBTAIN:
        OBTAIN[name](path, url, size, md5)


def prepare(
    name: str,
    path: str | os.PathLike,
    split: str,
    image_size: int,
    cache_path: str | os.PathLike = "./data/cache",
    num_workers: int = -1,
    classes: str = "",
    channels: int = 3,
    skip_damaged: bool = False,
) -> Images:
    """The split "train" or "val" of dataset `name` at `path`: from its cache file, or decoded first if that is no longer true.

    num_workers: processes that decode; -1 is one per core, 0 is this process.   channels: 3 for colour, 1 for grey.
    classes: the images of these alone, as parse_classes reads them; "" is all. The cache holds all of them in any case.
    skip_damaged: leave out pictures that cannot be decoded. Without it all of both splits are named when "train" is decoded.
    Several processes: let one of them call this first, then the others.
    Raises UserError: no such dataset, data that cannot be read or written; before that, FlagError: a word that means no class.
    """
    if name not in DATASETS:
        known = ", ".join(DATASETS)
        raise UserError(f"There is no dataset {name!r}: choose one of {known}, or add your own to DATASETS in src/dataset.py.")
    dataset = DATASETS[name](path, split, image_size)
    if len(dataset) == 0:
        raise UserError(f"{name} {split} at {path} has no images.")
    labels = find_labels(dataset, name, classes) if classes else None
    source = "" if name == "shapes" else os.path.abspath(path)  # shapes come from no folder
    other = (lambda: DATASETS[name](path, "val", image_size)) if split == "train" else list
    task = Task(dataset, channels, image_size, range(len(dataset)))
    images = open_or_decode(task, name, split, source, Path(cache_path), num_workers, skip_damaged, other)
    chosen = images if labels is None else images.of_classes(labels)
    if not len(chosen):
        advice = "Choose more of them with --classes, or sort the images into folders train and val."
        raise UserError(f"{name} {split} at {path} has no images of the classes {classes}. {advice}")
    return chosen


def normalise(u8: Tensor, flip: Tensor | None = None) -> Tensor:
    """uint8 [B, C, S, S] -> float32 in [-1, 1], mirrored left to right where flip (bool [B]) is true."""
    if flip is not None:
        every_bit = (flip.to(torch.uint8) * 255)[:, None, None, None]
        u8 = u8 ^ ((u8 ^ u8.flip(-1)) & every_bit)  # what where() means, at five times its speed on a CPU
    return u8.to(torch.float32) / 127.5 - 1


class DeviceImages:
    """Decoded images on a device.

    On a GPU with room, `pixels` uint8 [N, C, S, S] holds them all; otherwise pixels is None and batches are gathered from the
    memory-mapped file. `labels` int64 [N] are on the device in both cases.
    """

    def __init__(self, images: Images, device: torch.device | str):
        self.device = torch.device(device)
        self.images, self.classes = images, images.classes
        self.labels = images.labels.to(self.device)
        self.pixels: Tensor | None = None
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if math.prod(images.shape) < free / 4:  # the rest is for weights, moments and activations
                self.pixels = torch.empty(images.shape, dtype=torch.uint8, device=self.device)
                for start in range(0, len(self), 4096):  # in parts: the array need not fit into memory
                    self.pixels[start : start + 4096] = torch.from_numpy(images[start : start + 4096])

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Tensor, flip: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """rows: int64 [B] in [0, N), flip: bool [B] or None, both on the CPU.

        Returns x_0 float32 [B, C, S, S] in [-1, 1] and y int64 [B], on the device.
        """
        device_rows = rows.to(self.device, non_blocking=True)
        if self.pixels is not None:
            u8 = self.pixels.index_select(0, device_rows)
        else:  # as uint8, a quarter of the bytes of float32, and pinned, so that the copy runs while the CPU goes on
            u8 = torch.from_numpy(self.images[rows.numpy()])
            u8 = (u8.pin_memory() if self.device.type == "cuda" else u8).to(self.device, non_blocking=True)
        if flip is not None:
            flip = flip.to(self.device, non_blocking=True)
        return normalise(u8, flip), self.labels.index_select(0, device_rows)


class Batch(NamedTuple):
    x_0: Tensor  # [B, C, S, S] float32, pixels in [-1, 1]
    t: Tensor  # [B] int64 in [0, T)
    eps: Tensor  # [B, C, S, S] float32, standard normal
    y: Tensor | None  # [B] int64 labels, -1 where hidden; None for a network without labels


class TrainBatches:
    """batches(step, micro) -> Batch: lines 2 to 4 of Algorithm 1, for pass number `micro` of optimizer step number `step`.

    Each epoch is a new order of all images, cut into steps of batch_size * grad_accum_steps; the rest is not used in that
    epoch. With several processes each gets its part of the batch: batch_size / world_size images that lie side by side.

    label_dropout: the probability that a label is hidden, or None for a network without labels.
    Raises UserError if there are fewer images than a step takes.
    """

    def __init__(
        self,
        images: DeviceImages,
        *,
        batch_size: int,
        grad_accum_steps: int = 1,
        time_steps: int = 1000,
        horizontal_flip: bool = True,
        label_dropout: float | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.images, self.device, self.seed = images, images.device, seed
        self.time_steps, self.horizontal_flip, self.label_dropout = time_steps, horizontal_flip, label_dropout
        self.batch_size, self.local_batch_size = batch_size, batch_size // world_size  # of all processes, of this one
        self.first = rank * self.local_batch_size
        self.images_per_step = batch_size * grad_accum_steps
        self.steps_per_epoch = len(images) // self.images_per_step
        if not self.steps_per_epoch:
            found, step = count(len(images), "training image"), f"BATCH_SIZE {batch_size} x GRAD_ACCUM_STEPS {grad_accum_steps}"
            raise UserError(f"{found} found, fewer than one step takes, {step}. Use a smaller --batch_size.")
        self.epoch, self.order = -1, torch.empty(0)

    def rows(self, step: int, positions: Tensor) -> Tensor:
        """Which images stand at these positions of the step. positions: [B] int64 in [0, images_per_step). Returns [B]."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            shuffle = torch.Generator().manual_seed(noise.seed(self.seed, noise.DATA_ORDER, epoch))
            self.epoch, self.order = epoch, torch.randperm(len(self.images), generator=shuffle)
        return self.order[step_of_epoch * self.images_per_step + positions]

    def __call__(self, step: int, micro: int) -> Batch:
        first = micro * self.batch_size + self.first
        positions = torch.arange(first, first + self.local_batch_size)

        def keys(purpose: int) -> Tensor:
            return noise.key(self.seed, purpose, step, positions)

        flip = noise.bernoulli(keys(noise.TRAIN_FLIP), 0.5) if self.horizontal_flip else None
        x_0, y = self.images.batch(self.rows(step, positions), flip)
        t = noise.randint(keys(noise.TRAIN_TIME), self.time_steps).to(self.device, non_blocking=True)
        eps = noise.normal(keys(noise.TRAIN_NOISE).to(self.device, non_blocking=True), x_0.shape[1:])
        if self.label_dropout is None:
            return Batch(x_0, t, eps, None)
        hidden = noise.bernoulli(keys(noise.TRAIN_LABEL), self.label_dropout).to(self.device, non_blocking=True)
        return Batch(x_0, t, eps, torch.where(hidden, -1, y))


def validation_draws(images: int, count: int, draws: int, time_steps: int) -> tuple[Tensor, Tensor]:
    """What the validation loss is measured on: which `count` of so many images (all if there are fewer), and each at which t.
    They are taken several times until there are `draws`, or a few more. The t of an image are spread evenly over [0, T), and so
    are those of all draws together. Returns rows and t, each [draws] int64."""
    fixed = torch.Generator().manual_seed(noise.VALIDATION)
    rows = torch.randperm(images, generator=fixed)[: min(count, draws)]  # at random: the images come class by class
    n, rounds = len(rows), -(-draws // len(rows))
    place = torch.randperm(n, generator=fixed).repeat(rounds)  # of each image among the n that share a stretch
    image, turn = torch.arange(n).repeat(rounds), torch.arange(rounds).repeat_interleave(n)
    stretch = (image + turn) % rounds  # of [0, T) in so many parts: each image gets one t in each
    return rows[image], (stretch * n + place) * time_steps // (rounds * n)


class ValidationBatches:
    """The validation images with t (`validation_draws`) and noise that are always the same. They depend neither on the seed of
    the run nor on the batch size, so runs can be compared. With several processes each gets every world_size-th batch."""

    def __init__(
        self,
        images: DeviceImages,
        *,
        count: int,
        draws: int,
        batch_size: int,
        time_steps: int = 1000,
        has_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.images, self.has_labels = images, has_labels
        self.rows, self.t = validation_draws(len(images), count, draws, time_steps)
        self.draws = torch.arange(len(self.t)).split(batch_size)[rank::world_size]

    def __len__(self) -> int:
        return len(self.draws)  # batches of this process

    def __iter__(self) -> Iterator[Batch]:
        device = self.images.device
        for draws in self.draws:
            x_0, y = self.images.batch(self.rows[draws])
            keys = noise.key(0, noise.VALIDATION, draws).to(device, non_blocking=True)
            eps = noise.normal(keys, x_0.shape[1:])
            yield Batch(x_0, self.t[draws].to(device, non_blocking=True), eps, y if self.has_labels else None)


def test_dataset() -> None:
    """Self-test for `python -c`, offline, a few seconds. Raises AssertionError; tests/ holds what must hold."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        written = prepare("shapes", "", "val", 32, folder, num_workers=0).path.stat().st_mtime_ns
        images = prepare("shapes", "", "val", 32, folder, num_workers=0)
        assert images.path.stat().st_mtime_ns == written, "the second start decoded the images again"
        assert images.shape == (2000, 3, 32, 32) and torch.bincount(images.labels).tolist() == [200] * 10
        print("ok: 2,000 shapes of 10 classes, decoded once, read back from the cache")

        batches, rows = DeviceImages(images, "cpu"), torch.arange(16)
        x_0, y = batches.batch(rows)
        mirrored, _ = batches.batch(rows, torch.ones(16, dtype=torch.bool))
        assert x_0.dtype == torch.float32 and x_0.min() >= -1 and x_0.max() <= 1 and x_0.std() > 0.1
        assert torch.equal(mirrored.flip(-1), x_0), "flipping twice does not give the image back"
        assert torch.equal(y, images.labels[rows])
        print("ok: batches are float32 in [-1, 1] with their labels, and a flip undoes itself")

        odd = Path(folder, "pictures")
        odd.mkdir()
        for mode in ("L", "RGB", "RGBA", "CMYK", "P", "I;16"):
            Image.new(mode, (40, 50)).save(odd / f"{mode.replace(';', '')}.tif")
        assert len(prepare("folder", odd, "train", 16, folder, num_workers=0)) == 5  # and one held out
        print("ok: pictures of odd kinds are read")

        del batches, images  # Windows removes no file that is still mapped
