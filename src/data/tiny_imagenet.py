"""Tiny ImageNet: 200 classes of 500 pictures of 64x64 to train on, and 10,000 pictures for validation."""

import os
from pathlib import Path

from src.data.download import extract, fetch
from src.data.folder import MOVE_IT, Files, find_pictures, summary
from src.utils import UserError, reading

ARCHIVE = "tiny-imagenet-200.zip"
OFFICIAL = {"train": 100_000, "val": 10_000}  # pictures of the official set, in 200 classes


def archives(path: Path) -> list[Path]:
    """The zips beside the folder from which it may come."""
    return [zip_path for zip_path in (path.with_name(path.name + ".zip"), path.with_name(ARCHIVE)) if zip_path.is_file()]


def obtain_tiny_imagenet(path: str | os.PathLike, url: str, size: int = 0, md5: str = "") -> None:
    """Make the folder `path` exist: as it is, or from a zip beside it, or downloaded from `url` (see fetch)."""
    path = Path(os.path.abspath(path))
    with reading(path, f"Name a folder with --data_path; {ARCHIVE} beside it is unpacked to there."):
        if path.exists() and os.listdir(path):
            return
    archive = next(iter(archives(path)), path.with_name(ARCHIVE))
    if not archive.exists():
        print(f"{path} is not there: downloading {url}")
        fetch(url, archive, size, md5)
    print(f"unpacking {archive} to {path}")
    extract(archive, path, "wnids.txt")


class TinyImageNet(Files):
    """The extracted archive at `path`, or in its one sub-folder; split "train" or "val". Labels follow the order of wnids.txt.

    The class of a picture is the class folder that it lies in, or what val/val_annotations.txt says: a val that was sorted into
    class folders for another program, wholly or in part, reads the same. Raises UserError if something is missing.
    Notes what is passed over, and a set that is not the official one.
    """

    def __init__(self, path: str | os.PathLike, split: str):
        self.given = self.path = Path(os.path.abspath(path))
        with reading(self.path, MOVE_IT):
            if self.path.is_dir() and not (self.path / "wnids.txt").exists():
                inside = [folder for folder in self.path.iterdir() if (folder / "wnids.txt").is_file()]
                self.path = inside[0] if len(inside) == 1 else self.path
            class_ids = list(dict.fromkeys(self.read("wnids.txt").split()))
            if not class_ids or not (self.path / split).exists():
                raise self.incomplete(f"it has no {split}" if class_ids else "its wnids.txt is empty")
        label_of = {wnid: label for label, wnid in enumerate(class_ids)}
        found, passed_over = find_pictures(self.path / split)
        pairs = [(label_of[picture.parts[0]], picture.entry) for picture in found if picture.parts[0] in label_of]
        pairs.sort(key=lambda pair: (pair[0], pair[1].name))
        rest = {picture.entry.name: picture.entry for picture in found if picture.parts[0] not in label_of}
        if split == "val" and (rest or not pairs):
            have = {entry.name for _, entry in pairs}
            rows = [line.split() for line in self.read("val/val_annotations.txt").splitlines()]
            label_by_name = {row[0]: label_of[row[1]] for row in rows if len(row) > 1 and row[1] in label_of}
            if missing := sorted(label_by_name.keys() - have - rest.keys()):
                raise self.incomplete(f"{len(missing):,} of the pictures in val_annotations.txt are missing, e.g. {missing[0]}")
            chosen = {name: rest.pop(name) for name in sorted(rest) if name in label_by_name}
            pairs += [(label_by_name[name], entry) for name, entry in chosen.items() if name not in have]
        labels = [label for label, _ in pairs]
        if empty := sorted(set(label_of.values()) - set(labels)):
            example = class_ids[empty[0]]
            raise self.incomplete(f"{split} has no pictures for {len(empty)} of {len(class_ids)} classes, e.g. {example}")
        passed_over.pop(".txt", None)  # lists of boxes
        passed_over |= {"without a label": list(rest)} if rest else {}
        if passed_over:
            print(f"note: passed over in {self.path / split}: {summary(passed_over)}")
        if (len(pairs), len(class_ids)) != (OFFICIAL[split], 200):
            print(
                f"note: {self.path / split} has {len(pairs):,} pictures of {len(class_ids)} classes; "
                f"the official set has {OFFICIAL[split]:,} of 200"
            )
        super().__init__([entry for _, entry in pairs], labels, self.class_names(class_ids), class_ids)

    def incomplete(self, what: str) -> UserError:
        """Advice that never deletes, since the folder may hold other things, and that does not lead back to here."""
        again = "".join(f" Move {archive} elsewhere first, or it is unpacked again." for archive in archives(self.given))
        return UserError(
            f"{self.path} is not a whole Tiny ImageNet: {what}. Name another folder with --data_path; if it does not exist, "
            f"Tiny ImageNet is downloaded to there.{again}"
        )

    def read(self, name: str) -> str:
        with reading(self.path / name, "Fix its permissions, or name another folder with --data_path."):
            try:
                return (self.path / name).read_text(encoding="utf-8-sig")  # without the byte-order mark of Windows
            except FileNotFoundError:
                raise self.incomplete(f"it has no {name}") from None
            except UnicodeDecodeError:
                raise self.incomplete(f"{name} is not text in UTF-8") from None

    def class_names(self, class_ids: list[str]) -> list[str]:
        """`goldfish` from the line `n01443537<tab>goldfish, Carassius auratus`; the id if words.txt lacks it."""
        if not (self.path / "words.txt").exists():
            return class_ids
        words = dict(line.split("\t", 1) for line in self.read("words.txt").splitlines() if "\t" in line)
        return [words.get(wnid, wnid).split(",")[0].strip() for wnid in class_ids]
