"""Decoded images, and the batches that training draws from them: an index, a flip and a scale."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


@dataclass
class Images:
    """Decoded: images uint8 [N, 3, S, S] mapped from the file `path`, labels int64 [N], 0 to len(classes) - 1."""

    images: np.ndarray
    labels: torch.Tensor
    classes: list[str]
    class_ids: list[str]
    path: Path

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> "DeviceImages":
        return DeviceImages(self, device)


def normalise(u8: torch.Tensor, flip: torch.Tensor | None = None) -> torch.Tensor:
    """uint8 [B, 3, S, S] -> float32 in [-1, 1], mirrored left to right where flip (bool [B]) is true.

    Tensor operations alone, no wait for the device: it may sit inside a compiled step.
    """
    if flip is not None:
        every_bit = (flip.to(torch.uint8) * 255)[:, None, None, None]
        u8 = u8 ^ ((u8 ^ u8.flip(-1)) & every_bit)  # what where() means, at five times its speed on a CPU
    return u8.to(torch.float32) / 127.5 - 1


class DeviceImages:
    """A dataset on a device.

    resident: the whole array lives on the GPU, as `pixels` uint8 [N, 3, S, S]; otherwise pixels is None and
    batches are gathered from the memory-mapped file. `labels` int64 [N] are on the device either way.
    """

    def __init__(self, images: Images, device: torch.device | str):
        self.device = torch.device(device)
        self.source = np.asarray(images.images)  # without the memmap class, whose indexing is slower
        self.labels = images.labels.to(self.device)
        self.pixels: torch.Tensor | None = None
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if self.source.nbytes < free / 4:  # the rest is for weights, moments and activations
                self.pixels = upload(self.source, self.device)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def resident(self) -> bool:
        return self.pixels is not None

    def batch(self, rows: torch.Tensor, flip: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """rows: int64 [B] in [0, N), flip: bool [B] or None, on the CPU.

        Returns x_0 float32 [B, 3, S, S] in [-1, 1] and y int64 [B], on the device.
        """
        device_rows = rows.to(self.device, non_blocking=True)
        u8 = self.gather(rows) if self.pixels is None else self.pixels.index_select(0, device_rows)
        if flip is not None:
            flip = flip.to(self.device, non_blocking=True)
        return normalise(u8, flip), self.labels.index_select(0, device_rows)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Copy rows out of the mapped file to the device, as uint8: a quarter of the bytes of float32."""
        indices = rows.numpy()
        assert len(rows) == 0 or 0 <= indices.min() <= indices.max() < len(self.source), "a row outside the dataset"
        u8 = torch.empty(
            (len(rows), *self.source.shape[1:]), dtype=torch.uint8, pin_memory=self.device.type == "cuda"
        )  # pinned: the copy runs while the CPU goes on
        np.take(self.source, indices, axis=0, out=u8.numpy(), mode="clip")  # "raise" would buffer; checked above
        return u8.to(self.device, non_blocking=True)


def upload(source: np.ndarray, device: torch.device) -> torch.Tensor:
    """The mapped array on the GPU, by way of small copies: it need not fit into the machine's memory."""
    pixels = torch.empty(source.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(source), 4096):
        pixels[start : start + 4096] = torch.from_numpy(source[start : start + 4096].copy())
    return pixels
