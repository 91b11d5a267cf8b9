"""Any folder of pictures as a Dataset of (PIL image, label)."""

import errno
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Sequence, Set
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from src.data.decode import open_image
from src.utils import UserError, count, reading

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
# Name of a folder -> its split, in a tree that is split already.
SPLITS = dict(train="train", training="train", test="test", testing="test", val="val", valid="val", validation="val")
ONE_CLASS = "all"  # of pictures that lie in no sub-folder. Not the name of the folder, which may be renamed
READ = f"Pictures that are read end in {' '.join(SUFFIXES)}"
MOVE_IT = "Move it elsewhere to go on without it."


class Picture(NamedTuple):
    parts: tuple[str, ...]  # names of the folders and of the file, below the data folder
    entry: os.DirEntry

    @property
    def name(self) -> str:
        return "/".join(self.parts)

    @property
    def group(self) -> str:
        """The name of its class."""
        return self.parts[0] if len(self.parts) > 1 else ONE_CLASS


class Files(Dataset):
    """Pictures on disk: item i is (PIL image, label). Decoding errors are UserErrors that name the file."""

    def __init__(self, entries: Sequence[os.DirEntry], labels: list[int], classes: list[str], class_ids: list[str]):
        self.files, self.labels = [entry.path for entry in entries], labels
        self.classes, self.class_ids = classes, class_ids
        # differs when a file is added, removed, renamed or written to; no file is read: 100,000 take half a second
        lines = [ascii([classes, class_ids])]
        with reading("a picture", MOVE_IT):  # the error names it
            for entry, label in zip(entries, labels):
                status = entry.stat()
                lines.append(f"{label} {entry.name} {status.st_size} {status.st_mtime_ns}")
        self.fingerprint = hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return open_image(self.files[index]), self.labels[index]


class ImageFolder(Files):
    """Any folder of pictures, read recursively; split "train" or "val".

    The class is the sub-folder of the first level. About one picture in 20, at least 1 and at most 2,000, is held out as "val":
    spread over the classes, chosen by a hash of the names. A folder of nothing but train, val and test is split already: its
    classes lie one level down, test is left out, and pictures are held out of train only if there is no val.
    Prints, with "train", what is passed over. Raises UserError for fewer than 2 pictures, and for a folder that cannot be read.
    """

    def __init__(self, path: str | os.PathLike, split: str):
        path = Path(path)
        found, passed_over = find_pictures(path)
        train, val, root = found, [], path
        tops = {picture.parts[0]: SPLITS.get(picture.parts[0].lower()) for picture in found if len(picture.parts) > 1}
        is_split = "train" in tops.values() and None not in tops.values() and all(len(picture.parts) > 1 for picture in found)
        if is_split:
            sides = defaultdict(list)
            for picture in found:
                sides[tops[picture.parts[0]]].append(Picture(picture.parts[1:], picture.entry))
            train, val, root = sides["train"], sides["val"], path / next(top for top in tops if tops[top] == "train")
            passed_over |= {"in test": [picture.name for picture in sides["test"]]} if sides["test"] else {}
        classes = sorted({picture.group for picture in train})
        if split == "train" and is_split:
            print(f"note: {path} is split already, into {', '.join(tops)}; the classes are the folders in there")
        if split == "train" and passed_over:
            print(f"note: passed over in {path}: {summary(passed_over)}. {READ}; save others as JPEG or PNG")
        if len(train) + len(val) < 2:
            there = f"Found there besides: {summary(passed_over)}. " if passed_over else ""
            raise UserError(f"{path.absolute()} holds {count(len(train), 'picture')}, at least 2 are needed. {there}{READ}.")
        strange = sorted({picture.group for picture in val} - set(classes))
        if strange:
            what = f"its class {strange[0]!r} has validation pictures and no training pictures"
            advice = f"Give both the same folders, or hold out some of the training pictures with --data_path {root}"
            raise UserError(f"{path} is split already, but {what}. {advice}")
        if not val:
            train, val = hold_out(train, classes)
        chosen = sorted(train if split == "train" else val, key=lambda picture: (picture.group, picture.entry.path))
        label_of = {name: label for label, name in enumerate(classes)}
        super().__init__([picture.entry for picture in chosen], [label_of[p.group] for p in chosen], classes, classes)


def hold_out(pictures: list[Picture], classes: list[str]) -> tuple[list[Picture], list[Picture]]:
    """(for training, held out)"""
    groups = defaultdict(list)
    for picture in sorted(pictures, key=lambda picture: hashlib.sha256(os.fsencode(picture.name)).digest()):
        groups[picture.group].append(picture)
    held_out, seen = min(max(round(len(pictures) / 20), 1), 2000), 0
    val: list[Picture] = []
    for group in [groups[name] for name in classes]:
        seen += len(group)
        # the share of this class, rounded so that the shares add up to held_out; the only picture of a class is kept
        val += group[: min(held_out * seen // len(pictures) - len(val), len(group) - 1)]
    val = val or max(groups.values(), key=len)[:1]
    chosen = set(val)
    return [picture for picture in pictures if picture not in chosen], val


def find_pictures(path: Path) -> tuple[list[Picture], dict[str, list[str]]]:
    """All pictures below a folder, and {kind: names} of what is passed over. A folder that links lead to twice is read once.
    Raises UserError for one that cannot be read: its pictures would be missing."""
    found: list[Picture] = []
    passed_over: dict[str, list[str]] = defaultdict(list)
    seen: set[str] = set()
    to_do: list[tuple[str, ...]] = [()]
    while to_do:
        parts = to_do.pop()
        folder = path.joinpath(*parts)
        with reading(folder.absolute(), MOVE_IT if parts else "Name the folder of your pictures with --data_path."):
            with os.scandir(folder) as scan:
                entries = {entry.name: entry for entry in sorted(scan, key=lambda entry: entry.name)}
            kinds = {name: kind_of(entry) for name, entry in entries.items()}
            real = os.path.realpath(folder)
        if real in seen:
            passed_over["read already by another link"].append("/".join(parts))
        elif parts and is_own(parts[-1], entries.keys()):
            passed_over["made by this program"].append("/".join(parts))
        else:
            found += [Picture((*parts, name), entries[name]) for name, kind in kinds.items() if kind == "picture"]
            to_do += [(*parts, name) for name, kind in reversed(kinds.items()) if kind == "folder"]
            for name, kind in kinds.items():
                if kind not in ("picture", "folder"):
                    passed_over[kind].append("/".join((*parts, name)))
        seen.add(real)
    return found, passed_over


def is_own(folder: str, names: Set[str]) -> bool:
    """Whether a folder holds pictures that this program made: by what sample.py, train.py and evaluate.py write there."""
    signs = ({"settings.json", "images"}, {"labels.csv", "grid.png"}, {"interpolation.png"})
    pattern = re.compile(r"samples/epoch_\d{3,}\.png|.+-\d{8}-\d{6}(-\d+)?-nearest-\w+\.png")
    return any(sign <= names for sign in signs) or any(pattern.fullmatch(f"{folder}/{name}") for name in names)


def kind_of(entry: os.DirEntry) -> str:
    """ "folder", "picture", or why it is passed over. Hidden files are strays, such as the ._x.jpg of a Mac. Raises OSError."""
    if entry.name.startswith(".") or entry.name == "__MACOSX":
        return "hidden"
    if entry.is_symlink():
        try:
            os.stat(entry.path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return "dangling"
            raise
    if entry.name.lower().endswith(SUFFIXES) and entry.is_file():
        return "picture"
    return "folder" if entry.is_dir() else os.path.splitext(entry.name)[1].lower() or "without a suffix"


def summary(passed_over: dict[str, list[str]]) -> str:
    """3 .heic (IMG_1.HEIC, ...), 1 hidden (.x.png)"""
    kinds = sorted(passed_over.items(), key=lambda kind: -len(kind[1]))
    return ", ".join(f"{len(names):,} {kind} ({names[0]}{', ...' if len(names) > 1 else ''})" for kind, names in kinds)
