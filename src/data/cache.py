"""A dataset decoded once to a file of uint8, which is mapped into memory from then on."""

import glob
import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.data.decode import to_uint8
from src.data.workers import Task, Unreadable, decoded
from src.utils import UserError, atomic_file, count, make_folders, need_space, printable, reading, writing

FORMAT = 2  # of the cache file and of to_uint8; count up when either changes, and caches are made again
ABANDONED = 600  # seconds without a write after which a half-made cache is left over from a killed run


@dataclass
class Images:
    """Decoded images: image i is images[i], uint8 [C, S, S].

    file: uint8 [M, C, S, S], all of the file `path`, mapped.   rows: int64 [N], which of them are these; all, if not given.
    labels: int64 [N], in [0, len(classes)).
    skipped: damaged pictures that the file leaves out.
    fingerprint: 16 hex digits that follow from the decoded pixels, the labels and their order, and cost nothing at a start.
        Moving, copying or renaming the data in the same order changes nothing; an image added, removed, edited or put into
        another class does, and so does a version of Pillow that decodes a JPEG to slightly different pixels.
    """

    file: np.ndarray
    labels: torch.Tensor
    classes: list[str]
    class_ids: list[str]
    path: Path
    fingerprint: str = ""
    rows: Any = None
    skipped: int = 0

    def __post_init__(self) -> None:
        if self.rows is None:
            self.rows = np.arange(len(self.file))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        """A copy of image number `index`, or of several: uint8 [K, C, S, S] for a slice or an array of numbers."""
        return self.file[self.rows[index]]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self.file.shape[1:])

    def of_classes(self, labels: Sequence[int]) -> "Images":
        """The images of these classes alone, numbered from 0 in this order. They stay where they are in the file."""
        if list(labels) == list(range(len(self.classes))):
            return self
        number = torch.full((len(self.classes),), -1)
        number[list(labels)] = torch.arange(len(labels))
        is_chosen = number[self.labels] >= 0
        digest = hashlib.sha256(f"{self.fingerprint} {list(labels)}".encode()).hexdigest()[:16]
        classes, ids = ([names[label] for label in labels] for names in (self.classes, self.class_ids))
        rows = self.rows[is_chosen.numpy()]
        return Images(self.file, number[self.labels[is_chosen]], classes, ids, self.path, digest, rows)


def open_or_decode(
    task: Task, name: str, split: str, source: str, cache_path: Path, num_workers: int, skip_damaged: bool, other: Callable
) -> Images:
    """The images of a task: from their cache file if that is there and still true, or decoded to it first.

    name: of the dataset.   source: absolute path of its data, "" if there is none.   num_workers, skip_damaged: see prepare.
    other: gives a dataset whose damaged pictures are named as well. Several runs may do this at once: each writes a file of its
    own and renames it. Raises UserError: an image that cannot be decoded, a cache that cannot be read or written.
    """
    dataset, channels, size, _ = task
    digits = hashlib.sha256(os.fsencode(source)).hexdigest()[:8]  # tell one source from another
    cache = cache_path / f"{name}-{split}-{size}{'-grey' * (channels == 1)}{source and '-' + digits}.npy"
    damage = cache.with_suffix(".damaged.sh")
    fingerprint = getattr(dataset, "fingerprint", None) or sampled_fingerprint(dataset, size)
    images, stale = open_cache(cache, fingerprint, skip_damaged)
    if images is None:
        print(f"{name} {split}: decoding {count(len(dataset), 'image')} to {cache}" + (f" ({stale})" if stale else ""))
        try:
            write_cache(cache, task, fingerprint, num_workers)
        except Unreadable as error:
            rows = sorted({*task.rows} - {row for row, *_ in error.faults})
            if not skip_damaged or not rows:
                rest, faults = other(), [*error.faults]
                try:
                    for _ in decoded(task._replace(dataset=rest, rows=range(len(rest))), num_workers):
                        pass  # for the faults alone
                except Unreadable as more:
                    faults += more.faults
                raise Unreadable(faults).listed(damage, "; 'train.py --skip_damaged' goes on without them") from None
            error.listed(damage)
            write_cache(cache, task._replace(rows=rows), fingerprint, num_workers)
        images, stale = open_cache(cache, fingerprint, skip_damaged)
        if images is None:
            raise UserError(f"{cache} cannot be read back after writing it: {stale or 'it is gone'}. Is the disk sound?")
    if images.skipped:
        print(f"note: {count(images.skipped, 'damaged picture')} left out of {split}; {damage} names what is damaged")
    if split == "train" and (empty := sorted({*range(len(images.classes))} - {*images.labels.tolist()})):
        print(f"note: {count(len(empty), 'class has', 'classes have')} no picture to train on; e.g. {images.classes[empty[0]]}")
    found = f"{count(len(images), 'image')} of {count(len(images.classes), 'class', 'classes')}"
    print(f"{name} {split}: {found} at {size}x{size}, from {cache}")
    return images


def sampled_fingerprint(dataset: Any, image_size: int) -> str:
    """For a dataset without a fingerprint: its class, length, and eight of its images."""
    digest = hashlib.sha256(f"{type(dataset).__qualname__} {len(dataset)}".encode())
    for index in np.linspace(0, len(dataset) - 1, 8).astype(int):
        with suppress(UserError, OSError), warnings.catch_warnings(record=True):  # all is told when all is decoded
            image, label = dataset[int(index)]
            digest.update(to_uint8(image, image_size).tobytes() + str(int(label)).encode())
    return digest.hexdigest()


# --- the cache file -------------------------------------------------------------------------------------
# Three .npy arrays in one file: images uint8 [N, C, S, S] (so np.load(file, mmap_mode="r") opens them), labels
# int64 [N], and a JSON text. The text comes last: a file that has it is whole.


def write_cache(cache: Path, task: Task, fingerprint: str, num_workers: int) -> None:
    """Decode and write. Plain writes, no writable map: on a full disk a map would kill the process (SIGBUS)."""
    dataset, shape = task.dataset, (len(task.rows), task.channels, task.size, task.size)
    with writing(cache, "--cache_path", f"It needs {math.prod(shape) / 1e6:,.0f} MB."):
        make_folders(cache.parent)
        for part in cache.parent.glob(f".{glob.escape(cache.name[:100])}.part-*"):
            with suppress(OSError):  # it may be another user's
                if time.time() - part.stat().st_mtime > ABANDONED:
                    part.unlink()
        need_space(cache.parent, math.prod(shape))
        content, all_labels = hashlib.sha256(str(shape).encode()), []
        with suppress(FileExistsError), atomic_file(cache) as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for image, label in decoded(task, num_workers):
                file.write(image.data)
                content.update(image.data)
                all_labels.append(label)
            labels = np.array(all_labels, dtype=np.int64)
            content.update(labels.data)
            classes = list(getattr(dataset, "classes", None) or range(labels.max() + 1))
            if labels.min() < 0 or labels.max() >= len(classes):
                found = f"labels from {labels.min()} to {labels.max()} but {count(len(classes), 'class name')}"
                raise UserError(f"The dataset has {found}; labels must lie in 0 to {len(classes) - 1}.")
            about = {
                "format": FORMAT,
                "source": fingerprint,
                "content": content.hexdigest()[:16],
                "skipped": len(dataset) - len(task.rows),
                "classes": [printable(name) for name in classes],
                "class_ids": [printable(name) for name in getattr(dataset, "class_ids", None) or classes],
            }
            np.save(file, labels)
            np.save(file, np.array(json.dumps(about)))
            if open_cache(cache, fingerprint, len(task.rows) < len(dataset))[0]:
                raise FileExistsError  # another run was faster, and on another machine or on Windows it may be mapped: leave it


def open_cache(cache: Path, fingerprint: str, skip_damaged: bool) -> tuple[Images | None, str]:
    """(Images, ""), or (None, the reason why it must be made again; "" if there is none yet).
    Raises UserError if the disk or the permissions are at fault: that is no reason to decode again."""
    with reading(cache, "Delete it to have it made again, or choose another folder with --cache_path."):
        try:
            with open(cache, "rb") as file:
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                offset = file.tell()
                file.seek(math.prod(shape), os.SEEK_CUR)
                labels = torch.from_numpy(np.lib.format.read_array(file))
                about = json.loads(np.lib.format.read_array(file).item())
                if dtype != np.uint8 or len(shape) != 4 or labels.shape != shape[:1] or file.read(1):
                    raise ValueError("unexpected content")
                if about["format"] != FORMAT:
                    return None, "the cache is of another version of this program"
                if about["source"] != fingerprint:
                    return None, "the pictures have changed since the cache was made"
                if (skipped := about.get("skipped", 0)) and not skip_damaged:
                    return None, f"it leaves out {count(skipped, 'damaged picture')}"
                images = np.memmap(file, dtype=np.uint8, mode="r", offset=offset, shape=shape)
            array, names = np.asarray(images), (about["classes"], about["class_ids"])
            return Images(array, labels, *names, cache, about["content"], skipped=skipped), ""
        except (FileNotFoundError, NotADirectoryError):
            return None, ""
        except OSError:
            raise
        except Exception:  # as many kinds as there are ways to damage a file
            return None, "the cache is damaged"
