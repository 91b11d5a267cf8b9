"""Decode once: every dataset becomes one uint8 cache file, which is mapped into memory from then on."""

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from src.data.decode import to_uint8
from src.utils import UserError, atomic_file

FORMAT = 2  # of the cache file and of to_uint8; count up when either changes, and caches are made again
CHUNK = 64  # pictures a worker decodes and hands over at a time
ABANDONED = 600  # seconds without a write after which a half-made cache is left over from a killed run


class Labelled(Protocol):
    """What a dataset has to offer: a length, and (image, label) by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, int]: ...


@dataclass
class Images:
    """Decoded: images uint8 [N, 3, S, S] mapped from the file `path`, labels int64 [N], 0 to len(classes) - 1."""

    images: np.ndarray
    labels: torch.Tensor
    classes: list[str]
    class_ids: list[str]
    path: Path

    def __len__(self) -> int:
        return len(self.images)


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_or_decode(
    dataset: Any, name: str, split: str, image_size: int, source: str, cache_path: Path, num_workers: int
) -> Images:
    fingerprint = getattr(dataset, "fingerprint", None) or sampled_fingerprint(dataset, image_size)
    cache = cache_file(name, source, split, image_size, cache_path)
    with cache_advice(cache, len(dataset) * 3 * image_size**2):
        remove_abandoned(cache)
        images, stale = open_cache(cache, fingerprint)
        if images is None:
            print(f"{name} {split}: decoding {len(dataset):,} images to {cache}" + (f" ({stale})" if stale else ""))
            write_cache(cache, dataset, image_size, fingerprint, num_workers)
            images, stale = open_cache(cache, fingerprint)
            if images is None:
                raise UserError(f"{cache} cannot be read back after writing it: {stale}. Is the disk sound?")
    print(
        f"{name} {split}: {len(images):,} images of {len(images.classes)} "
        f"{'class' if len(images.classes) == 1 else 'classes'} at {image_size}x{image_size}, from {cache}"
    )
    return images


def cache_file(name: str, path: str | os.PathLike, split: str, image_size: int, cache_path: str | os.PathLike) -> Path:
    """E.g. data/cache/tiny-imagenet-train-64-1f3a92c4.npy; the digits tell one source folder from another."""
    digits = hashlib.sha256(os.path.abspath(path).encode("utf-8", "surrogateescape")).hexdigest()[:8]
    source = "" if name == "shapes" else f"-{digits}"  # shapes come from no folder
    return Path(cache_path) / f"{name}-{split}-{image_size}{source}.npy"


def sampled_fingerprint(dataset: Labelled, image_size: int) -> str:
    """For a dataset without a fingerprint: its class, length, and eight of its pictures."""
    digest = hashlib.sha256(f"{type(dataset).__qualname__} {len(dataset)}".encode())
    for index in np.linspace(0, len(dataset) - 1, 8).astype(int):
        image, label = dataset[int(index)]
        digest.update(to_uint8(image, image_size).tobytes() + str(int(label)).encode())
    return digest.hexdigest()


class Chunks(Dataset):
    """Chunk i of a dataset, decoded: (uint8 [K, 3, S, S], int64 [K]), or a line for each picture that cannot be read.

    Lines, because an exception would leave a worker process as a traceback. numpy arrays, because tensors
    would travel through /dev/shm, of which containers often have 64 MB.
    """

    def __init__(self, dataset: Labelled, image_size: int):
        self.dataset, self.image_size = dataset, image_size

    def __len__(self) -> int:
        return math.ceil(len(self.dataset) / CHUNK)

    def __getitem__(self, chunk: int) -> tuple[np.ndarray, np.ndarray] | str:
        images, labels, faults = [], [], []
        for index in range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self.dataset))):
            try:
                image, label = self.dataset[index]
                images.append(to_uint8(image, self.image_size))
                labels.append(int(label))
            except UserError as error:
                faults.append(str(error))
        return "\n".join(faults) or (np.stack(images), np.array(labels, dtype=np.int64))


def as_it_is(chunk):
    """For DataLoader, whose own habit is to turn arrays into tensors. Named, so that it pickles under spawn."""
    return chunk


def decoded(dataset: Labelled, image_size: int, num_workers: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The chunks of a dataset in order, with a progress bar. Raises UserError for a picture that cannot be read."""
    chunks = Chunks(dataset, image_size)
    workers = min(cpu_cores() if num_workers < 0 else num_workers, len(chunks))
    # a generator of its own: DataLoader draws a seed, and a run must not depend on whether the cache was there
    loader = DataLoader(
        chunks,
        batch_size=None,
        num_workers=workers if workers > 1 else 0,
        collate_fn=as_it_is,
        generator=torch.Generator(),
    )
    try:
        with tqdm(total=len(dataset), desc="decoding", unit=" images", unit_scale=True, disable=None) as bar:
            faults: list[str] = []
            for chunk in loader:
                if isinstance(chunk, str):
                    faults += chunk.splitlines()
                elif not faults:
                    yield chunk
                bar.update(CHUNK if isinstance(chunk, str) else len(chunk[1]))
        if faults:  # all of them at once: who mends one and starts again should not meet the next
            more = [f"... and {len(faults) - 20:,} more."] if len(faults) > 20 else []
            raise UserError("\n".join(faults[:20] + more))
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise UserError(
                "A process that decodes images was killed, perhaps for lack of memory. "
                "Try fewer with NUM_WORKERS / --num_workers, 0 for none."
            ) from error
        raise


# --- the cache file ---------------------------------------------------------------------------------
# Three .npy arrays in one file: images uint8 [N, 3, S, S] (so np.load(file, mmap_mode="r") opens them), labels
# int64 [N], and a JSON text. The text comes last: a file that has it is whole.
def write_cache(cache: Path, dataset: Labelled, image_size: int, fingerprint: str, num_workers: int) -> None:
    """Decode and write. Plain writes, no writable map: on a full disk a map would kill the process (SIGBUS)."""
    all_labels = []
    with atomic_file(cache) as file:
        shape = (len(dataset), 3, image_size, image_size)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for images, labels in decoded(dataset, image_size, num_workers):
            file.write(images.data)
            all_labels.append(labels)
        labels = np.concatenate(all_labels)
        classes = list(getattr(dataset, "classes", None) or map(str, range(labels.max() + 1)))
        if labels.min() < 0 or labels.max() >= len(classes):
            raise UserError(
                f"The dataset has labels from {labels.min()} to {labels.max()} but {len(classes)} class "
                f"names; labels must lie in 0 to {len(classes) - 1}."
            )
        about = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "classes": classes,
            "class_ids": list(getattr(dataset, "class_ids", None) or classes),
        }
        np.save(file, labels)
        np.save(file, np.array(json.dumps(about)))


def open_cache(cache: Path, fingerprint: str) -> tuple[Images | None, str]:
    """(Images, ""), or (None, the reason why it must be made again; "" where there is none yet)."""
    try:
        with open(cache, "rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            offset = file.tell()
            file.seek(math.prod(shape), os.SEEK_CUR)
            labels = np.load(file, allow_pickle=False)
            about = json.loads(np.load(file, allow_pickle=False).item())
            if dtype != np.uint8 or len(shape) != 4 or labels.shape != shape[:1] or file.read(1):
                raise ValueError("unexpected content")
            if about["format"] != FORMAT:
                return None, "the cache is of another version of this program"
            if about["fingerprint"] != fingerprint:
                return None, "the pictures have changed since the cache was made"
            classes, class_ids = about["classes"], about["class_ids"]
    except FileNotFoundError:
        return None, ""
    except PermissionError:
        raise
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError):
        return None, "the cache is damaged"
    images = np.memmap(cache, dtype=np.uint8, mode="r", offset=offset, shape=shape)
    return Images(images, torch.from_numpy(labels), classes, class_ids, cache), ""


@contextlib.contextmanager
def cache_advice(cache: Path, needed: int) -> Iterator[None]:
    """Say what to do where the cache, of `needed` bytes, cannot be written or read."""
    try:
        yield
    except OSError as error:
        folder = cache.parent
        while not folder.is_dir() and folder != folder.parent:
            folder = folder.parent
        raise UserError(
            f"Cannot keep the decoded images in {cache}: {error.strerror or error}. It needs "
            f"{needed / 1e6:,.0f} MB, {shutil.disk_usage(folder).free / 1e6:,.0f} MB are free there. "
            f"Make room or mend the permissions, or choose another folder with CACHE_PATH / --cache_path."
        ) from error


def remove_abandoned(cache: Path) -> None:
    """Remove what a killed run left of this file. A run that is alive writes every few seconds."""
    for part in cache.parent.glob(f".{cache.name}.part-*"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > ABANDONED:
                part.unlink()
