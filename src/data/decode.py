"""From one picture of any kind to uint8 [C, S, S] in RGB or grey. Damaged files are named; guesses are noted."""

import contextlib
import functools
import io
import os
import re
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms
from PIL.Image import Transpose

from src.utils import UserError, reading, reason, stand_in

TURNS = {  # what a camera says about how it was held -> what makes the picture upright; 1 is upright
    **{2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE},
    **{6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90},
}
LEVELS = {255: 8, 1023: 10, 4095: 12, 16383: 14, 65535: 16}  # white -> bits of a sample
OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}  # of two bytes, in Pillow's raw modes


class PictureNote(UserWarning):
    """The picture is read, but something in it was guessed or ignored. args: the name of the file, what, an amount for it."""


class Damaged(UserError):
    """A picture that cannot be decoded. file: its path, or what stands for it."""

    def __init__(self, sentence: str, file: str):
        super().__init__(sentence)
        self.file = file


@contextlib.contextmanager
def decoding(name: str | os.PathLike) -> Iterator[None]:
    """Turn what a damaged picture raises (OSError, SyntaxError, ...) into a Damaged that names it."""
    try:
        yield
    except Exception as error:  # as many kinds as there are ways to damage a picture
        what = f"cannot be decoded ({reason(error)})"
        if isinstance(error, struct.error):
            what = "is cut short"
        if isinstance(error, Image.DecompressionBombError):
            what = f"has too many pixels ({error})"
        if isinstance(error, Image.UnidentifiedImageError):
            what = stand_in(name) or "is not a picture of a kind that can be read, or is damaged at its start"
        raise Damaged(f"{name} {what}", str(name)) from error


def name_of(image: Image.Image) -> str:
    return str(getattr(image, "origin", "") or getattr(image, "filename", "") or "A picture of the dataset")


def note(image: Image.Image, what: str, amount: float = 0) -> None:
    warnings.warn(PictureNote(name_of(image), what, amount), stacklevel=2)


def open_image(path: str | os.PathLike) -> Image.Image:
    """Read a picture's bytes and header. The pixels are decoded on use.

    The checksums that a format has are verified: those of all chunks of a PNG and of deflated strips of a TIFF. Other formats
    have none: a flipped bit that still decodes is not noticed there. Raises UserError that names the file.
    """
    with reading(path, "Put it back if it was moved or deleted since the start."):
        data = Path(path).read_bytes()  # all at once: a disk that fails is not taken for a damaged file
    with decoding(path):
        image = Image.open(io.BytesIO(data))
        if image.format in ("PNG", "TIFF"):
            (check_png if image.format == "PNG" else check_tiff)(image, data)
    image.origin = str(path)  # type: ignore[attr-defined]  # Pillow would open a `filename` a second time
    return image


def check_png(image: Image.Image, data: bytes) -> None:
    """Compare every chunk up to IEND with its checksum. Pillow skips the chunks that hold the pixels."""
    at, name = 8, b""
    while name != b"IEND":
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        (checksum,) = struct.unpack_from(">I", data, end)  # struct.error: the file is truncated
        if zlib.crc32(memoryview(data)[at + 4 : end]) != checksum:
            raise OSError(f"wrong checksum of the chunk {name.decode('latin-1')} at byte {at:,}")
        if name == b"sBIT":
            image.info["significant_bits"] = max(data[at + 8 : end])
        at = end + 4


def check_tiff(image: Image.Image, data: bytes) -> None:
    """Compare deflated strips or tiles with their checksums. libtiff does not read on to all of them."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    if tags.get(259) in (8, 32946):
        offsets, sizes = (tags.get(strips) or tags[tiles] for strips, tiles in ((273, 324), (279, 325)))
        for at, size in zip(offsets, sizes):
            strip, rest = zlib.decompressobj(), data[at : at + size]
            while rest and not strip.eof:
                strip.decompress(rest, 1 << 20)
                rest = strip.unconsumed_tail
            if not strip.eof:
                raise OSError("a strip is truncated")


def to_uint8(image: Image.Image | np.ndarray | torch.Tensor, size: int, channels: int = 3) -> np.ndarray:
    """Upright, in sRGB, on white where transparent, cut to the exact central square, scaled: uint8
    [channels, size, size]; 3 channels are RGB, 1 is grey (ITU-R 601 luma, which leaves R = G = B as it is).

    image: a PIL image of any mode, a uint8 array [H, W, 3], [H, W, 1] or [H, W], or a tensor [3, H, W] or [1, H, W], uint8
    or float in [0, 1]. Nothing is resampled if a cut is enough.   size: 0 keeps the whole picture as large as it is.
    Raises UserError that names the file if a PIL image cannot be decoded, ValueError for other arrays.
    """
    if not isinstance(image, Image.Image):
        return to_uint8(from_array(image), size, channels)
    with decoding(name_of(image)):
        drafted = image.draft(None, (2 * size, 2 * size)) if size else None  # a JPEG at 1/2, 1/4 or 1/8: a fraction of the time
        rgb = flatten(image)
        if size and rgb.size != (size, size):
            width, height = drafted[1][2:] if drafted else rgb.size  # at 1/8 the last pixel may be an eighth of one
            side = min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            if side == size:
                left, top = int(left), int(top)
            rgb = rgb.resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side), reducing_gap=3.0)
            if max(width, height) > 2 * side:
                share = 100 * side / max(width, height)
                note(image, "sides of more than 2:1; the square in the middle is used, {min:.2g}% of the longest", share)
            if side < size:
                note(image, f"fewer than {size} pixels a side, the smallest {{min}}: enlarged", side)
        picture = rgb if channels == 3 else rgb.convert("L")
        with contextlib.suppress(Exception):  # upright, or as many kinds as there are ways to damage EXIF data
            picture = picture.transpose(TURNS[image.getexif()[ExifTags.Base.Orientation]])
        with contextlib.suppress(Exception):  # last, because to count the frames Pillow goes through them, also damaged ones
            if (further := getattr(image, "n_frames", 1) - 1) > 0:
                note(image, "further pages or frames, which are left out, {sum:,} in all", further)
        return np.ascontiguousarray(np.atleast_3d(np.asarray(picture)).transpose(2, 0, 1))


def flatten(image: Image.Image) -> Image.Image:
    """Decode to mode RGB in sRGB: the first frame, deep samples scaled to 8 bits, transparency on white."""
    with quiet_libtiff() if image.format == "TIFF" else contextlib.nullcontext():
        load_deep_colour(image)
        image.load()  # here, not inside getexif: damaged pixels must not pass for damaged EXIF data
    profile, mode, picture = image.info.get("icc_profile"), image.mode, image
    if mode in ("I", "F") or mode.startswith("I;16"):
        picture = to_8_bits(image)
    elif mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        if mode in ("La", "RGBa"):
            picture = picture.convert("LA" if mode == "La" else "RGBA")  # undo the premultiplied alpha
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    if profile:
        try:
            space, transform = srgb_transform(profile)
            if space != (mode if mode == "CMYK" else "L" if space == "L" and mode[0] in "1LIF" else "RGB"):
                raise ValueError(f"a profile for {space} in a picture of mode {mode}")
            if transform:
                picture = ImageCms.applyTransform(picture.convert(space), transform) or picture
        except Exception:  # lcms, struct and Pillow have errors of their own for a broken profile
            note(image, "a colour profile that is broken or made for another kind of picture; it is ignored")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


@functools.lru_cache(maxsize=16)
def srgb_transform(profile: bytes) -> tuple[str, Any]:
    """(mode, transform to sRGB) of a colour profile. No transform if it would move no colour by more than two levels."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), space, "RGB")
    if space == "RGB":
        colours = np.indices((6, 6, 6), dtype=np.uint8).reshape(3, 1, -1).T * np.uint8(51)
        moved = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform)).astype(int) - colours
        return space, transform if np.abs(moved).max() > 2 else None
    return space, transform


@contextlib.contextmanager
def quiet_libtiff() -> Iterator[None]:
    """Discard what libtiff writes to file 2 from C, which can be hundreds of lines about a file that will be named anyway.
    What another thread writes there is lost too, for the moment that one TIFF takes."""
    with contextlib.ExitStack() as undo:
        with contextlib.suppress(OSError):  # stderr is closed: nothing to do
            before = os.dup(2)
            undo.callback(os.close, before)
            undo.callback(os.dup2, before, 2)
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 2)
        yield


# --- samples of more than 8 bits ------------------------------------------------------------------------


def to_8_bits(image: Image.Image) -> Image.Image:
    """Mode L from greyscale of 16 bits, 32 bits or float, white where transparent. Pillow itself would clip at 255."""
    grey = np.asarray(image)
    finite = grey[np.isfinite(grey)] if grey.dtype.kind == "f" else grey
    pixels = scaled(grey, *range_of(image, finite.min(initial=0), finite.max(initial=0), grey.dtype.kind == "f"))
    if getattr(image, "tag_v2", {}).get(262) == 0:  # a TIFF in which 0 is white; Pillow heeds that with 8 bits only
        pixels = 255 - pixels
    if "transparency" in image.info:
        pixels[grey == image.info["transparency"]] = 255
    return Image.fromarray(pixels)


def load_deep_colour(image: Image.Image) -> None:
    """Load colour of 16 bits, of which Pillow keeps the high byte. If these are all small, the data have at most 14 bits, and
    the low bytes count too: they are the high ones of the other byte order."""
    if not re.search("'RGBA?;16", str(getattr(image, "tile", [])[:1])):  # the raw mode among the arguments of a tile
        return
    image.fp.seek(0)  # type: ignore[attr-defined]
    low: Any = Image.open(io.BytesIO(image.fp.read()))  # type: ignore[attr-defined]
    high, white, key = np.asarray(image), 65535.0, image.info.get("transparency")
    if high[..., :3].max() < 64:
        for i, (*place, args) in enumerate(low.tile):
            mode, *more = [args] if isinstance(args, str) else args
            mode = mode[:-1] + OTHER_ORDER[mode[-1]]
            low.tile[i] = getattr(type(low.tile[i]), "_make", tuple)((*place, (mode, *more) if more else mode))
        deep = high.astype(np.uint16) * 256 + np.asarray(low)
        _, white = range_of(image, 0, deep[..., :3].max(), False)
        image.paste(Image.fromarray(scaled(deep, 0, white)))
    if key:
        image.info["transparency"] = tuple(x >> 8 if white == 65535 else round(x * 255 / white) for x in key)


def range_of(image: Image.Image, low: float, high: float, is_float: bool) -> tuple[float, float]:
    """(black, white) of samples from low to high: as the file says, or else by the range that they fill, with a note."""

    def tag(number: int) -> float:
        return float(np.ravel(getattr(image, "tag_v2", {}).get(number, 0))[0])

    bits = image.info.get("significant_bits") or (16 if is_float else tag(258) or 16)  # of a PNG's sBIT, BitsPerSample
    white = tag(341) or tag(281) or (1 if is_float else 2**bits - 1 if bits < 16 else 0)  # SMaxSampleValue, MaxSampleValue
    black = min(tag(340), 0)  # SMinSampleValue
    if image.format == "PPM":  # Pillow has scaled it by its maximum
        white = 65535
    if black <= low and high <= white:
        return black, white
    white = next((level for level in LEVELS if high <= level), 0)
    if low < 0 or not white or (is_float and high <= white / 2):
        note(image, "samples of an unknown range; the darkest one becomes black, the brightest one white")
        return low, high
    if white < 65535:
        note(image, f"samples of 16 bits or more that never exceed {white:,}; they are taken as {LEVELS[int(white)]} bits")
    return 0, white


def scaled(samples: np.ndarray, black: float, white: float) -> np.ndarray:
    """uint8 of the same shape, black at 0 and white at 255. In strips: float64 takes eight times the memory of the result."""
    pixels = np.empty(samples.shape, dtype=np.uint8)
    for top in range(0, len(samples), 64):
        strip = np.nan_to_num(samples[top : top + 64].astype(np.float64), nan=black, posinf=white, neginf=black)
        pixels[top : top + 64] = np.round((strip - black) * (255 / max(white - black, 1e-12))).clip(0, 255)
    return pixels


def from_array(image: np.ndarray | torch.Tensor) -> Image.Image:
    """A PIL image from what a Dataset may yield instead; see to_uint8."""
    if isinstance(image, torch.Tensor):
        if image.is_floating_point():
            if image.min() < 0 or image.max() > 1:
                found = f"a float tensor from {image.min():.3g} to {image.max():.3g}, expected [0, 1]"
                raise ValueError(f"the dataset yields {found}: leave out its normalisation, training does that")
            image = (image * 255).round().to(torch.uint8)
        image = image.movedim(0, -1).numpy() if image.ndim == 3 else image.numpy()
    pixels = image[..., None] if image.ndim == 2 else image
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        found = f"{image.dtype} {list(image.shape)}"
        raise ValueError(f"the dataset yields {found}, expected uint8 [H, W, 3] or a tensor [3, H, W]")
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3))))
