"""Tiny ImageNet: 200 classes of 500 pictures of 64x64 to train on, and 10,000 pictures for validation."""

import os
from pathlib import Path

from src.data.archive import Published
from src.data.folder import Files, find_pictures, summary
from src.utils import count

TINY_IMAGENET = Published("Tiny ImageNet", archive="tiny-imagenet-200.zip", holds="wnids.txt", folder="tiny-imagenet-200")
OFFICIAL = {"train": 100_000, "val": 10_000}  # pictures of the official set, in 200 classes


class TinyImageNet(Files):
    """The extracted archive at `path`, or in its one sub-folder; split "train" or "val". Labels follow the order of wnids.txt.

    The class of a picture is the class folder that it lies in, or what val/val_annotations.txt says: a val that was sorted into
    class folders for another program, wholly or in part, reads the same. Raises UserError if something is missing.
    Notes what is passed over, and a set that is not the official one.
    """

    def __init__(self, path: str | os.PathLike, split: str):
        root, words = TINY_IMAGENET.open(path)
        class_ids = list(dict.fromkeys(words))
        if not class_ids or not (root / split).exists():
            raise TINY_IMAGENET.incomplete(root, f"it has no {split}" if class_ids else "its wnids.txt is empty")
        label_of = {wnid: label for label, wnid in enumerate(class_ids)}
        found, passed_over = find_pictures(root / split)
        pairs = [(label_of[picture.parts[0]], picture.entry) for picture in found if picture.parts[0] in label_of]
        pairs.sort(key=lambda pair: (pair[0], pair[1].name))
        rest = {picture.entry.name: picture.entry for picture in found if picture.parts[0] not in label_of}
        if split == "val" and (rest or not pairs):
            have = {entry.name for _, entry in pairs}
            rows = [line.split() for line in TINY_IMAGENET.read(root, "val/val_annotations.txt").splitlines()]
            label_by_name = {row[0]: label_of[row[1]] for row in rows if len(row) > 1 and row[1] in label_of}
            aside = {Path(name).stem for name in passed_over.get(".damaged", [])}  # by the list of damaged pictures
            if missing := sorted(label_by_name.keys() - have - rest.keys() - aside):
                lacks = f"{count(len(missing), 'picture')} of val_annotations.txt"
                raise TINY_IMAGENET.incomplete(root, f"it lacks {lacks}, e.g. {missing[0]}")
            chosen = {name: rest.pop(name) for name in sorted(rest) if name in label_by_name}
            pairs += [(label_by_name[name], entry) for name, entry in chosen.items() if name not in have]
        labels = [label for label, _ in pairs]
        if empty := sorted(set(label_of.values()) - set(labels)):
            of = f"{len(empty)} of {count(len(class_ids), 'class', 'classes')}"
            raise TINY_IMAGENET.incomplete(root, f"{split} has no pictures for {of}, e.g. {class_ids[empty[0]]}")
        passed_over.pop(".txt", None)  # lists of boxes
        passed_over |= {"without a label": list(rest)} if rest else {}
        if passed_over:
            print(f"note: passed over in {root / split}: {summary(passed_over)}")
        if (len(pairs), len(class_ids)) != (OFFICIAL[split], 200):
            size = f"{count(len(pairs), 'picture')} of {count(len(class_ids), 'class', 'classes')}"
            print(f"note: {root / split} has {size}; the official set has {OFFICIAL[split]:,} of 200")
        lines = TINY_IMAGENET.read(root, "words.txt").splitlines() if (root / "words.txt").exists() else []
        names = dict(line.split("\t", 1) for line in lines if "\t" in line)  # "n01443537": "goldfish, Carassius auratus"
        classes = [names.get(wnid, wnid).split(",")[0].strip() for wnid in class_ids]
        super().__init__([entry for _, entry in pairs], labels, classes, class_ids)
