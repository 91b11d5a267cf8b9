"""From one picture, whatever its kind, to uint8 RGB [3, S, S]."""

import io
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from src.utils import UserError

ORIENTATION = 0x0112  # the EXIF tag in which a camera says how it was held; 1 is upright


def open_image(path: str | os.PathLike) -> Image.Image:
    """Read a picture's bytes and header; its pixels are decoded on use. Raises UserError that names the file."""
    try:
        # all bytes at once: no file stays open, and a disk that fails is told apart from a file that is damaged
        data = io.BytesIO(Path(path).read_bytes())
    except OSError as error:
        raise UserError(
            f"Cannot read {path}: {error.strerror or error}. Was it moved or deleted since the start? "
            f"Put it back or mend its permissions."
        ) from error
    with decoding(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large is fine; too large is an error
        image = Image.open(data)
    image.filename = str(path)
    return image


class decoding:
    """Turn what a damaged picture raises into a UserError that names it: `with decoding(name): ...`."""

    def __init__(self, name: str | os.PathLike):
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, Image.DecompressionBombError):
            raise UserError(
                f"{self.name} has too many pixels ({error}). "
                f"Make it smaller, or delete it or move it elsewhere to go on without it."
            ) from error
        if isinstance(error, Image.UnidentifiedImageError):
            raise UserError(
                f"{self.name} is not a picture, or is damaged at its start. Delete it or move it elsewhere to go on without it."
            ) from error
        if isinstance(error, Exception):  # Pillow's decoders raise OSError, SyntaxError, struct.error, IndexError, ...
            raise UserError(
                f"{self.name} cannot be decoded ({error}). Delete it or move it elsewhere to go on without it."
            ) from error


def to_uint8(image: Image.Image | np.ndarray | torch.Tensor, size: int) -> np.ndarray:
    """Upright, on white where transparent, cut to the central square, scaled: uint8 [3, size, size], RGB.

    image: a PIL image of any mode, a uint8 array [H, W, 3], [H, W, 1] or [H, W], or a tensor [C, H, W]
    with C 1 or 3, uint8 or float in [0, 1]. Nothing is resampled where the size already fits.
    Raises UserError that names the file where a PIL image cannot be decoded, ValueError for other arrays.
    """
    if not isinstance(image, Image.Image):
        return to_uint8(from_array(image), size)
    with decoding(getattr(image, "filename", "") or "A picture of the dataset"):
        image.draft(None, (2 * size, 2 * size))  # a JPEG decodes at 1/2, 1/4 or 1/8 for a fraction of the time
        image = to_rgb(upright(image))
        width, height = image.size
        if (width, height) != (size, size):
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            image = image.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side), reducing_gap=3.0)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def upright(image: Image.Image) -> Image.Image:
    """Undo the rotation that the camera noted. A damaged note counts as none."""
    try:
        turned = image.getexif().get(ORIENTATION, 1) != 1
    except Exception:  # as many kinds as there are ways to damage EXIF; the pixels may still be whole
        return image
    return ImageOps.exif_transpose(image) if turned else image


def to_rgb(image: Image.Image) -> Image.Image:
    """Mode RGB from any mode: the first frame, 16 bits scaled to 8 rather than clipped, transparency on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return to_8_bits(image).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        if image.mode in ("La", "RGBa"):
            image = image.convert("LA" if image.mode == "La" else "RGBA")  # undo the premultiplied alpha
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def to_8_bits(image: Image.Image) -> Image.Image:
    """Greyscale of 16 bits, 32 bits or float as 8 bits. Pillow itself would clip at 255."""
    grey = np.nan_to_num(np.asarray(image).astype(np.float64))
    low, high = grey.min(), grey.max()
    if image.mode != "F" and low >= 0 and high <= 65535:
        low, high = 0, 65535
    elif low >= 0 and high <= 1:
        low, high = 0, 1
    # anything else has no agreed white: from its darkest to its brightest
    return Image.fromarray(np.round((grey - low) * (255 / max(high - low, 1e-12))).astype(np.uint8))


def from_array(image: np.ndarray | torch.Tensor) -> Image.Image:
    """A PIL image from what a Dataset may yield instead; see to_uint8."""
    pixels = image
    if isinstance(image, torch.Tensor):
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise ValueError(f"the dataset yields a tensor of shape {list(image.shape)}, expected [3, H, W]")
        if image.is_floating_point():
            if image.min() < 0 or image.max() > 1:
                raise ValueError(
                    f"the dataset yields a float tensor from {image.min():.3g} to {image.max():.3g}, "
                    f"expected [0, 1]: leave out its normalisation, training does that"
                )
            image = (image * 255).round().to(torch.uint8)
        pixels = image.permute(1, 2, 0).numpy()
    pixels = np.asarray(pixels)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3):
        raise ValueError(f"the dataset yields {pixels.dtype} {list(pixels.shape)}, expected uint8 [H, W, 3]")
    return Image.fromarray(np.ascontiguousarray(pixels))
