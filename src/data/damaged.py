"""What is wrong with pictures, told once for all: those that cannot be decoded, and what was guessed or left out of others."""

import contextlib
import os
import shlex
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from src.utils import UserError, count, reason, stand_in


class PictureNote(UserWarning):
    """The picture is read, but something in it was guessed or ignored. args: the name of the file, what, an amount for it."""


class Damaged(UserError):
    """A picture that cannot be decoded. file: its path, or what stands for it."""

    def __init__(self, sentence: str, file: str):
        super().__init__(sentence)
        self.file = file


@contextlib.contextmanager
def decoding(name: str | os.PathLike) -> Iterator[None]:
    """Turn what a damaged picture raises (OSError, SyntaxError, ...) into a Damaged that names it."""
    try:
        yield
    except Exception as error:  # as many kinds as there are ways to damage a picture
        what = f"cannot be decoded ({reason(error)})"
        if isinstance(error, Image.DecompressionBombError):
            what = f"has too many pixels ({error})"
        if isinstance(error, Image.UnidentifiedImageError):
            what = stand_in(name) or "is not a picture of a kind that can be read, or is damaged at its start"
        raise Damaged(f"{name} {what}", str(name)) from error


def name_of(image: Image.Image) -> str:
    return str(getattr(image, "origin", "") or getattr(image, "filename", "") or "A picture of the dataset")


def note(image: Image.Image, what: str, amount: float = 0) -> None:
    warnings.warn(PictureNote(name_of(image), what, amount), stacklevel=2)


@contextlib.contextmanager
def noted() -> Iterator[list[tuple[str, str, float]]]:
    """A list that has the PictureNotes of the block, once it is done. No other warnings show: they are not for the user."""
    notes: list = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        yield notes
    notes += [w.message.args for w in warned if isinstance(w.message, PictureNote)]


class Unreadable(UserError):
    """Pictures of a dataset that cannot be read. faults: (row of the dataset, sentence, file) of each. The row is -1 where the
    disk or the permissions are at fault and not the picture; the file is "" where there is none."""

    def __init__(self, faults: Sequence[tuple[int, str, str]]):
        self.faults = faults
        sentences = [sentence for row, sentence, _ in faults if row < 0] or [f"{sentence}." for _, sentence, _ in faults]
        super().__init__("\n".join(sentences[:20] + [f"... and {len(sentences) - 20:,} more."] * (len(sentences) > 20)))

    def listed(self, script: Path, advice: str = "") -> UserError:
        """The same with a list of them all, which is a shell script that moves them aside. As it is where the pictures are not
        at fault, or the list cannot be written."""
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


def tell(notes: Iterable[tuple[str, str, float]]) -> None:
    """Print a line for each kind of note. notes: (file, what, amount); what may have {sum} and {min} of the amounts in it."""
    kinds = defaultdict(list)
    for file, what, amount in notes:
        kinds[what].append((file, amount))
    for what, found in kinds.items():
        files, amounts = zip(*found)
        these = f"{count(len(found), 'picture has', 'pictures have')} {what.format(sum=sum(amounts), min=min(amounts))}"
        print(f"note: {these}; e.g. {files[0]}")
