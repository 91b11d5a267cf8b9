"""Sets of pictures to compare: a split of a checkpoint's dataset, a folder, an npz file, or what was just drawn."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from src.data.decode import to_uint8
from src.data.folder import READ, Files, find_pictures, summary
from src.data.workers import Task, Unreadable, decoded
from src.runtime.folders import BESIDE
from src.utils import UserError, reading, reason, stand_in

SHEETS = {"grid.png", "interpolation.png", "denoising.gif"}  # what it wrote among its pictures before it had that folder


@dataclass
class PictureSet:
    """pixels: uint8 [N, C, S, S], an array, or the Images of a dataset. name: where they come from, for people."""

    name: str
    pixels: Any

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def size(self) -> str:
        return f"{self.pixels.shape[3]}x{self.pixels.shape[2]}"

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that follow from the pixels alone."""
        digest = hashlib.sha256(str(self.pixels.shape).encode())
        for start in range(0, len(self.pixels), 4096):
            digest.update(np.ascontiguousarray(self.pixels[start : start + 4096]).data)
        return digest.hexdigest()[:16]

    def mirrored(self) -> "PictureSet":
        return PictureSet(self.name, np.ascontiguousarray(self.pixels[..., ::-1]))

    def with_channels(self, channels: int) -> "PictureSet":
        """The same in colour (3) or in grey (1), as src/data/decode.py makes it."""
        if channels == self.pixels.shape[1]:
            return self
        pixels = [to_uint8(picture.transpose(1, 2, 0), 0, channels) for picture in self.pixels[:]]
        return PictureSet(self.name, np.stack(pixels))

    def about(self) -> dict[str, object]:
        return {"from": self.name, "count": len(self), "size": self.size, "fingerprint": self.fingerprint}


def read_set(path: Path, flag: str, cache: Path = Path("./data/cache")) -> PictureSet:
    """A folder of pictures, read recursively, or an .npz. flag: which flag named it.   cache: the folder for a list of damaged
    pictures. Raises UserError."""
    with reading(path, f"Choose another with {flag}."):
        if path.is_dir():
            return read_folder(path, flag, cache)
        if path.is_file() and path.suffix.lower() == ".npz":
            return read_npz(path, flag)
        problem = "is a file, but no .npz" if path.exists() else "is not there"
    raise UserError(f"{flag}: {path} {problem}; expected train, val, a folder of pictures or an .npz file.")


def read_folder(path: Path, flag: str, cache: Path) -> PictureSet:
    """All pictures as they are, without resizing: another size is another statistic. Of a folder that sample.py wrote, the
    pictures in its folder images."""
    if (path / "images").is_dir() and any((path / name).exists() for name in ("settings.json", *BESIDE)):
        path = path / "images"
    found, passed_over = find_pictures(path)
    files = [picture.entry for picture in found if picture.entry.name not in SHEETS]
    if sheets := [picture.entry.name for picture in found if picture.entry.name in SHEETS]:
        print(f"note: {', '.join(sheets)} in {path} left out")
    if not files:
        raise UserError(f"{flag}: {path} holds no pictures, only {summary(passed_over) or 'nothing'}. {READ}.")
    task = Task(Files(files, [0] * len(files), [], []), 3, 0, range(len(files)))
    try:
        for i, (picture, _) in enumerate(decoded(task, num_workers=0)):
            if i == 0:
                pixels = np.empty((len(files), *picture.shape), dtype=np.uint8)
            if picture.shape != pixels.shape[1:]:
                (h, w), (height, width) = picture.shape[1:], pixels.shape[2:]
                sizes = f"{files[i].path} is {w}x{h}, the first picture {width}x{height}"
                raise UserError(f"{flag}: {sizes}; all must have one size. Move it away, or resize them all.")
            pixels[i] = picture
    except Unreadable as error:
        raise error.listed(cache / "damaged.sh") from None
    return PictureSet(str(path), pixels)


def read_npz(path: Path, flag: str) -> PictureSet:
    """arr_0, uint8 [N, H, W, 3] or [N, H, W, 1]: what `sample.py --npz` and `evaluate.py --npz` write."""
    expected = "expected arr_0, uint8 [N, H, W, 3], as 'sample.py --npz' writes it"
    try:
        with np.load(path, allow_pickle=False) as archive:
            names, array = list(archive), archive.get("arr_0")
    except Exception as error:  # as many kinds as there are ways to damage a file
        raise UserError(f"{flag}: {path} cannot be read as an .npz ({stand_in(path) or reason(error)}); {expected}.") from None
    if array is None:
        raise UserError(f"{flag}: {path} holds {', '.join(names) or 'nothing'}; {expected}.")
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3) or not array.size:
        raise UserError(f"{flag}: {path} holds arr_0, {array.dtype} {list(array.shape)}; {expected}.")
    return PictureSet(str(path), np.ascontiguousarray(array.transpose(0, 3, 1, 2)))
