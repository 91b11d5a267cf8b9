"""Decoded images: all of a cache file, or those of some classes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass
class Images:
    """Decoded images: image i is images[i], uint8 [C, S, S].

    file: uint8 [M, C, S, S], all of the file `path`, mapped.   rows: int64 [N], which of them are these; all, if not given.
    labels: int64 [N], in [0, len(classes)).
    skipped: damaged pictures that the file leaves out.
    fingerprint: 16 hex digits that follow from the decoded pixels, the labels and their order, and cost nothing at a start.
        Moving, renaming or copying the data changes nothing. It notices an image that was added, removed, edited or put
        into another class, and another image size. It does not notice new names that keep the order, nor bytes that
        decode to the same pixels. Another version of Pillow may decode a JPEG to slightly different pixels.
    """

    file: np.ndarray
    labels: torch.Tensor
    classes: list[str]
    class_ids: list[str]
    path: Path
    fingerprint: str = ""
    rows: Any = None
    skipped: int = 0

    def __post_init__(self) -> None:
        if self.rows is None:
            self.rows = np.arange(len(self.file))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        """A copy of image number `index`, or of several: uint8 [K, C, S, S] for a slice or an array of numbers."""
        return self.file[self.rows[index]]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self.file.shape[1:])

    def of_classes(self, labels: Sequence[int]) -> "Images":
        """The images of these classes alone, numbered from 0 in this order. They stay where they are in the file."""
        if list(labels) == list(range(len(self.classes))):
            return self
        number = torch.full((len(self.classes),), -1)
        number[list(labels)] = torch.arange(len(labels))
        is_chosen = number[self.labels] >= 0
        digest = hashlib.sha256(f"{self.fingerprint} {list(labels)}".encode()).hexdigest()[:16]
        classes, ids = ([names[label] for label in labels] for names in (self.classes, self.class_ids))
        rows = self.rows[is_chosen.numpy()]
        return Images(self.file, number[self.labels[is_chosen]], classes, ids, self.path, digest, rows)
