"""A dataset decoded chunk by chunk, by several processes where that helps. What is wrong with pictures is told once for all."""

import contextlib
import math
import multiprocessing
import os
import pickle
import shlex
import signal
import warnings
from collections import defaultdict, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import numpy as np

from src.data.decode import Damaged, PictureNote, to_uint8
from src.progress import Bar
from src.utils import UserError, count, reason

CHUNK = 64  # images that a worker decodes and hands over at a time


class Unreadable(UserError):
    """Pictures of a dataset that cannot be read. faults: (row of the dataset, sentence, file) of each. The row is -1 where the
    disk or the permissions are at fault and not the picture; the file is "" where there is none."""

    def __init__(self, faults: Sequence[tuple[int, str, str]]):
        self.faults = faults
        sentences = [sentence for row, sentence, _ in faults if row < 0] or [f"{sentence}." for _, sentence, _ in faults]
        super().__init__("\n".join(sentences[:20] + [f"... and {len(sentences) - 20:,} more."] * (len(sentences) > 20)))

    def listed(self, script: Path, advice: str = "") -> UserError:
        """The same with a list of all, a shell script that moves them aside. As it is if the disk is at fault or lacks room."""
        lines = [f"# {count(len(self.faults), 'picture')} that cannot be decoded"]
        for _, sentence, file in self.faults:
            move = f"mv {shlex.quote(file)} {shlex.quote(file + '.damaged')}  " if file else ""
            lines.append(f"{move}# {' '.join(sentence.split())}")
        with contextlib.suppress(OSError):
            if min(row for row, *_ in self.faults) >= 0:
                script.parent.mkdir(parents=True, exist_ok=True)
                script.write_bytes(os.fsencode("\n".join(lines) + "\n"))
                found = [sentence for _, sentence, _ in self.faults[:3]]
                found += [f"and {len(self.faults) - 3:,} more"] * (len(self.faults) > 3)
                way = f"'sh {shlex.quote(str(script))}' renames all that are damaged, so that they are passed over"
                return UserError(f"{'; '.join(found)}. {way}{advice}.")
        return self


class Task(NamedTuple):
    """What is decoded, and to what."""

    dataset: Any
    channels: int  # 3 for colour, 1 for grey
    size: int  # pixels per side; 0 leaves pictures as large as they are
    rows: Sequence[int]  # of the dataset


TASKS: list[Task] = []  # the one of a process that decodes, see become_worker


def decode_chunk(chunk: int, task: Task | None = None) -> tuple[list[tuple[np.ndarray, int]], list[tuple], list[tuple]]:
    """Chunk number `chunk`: pairs of uint8 [C, S, S] and label, the args of PictureNotes, and faults: an exception would end
    the work at the first damaged picture.   task: None in a worker, which has it."""
    task = task or TASKS[0]
    pairs, faults = [], []
    with warnings.catch_warnings(record=True) as warned:  # those of libraries are not for the user
        warnings.simplefilter("always")
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
    return pairs, [w.message.args for w in warned if isinstance(w.message, PictureNote)], faults


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
    with bar, contextlib.closing(chunks(task, num_workers)) as results:
        for pairs, new_notes, new_faults in results:
            faults += new_faults
            notes += new_notes
            if not faults:
                yield from pairs
            bar.update(len(pairs) + len(new_faults))
    if faults:  # all at once: whoever fixes one and starts again should not meet the next
        raise Unreadable(faults)
    tell(notes)


def tell(notes: Iterable[tuple[str, str, float]]) -> None:
    """Print a line for each kind of note. notes: (file, what, amount); what may have {sum} and {min} of the amounts in it."""
    kinds = defaultdict(list)
    for file, what, amount in notes:
        kinds[what].append((file, amount))
    for what, found in kinds.items():
        files, amounts = zip(*found)
        these = f"{count(len(found), 'picture has', 'pictures have')} {what.format(sum=sum(amounts), min=min(amounts))}"
        print(f"note: {these}; e.g. {files[0]}")
