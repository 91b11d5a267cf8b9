"""A dataset decoded once to a file of uint8, which is mapped into memory from then on."""

import errno
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import time
import warnings
from collections import defaultdict, deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch

from src.data.decode import PictureNote, to_uint8
from src.data.images import Images
from src.progress import Bar
from src.utils import UserError, atomic_file, count, make_folders, printable, reading, writing

FORMAT = 2  # of the cache file and of to_uint8; count up when either changes, and caches are made again
CHUNK = 64  # images that a worker decodes and hands over at a time
ABANDONED = 600  # seconds without a write after which a half-made cache is left over from a killed run


class Task(NamedTuple):
    """What is decoded, and to what."""

    dataset: Any
    channels: int  # 3 for colour, 1 for grey
    size: int  # pixels per side

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.dataset), self.channels, self.size, self.size


TASKS: list[Task] = []  # the one of a process that decodes, see become_worker


class Overtaken(Exception):
    """Another process has made the same cache meanwhile."""


def open_or_decode(
    dataset: Any, name: str, split: str, image_size: int, source: str, cache_path: Path, num_workers: int, channels: int = 3
) -> Images:
    """The images of a dataset: from its cache file if that is there and still true, or decoded to it first.

    dataset: has a length and gives (image, label) by index.   source: absolute path of its data, "" if there is none.
    num_workers: processes that decode; -1 is one per core, 0 is this process. Several runs may do this at once: each writes a
    file of its own and renames it. Raises UserError: an image that cannot be decoded, a cache that cannot be read or written.
    """
    digits = hashlib.sha256(os.fsencode(source)).hexdigest()[:8]  # tell one source from another
    cache = cache_path / f"{name}-{split}-{image_size}{'-grey' * (channels == 1)}{source and '-' + digits}.npy"
    fingerprint = getattr(dataset, "fingerprint", None) or sampled_fingerprint(dataset, image_size)
    images, stale = open_cache(cache, fingerprint)
    if images is None:
        print(f"{name} {split}: decoding {count(len(dataset), 'image')} to {cache}" + (f" ({stale})" if stale else ""))
        write_cache(cache, Task(dataset, channels, image_size), fingerprint, num_workers)
        images, stale = open_cache(cache, fingerprint)
        if images is None:
            raise UserError(f"{cache} cannot be read back after writing it: {stale or 'it is gone'}. Is the disk sound?")
    found = f"{count(len(images), 'image')} of {count(len(images.classes), 'class', 'classes')}"
    print(f"{name} {split}: {found} at {image_size}x{image_size}, from {cache}")
    return images


def sampled_fingerprint(dataset: Any, image_size: int) -> str:
    """For a dataset without a fingerprint: its class, length, and eight of its images."""
    digest = hashlib.sha256(f"{type(dataset).__qualname__} {len(dataset)}".encode())
    for index in np.linspace(0, len(dataset) - 1, 8).astype(int):
        image, label = dataset[int(index)]
        digest.update(to_uint8(image, image_size).tobytes() + str(int(label)).encode())
    return digest.hexdigest()


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- decoding -------------------------------------------------------------------------------------------


def decode_chunk(task: Task, chunk: int) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str]], list[str]]:
    """Chunk number `chunk`: uint8 [K, C, S, S], int64 [K], notes (file, what), and a sentence for each fault.

    Sentences, because an exception would end the work at the first damaged picture.
    """
    indices = range(len(task.dataset))[chunk * CHUNK : (chunk + 1) * CHUNK]
    images = np.zeros((len(indices), *task.shape[1:]), dtype=np.uint8)
    labels, faults = np.zeros(len(indices), dtype=np.int64), []
    with warnings.catch_warnings(record=True) as warned:  # Pillow has warnings too; they are not for the user
        warnings.simplefilter("always")
        for i, index in enumerate(indices):
            try:
                image, labels[i] = task.dataset[index]
                images[i] = to_uint8(image, task.size, task.channels)
            except UserError as error:
                faults.append(str(error))
            except OSError as error:  # of a dataset that is not ours
                faults.append(f"Image {index} of the dataset cannot be read: {error}.")
    return images, labels, [w.message.args for w in warned if isinstance(w.message, PictureNote)], faults


def become_worker(task: Task) -> None:
    """Make this process one that decodes chunks of `task`. It ends with its parent, even by SIGKILL."""
    TASKS[:] = [task]
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal sends Ctrl-C, and SLURM SIGTERM, to the workers too
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]  # None in the main process alone
    os._exit(1)


def in_worker(chunk: int) -> tuple:
    return decode_chunk(TASKS[0], chunk)


def chunks(task: Task, num_workers: int) -> Generator[tuple, None, None]:
    """What decode_chunk gives, for all chunks in order. The workers are at most a few chunks ahead of whoever reads."""
    last = math.ceil(len(task.dataset) / CHUNK)
    workers = min(cpu_cores() if num_workers < 0 else num_workers, last)
    if workers <= 1:
        yield from (decode_chunk(task, chunk) for chunk in range(last))
        return
    if multiprocessing.get_start_method() != "fork":
        check_picklable(task.dataset)
    pool = ProcessPoolExecutor(workers, initializer=become_worker, initargs=(task,))
    try:
        ahead: deque[Future] = deque()
        for chunk in range(last):
            ahead.append(pool.submit(in_worker, chunk))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        yield from (future.result() for future in ahead)
    except (BrokenProcessPool, BlockingIOError) as error:
        raise UserError(
            "A process that decodes images was killed or could not start, perhaps for lack of memory. "
            "Try fewer with --num_workers, 0 for none."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def check_picklable(dataset: Any) -> None:
    """On Windows and macOS, and from Python 3.14 on, workers get the dataset as a pickle. Raises UserError if there is none."""
    try:
        ForkingPickler.dumps(dataset)
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        raise UserError(
            f"The dataset cannot be handed to the processes that decode ({error}). Define its class and its functions at the "
            f"top of a module, or decode in one process: --num_workers 0."
        ) from error


def decoded(task: Task, num_workers: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The chunks of a dataset in order, with a progress bar. Raises UserError that names all images that cannot be decoded."""
    faults: list[str] = []
    files: dict[str, list[str]] = defaultdict(list)  # by what is to be noted of them
    with (
        Bar(total=len(task.dataset), desc="decoding", unit=" image", unit_scale=True) as bar,
        closing(chunks(task, num_workers)) as results,
    ):
        for images, labels, notes, new_faults in results:
            faults += new_faults
            for file, what in notes:
                files[what].append(file)
            if not faults:
                yield images, labels
            bar.update(len(labels))
    if faults:  # all at once: whoever fixes one and starts again should not meet the next
        more = [f"... and {len(faults) - 20:,} more."] if len(faults) > 20 else []
        raise UserError("\n".join(faults[:20] + more))
    for what, names in files.items():
        print(f"note: {count(len(names), 'picture has', 'pictures have')} {what}; e.g. {names[0]}")


# --- the cache file -------------------------------------------------------------------------------------
# Three .npy arrays in one file: images uint8 [N, C, S, S] (so np.load(file, mmap_mode="r") opens them), labels
# int64 [N], and a JSON text. The text comes last: a file that has it is whole.


def write_cache(cache: Path, task: Task, fingerprint: str, num_workers: int) -> None:
    """Decode and write. Plain writes, no writable map: on a full disk a map would kill the process (SIGBUS)."""
    dataset, shape = task.dataset, task.shape
    with writing(cache, "--cache_path", f"It needs {math.prod(shape) / 1e6:,.0f} MB."):
        make_folders(cache.parent)
        remove_abandoned(cache)
        if math.prod(shape) > shutil.disk_usage(cache.parent).free:  # said before the work
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        content, all_labels = hashlib.sha256(str(shape).encode()), []
        with suppress(Overtaken), atomic_file(cache) as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for images, labels in decoded(task, num_workers):
                file.write(images.data)
                content.update(images.data)
                all_labels.append(labels)
            labels = np.concatenate(all_labels)
            content.update(labels.data)
            classes = list(getattr(dataset, "classes", None) or range(labels.max() + 1))
            if labels.min() < 0 or labels.max() >= len(classes):
                raise UserError(
                    f"The dataset has labels from {labels.min()} to {labels.max()} but {count(len(classes), 'class name')}; "
                    f"labels must lie in 0 to {len(classes) - 1}."
                )
            about = {
                "format": FORMAT,
                "source": fingerprint,
                "content": content.hexdigest()[:16],
                "classes": [printable(name) for name in classes],
                "class_ids": [printable(name) for name in getattr(dataset, "class_ids", None) or classes],
            }
            np.save(file, labels)
            np.save(file, np.array(json.dumps(about)))
            if open_cache(cache, fingerprint)[0]:  # it may be mapped by then, on another machine or on Windows: leave it
                raise Overtaken


def open_cache(cache: Path, fingerprint: str) -> tuple[Images | None, str]:
    """(Images, ""), or (None, the reason why it must be made again; "" if there is none yet).
    Raises UserError if the disk or the permissions are at fault: that is no reason to decode again."""
    with reading(cache, "Fix its permissions, delete it to have it made again, or choose another folder with --cache_path."):
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
                images = np.memmap(file, dtype=np.uint8, mode="r", offset=offset, shape=shape)
            return Images(np.asarray(images), labels, about["classes"], about["class_ids"], cache, about["content"]), ""
        except (FileNotFoundError, NotADirectoryError):
            return None, ""
        except OSError:
            raise
        except Exception:  # as many kinds as there are ways to damage a file
            return None, "the cache is damaged"


def remove_abandoned(cache: Path) -> None:
    """Remove what a killed run left of this file. A run that is alive writes every few seconds."""
    for part in cache.parent.glob(f".{cache.name[:100]}.part-*"):
        with suppress(OSError):  # it may be another user's
            if time.time() - part.stat().st_mtime > ABANDONED:
                part.unlink()
