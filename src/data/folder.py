"""Folders of pictures as Datasets of (PIL image, label): Tiny ImageNet, and anybody's own."""

import hashlib
import os
from collections import Counter
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

from src.data.decode import open_image
from src.data.download import extract, fetch
from src.utils import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
UNREAD = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".jfif", ".psd", ".svg", ".dng", ".cr2", ".nef", ".arw")  # said, not read
ARCHIVE = "tiny-imagenet-200.zip"
OFFICIAL = {"train": 100_000, "val": 10_000}  # pictures of Tiny ImageNet, in 200 classes


class Files(Dataset):
    """Pictures on disk: item i is (PIL image, label). Decoding errors are UserErrors that name the file."""

    def __init__(self, files: list[str], labels: list[int], classes: list[str], class_ids: list[str], fingerprint: str):
        self.files, self.labels = files, labels
        self.classes, self.class_ids = classes, class_ids
        self.fingerprint = fingerprint  # differs when a file is added, removed, renamed or written to

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return open_image(self.files[index]), self.labels[index]


class TinyImageNet(Files):
    """The extracted archive at `path`; split "train" or "val". Labels follow the order of wnids.txt.

    Validation labels come from val/val_annotations.txt, or from sub-folders in copies that were rearranged so.
    Raises UserError where files are missing; prints a note where all is there but less than the official set.
    """

    def __init__(self, path: str | os.PathLike, split: str):
        path = Path(path)
        self.path = path
        class_ids = self.read("wnids.txt").split()
        if not class_ids:
            raise UserError(f"{path / 'wnids.txt'} is empty. {self.mend()}")
        label_of = {wnid: label for label, wnid in enumerate(class_ids)}

        root = path / split
        if split == "train" or (root / class_ids[0]).is_dir():
            found = [(entry, label) for wnid, label in label_of.items() for entry in self.class_files(root / wnid)]
        else:
            found = self.annotated(root, label_of)
        counts = Counter(label for _, label in found)
        if len(counts) < len(class_ids):
            empty = [wnid for wnid, label in label_of.items() if not counts[label]]
            raise UserError(
                f"{root} has no pictures for {len(empty)} of {len(class_ids)} classes, e.g. {empty[0]}. {self.mend()}"
            )
        if (len(found), len(class_ids)) != (OFFICIAL[split], 200):
            print(
                f"note: {root} has {len(found):,} pictures of {len(class_ids)} classes; "
                f"the official set has {OFFICIAL[split]:,} of 200"
            )

        names = self.class_names(class_ids)
        super().__init__(
            [entry.path for entry, _ in found],
            [label for _, label in found],
            names,
            class_ids,
            fingerprint([names, class_ids], found),
        )

    def mend(self) -> str:
        return (
            f"Delete the folder {self.path} and run the same command again to unpack or download it afresh, "
            f"or name another with DATA_PATH / --data_path."
        )

    def read(self, name: str) -> str:
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise UserError(
                f"{self.path} is not a whole Tiny ImageNet: it has no readable {name}, "
                f"only {what_is_in(self.path)}. {self.mend()}"
            ) from None

    def class_files(self, folder: Path) -> list[os.DirEntry]:
        return pictures(folder / "images") or pictures(folder)

    def annotated(self, root: Path, label_of: dict[str, int]) -> list[tuple[os.DirEntry, int]]:
        """Pairs of val/images/NAME and label, for every line `NAME wnid x y x y` of val_annotations.txt."""
        rows = [line.split() for line in self.read(f"{root.name}/val_annotations.txt").splitlines()]
        wnid_of = {row[0]: row[1] for row in rows if len(row) > 1 and row[1] in label_of}
        found = [(entry, label_of[wnid_of[entry.name]]) for entry in pictures(root / "images") if entry.name in wnid_of]
        if len(found) < len(wnid_of):
            missing = sorted(set(wnid_of) - {entry.name for entry, _ in found})
            raise UserError(
                f"{root / 'images'} lacks {len(missing):,} of the {len(wnid_of):,} pictures named in "
                f"val_annotations.txt, e.g. {missing[0]}. {self.mend()}"
            )
        return found

    def class_names(self, class_ids: list[str]) -> list[str]:
        """`goldfish` from the line `n01443537<tab>goldfish, Carassius auratus`; the id where words.txt lacks it."""
        if not (self.path / "words.txt").is_file():
            return class_ids
        words = dict(line.split("\t", 1) for line in self.read("words.txt").splitlines() if "\t" in line)
        return [words.get(wnid, wnid).split(",")[0].strip() for wnid in class_ids]


class ImageFolder(Files):
    """Any folder of pictures, read recursively; split "train" or "val".

    The class is the first-level sub-folder; without sub-folders there is one class. About one picture in 20,
    at least 1 and at most 2,000, is held out as "val": spread over the classes, chosen by a hash of the names,
    so that it hangs on nothing but the names. Raises UserError for fewer than 2 pictures.
    """

    def __init__(self, path: str | os.PathLike, split: str):
        path = Path(path)
        if not path.is_dir():
            raise UserError(
                f"There is no folder {path.absolute()}. Name the folder of your pictures with DATA_PATH / --data_path."
            )
        groups: dict[str, list[os.DirEntry]] = {}
        for folder in folders_below(path):
            group = folder.relative_to(path).parts[:1] or (path.absolute().name,)
            groups.setdefault(group[0], []).extend(pictures(folder))
        groups = {name: entries for name, entries in sorted(groups.items()) if entries}
        total = sum(map(len, groups.values()))
        if total < 2:
            raise UserError(
                f"{path.absolute()} holds {total} pictures, at least 2 are needed. Found there: "
                f"{what_is_in(path)}. Pictures end in {' '.join(SUFFIXES)}."
            )

        unread = [name for folder in folders_below(path) for name in os.listdir(folder) if name.lower().endswith(UNREAD)]
        if unread and split == "train":
            print(f"note: {len(unread):,} files such as {unread[0]} are left out; save them as JPEG or PNG to train on them")

        held_out = min(max(round(total / 20), 1), 2000)
        found, seen = [], 0
        for label, entries in enumerate(groups.values()):
            by_hash = sorted(entries, key=lambda entry: sha(os.path.relpath(entry.path, path).replace(os.sep, "/")))
            # this class's share, rounded so that the shares add up to held_out
            share = held_out * (seen + len(entries)) // total - held_out * seen // total
            seen += len(entries)
            chosen = by_hash[:share] if split == "val" else by_hash[share:]
            found += [(entry, label) for entry in sorted(chosen, key=lambda entry: entry.path)]
        super().__init__(
            [entry.path for entry, _ in found],
            [label for _, label in found],
            list(groups),
            list(groups),
            fingerprint(list(groups), found),
        )


def obtain_tiny_imagenet(path: str | os.PathLike, url: str, size: int = 0, md5: str = "") -> None:
    """Make the folder `path` exist: as it is, or from a zip beside it, or downloaded from `url` (see fetch)."""
    path = Path(path)
    if path.is_dir():
        return
    beside = [path.with_name(path.name + ".zip"), path.with_name(ARCHIVE)]
    archive = next((zip_path for zip_path in beside if zip_path.is_file()), None)
    if archive is None:
        archive = path.with_name(ARCHIVE)
        print(f"{path} is not there: downloading {url}")
        fetch(url, archive, size, md5)
    print(f"unpacking {archive} to {path}")
    extract(archive, path, "wnids.txt")


def pictures(folder: Path) -> list[os.DirEntry]:
    """The picture files of one folder by name; [] if there is no such folder. Hidden files are strays (._x.JPEG)."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(
            (
                entry
                for entry in entries
                if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith(".") and entry.is_file()
            ),
            key=lambda entry: entry.name,
        )


def folders_below(path: Path) -> list[Path]:
    """`path` and its sub-folders, each once even where links run in a circle; hidden ones are strays."""
    found, seen = [], set()
    for root, names, _ in os.walk(path, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(name for name in names if not name.startswith(".") and name != "__MACOSX")
        found.append(Path(root))
    return found


def fingerprint(about: list, found: list[tuple[os.DirEntry, int]]) -> str:
    """A hash of names, labels, sizes and times of change; reads no file. 100,000 files take half a second."""
    lines = [str(about)]
    for entry, label in found:
        status = entry.stat()
        lines.append(f"{label} {entry.name} {status.st_size} {status.st_mtime_ns}")
    return sha("\n".join(lines))


def sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def what_is_in(path: Path) -> str:
    """'12 .txt, 3 folders': what a folder holds, for error messages."""
    if not path.is_dir():
        return "no such folder"
    kinds = Counter(
        "folders" if entry.is_dir() else Path(entry.name).suffix.lower() or "files without a suffix" for entry in path.iterdir()
    )
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(6)) or "nothing"
