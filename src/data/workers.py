"""A dataset decoded chunk by chunk, by several processes where that helps."""

import math
import multiprocessing
import os
import pickle
import signal
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from multiprocessing.reduction import ForkingPickler
from threading import Thread
from typing import Any, NamedTuple

import numpy as np

from src.data.damaged import Damaged, Unreadable, noted, tell
from src.data.decode import to_uint8
from src.progress import Bar
from src.utils import UserError, reason

CHUNK = 64  # images that a worker decodes and hands over at a time


class Task(NamedTuple):
    """What is decoded, and to what."""

    dataset: Any
    channels: int  # 3 for colour, 1 for grey
    size: int  # pixels per side; 0 leaves pictures as large as they are
    rows: Sequence[int]  # of the dataset


TASKS: list[Task] = []  # the one of a process that decodes, see become_worker


def decode_chunk(chunk: int, task: Task | None = None) -> tuple[list[tuple[np.ndarray, int]], list[tuple], list[tuple]]:
    """Chunk number `chunk`: pairs of uint8 [C, S, S] and label, the args of PictureNotes, and faults.

    Faults, because an exception would end the work at the first damaged picture.   task: None in a worker, which has it.
    """
    task = task or TASKS[0]
    pairs, faults = [], []
    with noted() as notes:
        for index in task.rows[chunk * CHUNK : (chunk + 1) * CHUNK]:
            try:
                image, label = task.dataset[index]
                pairs.append((to_uint8(image, task.size, task.channels), int(label)))
            except UserError as error:
                file = os.path.abspath(getattr(error, "file", ""))
                faults.append((index if isinstance(error, Damaged) else -1, str(error), file * os.path.isfile(file)))
            except OSError as error:  # of a dataset that is not ours; Pillow's own, for damage, have no number
                sentence = f"Image {index} of the dataset cannot be read: {error}"
                faults.append((index, sentence, "") if error.errno is None else (-1, f"{sentence}.", ""))
    return pairs, notes, faults


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


def chunks(task: Task, num_workers: int) -> Generator[tuple, None, None]:
    """What decode_chunk gives, for all chunks in order. The workers are at most a few chunks ahead of whoever reads."""
    last = math.ceil(len(task.rows) / CHUNK)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cores if num_workers < 0 else num_workers, last)
    pool = start_pool(task, workers) if workers > 1 else None
    if pool is None:
        yield from (decode_chunk(chunk, task) for chunk in range(last))
        return
    try:
        ahead: deque[Future] = deque()
        for chunk in range(last):
            ahead.append(pool.submit(decode_chunk, chunk))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        yield from (future.result() for future in ahead)
    except (BrokenProcessPool, BlockingIOError) as error:
        what = "A process that decodes images was killed or could not start, perhaps for lack of memory."
        raise UserError(f"{what} Try fewer with --num_workers, 0 for none.") from error
    finally:
        pool.shutdown(cancel_futures=True)


def start_pool(task: Task, workers: int) -> ProcessPoolExecutor | None:
    """None, with a note, where processes cannot have locks in common. Raises UserError for a dataset that cannot be handed
    over: on Windows and macOS, and from Python 3.14 on, workers get it as a pickle."""
    try:
        if multiprocessing.get_start_method() != "fork":
            ForkingPickler.dumps(task.dataset)
        return ProcessPoolExecutor(workers, initializer=become_worker, initargs=(task,))
    except (OSError, ImportError, NotImplementedError) as error:
        print(f"note: decoding in one process: several need locks, which Linux keeps in /dev/shm, and there: {reason(error)}")
        return None
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        advice = "Define its class and its functions at the top of a module, or decode in one process: --num_workers 0."
        raise UserError(f"The dataset cannot be handed to the processes that decode ({error}). {advice}") from error


def decoded(task: Task, num_workers: int) -> Iterator[tuple[np.ndarray, int]]:
    """The images and labels of a task in order, with a bar. Raises Unreadable that names all images that cannot be decoded."""
    faults: list[tuple] = []
    notes: list[tuple] = []
    bar = Bar(total=len(task.rows), desc="decoding", unit=" image", unit_scale=True)
    with bar, closing(chunks(task, num_workers)) as results:
        for pairs, new_notes, new_faults in results:
            faults += new_faults
            notes += new_notes
            if not faults:
                yield from pairs
            bar.update(len(pairs) + len(new_faults))
    if faults:  # all at once: whoever fixes one and starts again should not meet the next
        raise Unreadable(faults)
    tell(notes)
