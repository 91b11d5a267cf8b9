"""Runs by name, and what a folder holds: one run at a time, no previews of another, pictures that are all drawn alike."""

import contextlib
import json
import os
import re
import shlex
import socket
from argparse import Namespace
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import IO, Any

from src.runtime.distributed import World
from src.runtime.flags import PATH, RUN, Rows, print_idle
from src.utils import FlagError, UserError, atomic_file, make_folders, reading, reason, take_free, writing

BESIDE = ("grid.png", "labels.csv", "samples.npz", "denoising.gif", "interpolation.png", "interpolation.gif")
RUNS = Path("checkpoints")
LOCK = ".ddpm.lock"  # not .lock: pictures may be drawn into a folder of another program
SHIPPED = [Path(__file__).parents[2] / "docs" / name for name in ("nature.pth", "shapes.pth")]
WHICH_CHECKPOINT: Rows = [
    ("run", RUN, "", "name of a run: its checkpoint is checkpoints/NAME/best.pth, its outputs lie below outputs/NAME"),
    ("checkpoint", PATH, None, "the checkpoint (default: checkpoints/[NAME/]best.pth)"),
]


def known_checkpoints() -> list[Path]:
    """One checkpoint of each run there is, best.pth before latest.pth before others, and those that ship with the program."""
    found = [[folder / "best.pth", folder / "latest.pth", *folder.glob("*.pth")] for folder in [RUNS, *sorted(RUNS.glob("*"))]]
    of_runs = [next(path for path in paths if path.exists()) for paths in found if paths[2:]]
    shipped = [file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file for file in SHIPPED if file.exists()]
    return [*of_runs, *shipped]


def no_checkpoint(path: Path) -> str:
    """What to say where there is none: which others there are, beside it and elsewhere."""
    others = [shlex.quote(str(other)) for other in dict.fromkeys([*sorted(path.parent.glob("*.pth")), *known_checkpoints()])]
    advice = ["Run 'python train.py' first"] if path == RUNS / "best.pth" or not others else []  # it was no run by name
    advice += [f"{'or choose' if advice else 'Choose'} one of: {', '.join(others[:8])}"] if others else []
    return f"No checkpoint at {path}. {', '.join(advice)}."


def choose_checkpoint(flags: Namespace) -> None:
    """Settle flags.checkpoint and flags.run, each by the other where it alone is given. Raises UserError."""
    print_idle(flags.typed, {"with --checkpoint and --output_dir": ("run", {"checkpoint", "output_dir"} <= {*flags.typed})})
    if typed := flags.checkpoint:
        for folder in map(os.path.abspath, (typed, RUNS / typed)):
            if os.path.dirname(folder) == str(RUNS.absolute()) and os.path.isdir(folder):
                raise FlagError(f"--checkpoint: {typed} is a run, expected a file. Use --run {os.path.basename(folder)}.")
        folder = Path(os.path.abspath(typed)).parent
        if not flags.run and folder.parent == RUNS.absolute():
            flags.run = folder.name
        return
    best, latest = (RUNS / flags.run / name for name in ("best.pth", "latest.pth"))
    flags.checkpoint = str(best)
    with reading(best):
        if latest.exists() and not best.exists():  # stopped before its first validation
            print(f"note: there is no {best} yet, so this is {latest}")
            flags.checkpoint = str(latest)


@contextlib.contextmanager
def lock_folder(folder: Path, flag: str, way_out: str = "give this one a name: --run NAME") -> Iterator[None]:
    """Make the folder and hold it until the block ends or the process dies. The operating system keeps the lock, not the file.
    flag: the setting that named the folder, way_out: another folder, for messages.
    Raises UserError while another process has it, or without write permission."""
    path = folder / LOCK
    with writing(folder, flag):
        make_folders(folder)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (the next line closes it)
    with file:
        try:
            take(file)
            if not (path.exists() and os.path.samefile(file.fileno(), path)):  # its owner just removed it
                raise BlockingIOError
        except (BlockingIOError, PermissionError):  # other errors: a file system without locks
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise UserError(f"{folder} is in use by {owner}. Wait for it to end, or {way_out}.") from None
        except OSError as error:
            print(f"Warning: {folder} cannot be locked ({reason(error)}). Make sure that only one run uses it at a time.")
        with contextlib.suppress(OSError):  # a full disk: the lock holds, only without its owner's name
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        remove_parts(folder)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes no open file
                path.unlink()


def remove_parts(folder: Path) -> None:
    """Remove what a process that was killed while it wrote left half-written in a folder that this one holds."""
    for path in folder.glob(".*.part-*"):
        if re.fullmatch(r"\..+\.part-([0-9a-f]{8}|link)", path.name):  # as atomic_file and keep_previous name them
            with contextlib.suppress(OSError):  # it may be another user's
                path.unlink()


def claim(folder: Path, checkpoints: Path, saved_in: Path | None) -> None:
    """Note in `folder` which run writes there, by the way from it to the run's checkpoints. Raises UserError if it is another
    run's: a run never hides or overwrites what another one wrote. A run that was moved, renamed or copied takes its folders
    along, and those of a run that is gone are free. saved_in: where the checkpoint to go on from was written, or None.
    Folders without a note go to a run that is resumed."""
    file, ours = folder / ".run", os.path.relpath(checkpoints, folder)
    with reading(file):
        owner = file.read_text(encoding="utf-8", errors="surrogateescape") if file.exists() else ours
        is_foreign = not file.exists() and not saved_in and any([*folder.glob("samples/*"), *folder.glob("events.out.*")])
    theirs = Path(os.path.normpath(folder / owner))
    whose, way = "another run", ""
    if owner != ours:
        whose, way = f"the run in {theirs}", f" To go on with that run, first move its files *.pth to {checkpoints}."
        is_theirs = theirs.resolve() not in [place.resolve() for place in (checkpoints, saved_in) if place]
        is_foreign = is_theirs and any(theirs.glob("*.pth"))  # none: their run is gone, else it would hold the folder
        if not is_foreign:
            print(f"note: {folder} had previews or curves of the run in {theirs}; from now on it belongs to this run")
    if is_foreign:
        advice = "Give this run a name: --run NAME keeps its checkpoints, outputs and logs apart."
        raise UserError(f"{folder} holds previews or curves of {whose}. {advice}{way}")
    with atomic_file(file) as part:
        part.write(ours.encode("utf-8", "surrogateescape"))


def take(file: IO[str]) -> None:
    """Lock the open file, or raise BlockingIOError or PermissionError at once if another process has it."""
    if os.name == "nt":
        import msvcrt

        file.seek(1 << 30)  # Windows locks bytes against reading too: lock one that is never read
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        file.seek(0)
    else:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: a child that outlives us would keep holding it


# --- a folder of pictures: all are drawn with the same settings -----------------------------------------------------------


def next_folder(parent: Path, world: World) -> Path:
    """A new folder, parent/001 or the number after the highest there. The main process makes it at once: no other call can."""
    number = 0
    if world.is_main:
        with writing(parent, "--output_dir"):
            highest = max([int(path.name) for path in parent.glob("[0-9]*") if path.name.isdecimal()], default=0)
            number = int(take_free((parent / f"{n:03}" for n in count(highest + 1)), is_folder=True).name)
    return parent / f"{world.max(number)[0]:03}"


def pictures_of(images: Path) -> dict[int, Path]:
    """The pictures of a folder by number, in order: files with the names that sample.py gives, 000000.png and so on."""
    found = [path for path in images.glob("*.png") if re.fullmatch("[0-9]{6}|[1-9][0-9]{6,}", path.stem)]
    return dict(sorted((int(path.stem), path) for path in found))


def settings_of(file: Path) -> dict[str, Any] | None:
    """What a settings.json of sample.py says; {} if another program wrote it, None if there is none. Raises OSError."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:  # no JSON
        return {}
    return found if isinstance(found, dict) and {"weights", "sampler", "steps", "seed"} <= found.keys() else {}


@contextlib.contextmanager
def picture_folder(out: Path, about: dict[str, Any], facts: dict[str, Any], overwrite: bool) -> Iterator[None]:
    """Hold a folder for pictures that are drawn with the settings `about`: a new one, or one whose pictures were drawn with the
    same. Others are refused; with overwrite those that sample.py drew are removed first, and nothing else ever is.
    facts: what else settings.json says, which changes no picture.   Raises UserError."""
    file, images = out / "settings.json", out / "images"
    with lock_folder(out, "--output_dir", "choose another --output_dir"):
        with reading(out):
            found = settings_of(file)
            there = sorted(images.iterdir()) if images.is_dir() else []
            beside = [out / name for name in BESIDE if os.path.lexists(out / name)]
        if strangers := [*there, *beside] if found is None else [] if found else [file]:
            raise UserError(f"{out} holds {strangers[0].name}, which sample.py did not write. Choose another --output_dir.")
        ours = [*pictures_of(images).values(), *beside]
        before = {"precision": about["precision"], "spacing": "even"} | (found or about)  # those are newer than the others
        names = [name for name in about | before if name not in facts and before.get(name) != about.get(name)]
        if names and ours and not overwrite:
            changed = ", ".join(f"{name} {before.get(name, 'none')} -> {about.get(name, 'none')}" for name in names)
            advice = "Choose another --output_dir, or remove them with --overwrite."
            raise UserError(f"{out} holds pictures drawn with other settings ({changed}). {advice}")
        remove_parts(images)
        with writing(out, "--output_dir"):
            make_folders(images)
            for path in ours if overwrite else []:
                path.unlink()
            with atomic_file(file) as part:
                part.write(json.dumps(about | facts, indent=1).encode())
        yield
