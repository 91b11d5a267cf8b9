"""Entries of DATASETS for datasets of torchvision, which download and check themselves."""

import os
from collections.abc import Callable
from typing import Any

from src.utils import UserError


def from_torchvision(name: str) -> Callable[[str | os.PathLike, str, int], Any]:
    """For torchvision.datasets.NAME, one of those that take (root, train, download); "val" is its test set.
    The entry raises UserError: no network, or files that are damaged."""

    def open_dataset(path: str | os.PathLike, split: str, image_size: int) -> Any:
        from torchvision import datasets  # here, because this import takes longer than many a drawing

        try:
            return getattr(datasets, name)(os.fspath(path), train=split == "train", download=True)
        except (OSError, RuntimeError, ValueError, AssertionError) as error:  # as torchvision has them
            why = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            advice = "Type the same command again with a network; if files there are damaged, move them elsewhere first."
            raise UserError(f"torchvision cannot download {name} to {path}, or read it there: {why}. {advice}") from error

    return open_dataset
