"""CIFAR-10 in its binary version: 50,000 pictures of 32x32 in ten classes to train on, and 10,000 for validation."""

import hashlib
import os

import numpy as np
from torch.utils.data import Dataset

from src.data.archive import Published
from src.data.folder import MOVE_IT
from src.utils import count, reading

CIFAR_10 = Published("CIFAR-10", "cifar-10-binary.tar.gz", holds="batches.meta.txt", folder="cifar-10-batches-bin")
FILES = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "val": ["test_batch.bin"]}
RECORD = 1 + 3 * 32 * 32  # bytes: the label, then the picture as [3, 32, 32]
OFFICIAL = 10_000  # pictures in each file


class CIFAR10(Dataset):
    """The extracted archive at `path`, or in its one sub-folder: item i is (uint8 [32, 32, 3], label).

    split: "train" is the five training files, "val" the test file. The files have no checksums; all six hold as many pictures,
    which gives away one that is truncated. Raises UserError if something is missing or damaged.
    """

    def __init__(self, path: str | os.PathLike, split: str):
        root, self.classes = CIFAR_10.open(path)
        sizes = {}
        with reading(root, MOVE_IT):
            for name in FILES["train"] + FILES["val"]:
                if not (root / name).is_file():
                    raise CIFAR_10.incomplete(root, f"it has no {name}")
                sizes[name] = (root / name).stat().st_size
        whole = max(1, -(-max(sizes.values()) // RECORD)) * RECORD
        for name, size in sizes.items():
            if size != whole:
                raise CIFAR_10.incomplete(root, f"{name} has {count(size, 'byte')}, expected {whole:,}")
        if whole != OFFICIAL * RECORD:
            found = count(whole // RECORD, "picture")
            print(f"note: each file in {root} has {found}; each of the official set has {OFFICIAL:,}")
        with reading(root, MOVE_IT):
            self.records = np.concatenate([np.fromfile(root / name, np.uint8) for name in FILES[split]]).reshape(-1, RECORD)
        labels = self.records[:, 0]
        if labels.max() >= len(self.classes):
            file, at = divmod(int(labels.argmax()), whole // RECORD)
            what = f"picture {at:,} of {FILES[split][file]} has label {labels.max()}, and {CIFAR_10.holds} has "
            raise CIFAR_10.incomplete(root, what + count(len(self.classes), "class", "classes"))
        state = [(name, size, (root / name).stat().st_mtime_ns) for name, size in sizes.items()]
        self.fingerprint = hashlib.sha256(f"{self.classes} {state}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        label, pixels = self.records[index, 0], self.records[index, 1:]
        return pixels.reshape(3, 32, 32).transpose(1, 2, 0), int(label)
