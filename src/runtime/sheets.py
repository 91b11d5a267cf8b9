"""Pictures for people to look at: sheets and GIFs, enlarged, with names below in a font that has their letters."""

import functools
import math
import re
import subprocess
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont, features
from torch import Tensor

from src.utils import atomic_file, printable, to_pil

# Fonts of many letters that Linux, macOS and Windows come with. Pillow finds them in the usual folders.
KNOWN = ["DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "Arial Unicode.ttf", "Hiragino Sans GB.ttc"]
KNOWN += ["AppleSDGothicNeo.ttc", "segoeui.ttf", "msyh.ttc", "malgun.ttf"]


def class_columns(classes: int) -> int:
    """Columns of a sheet of one picture of each class, then again: about 10, and each column holds one class if it can."""
    return 10 // classes * classes or 10


def caption(name: str, label: int) -> str:
    """The name of a class as a sheet can show it: on one line, in letters that a font of this system has; else its index."""
    name = unicodedata.normalize("NFC", printable(name))[:100]
    return name if name.strip() and font_of(name) else f"index:{label}"


def zoom_of(wide: int) -> int:
    """How often to enlarge an image for people: it gets about 96 pixels wide, enough for a name below."""
    return max(1, round(96 / wide))


def sheet(images: Tensor, names: Sequence[str] = (), columns: int | None = None, zoom: int | None = None) -> Tensor:
    """All images in one, enlarged, each with its name below where there are names: [3, H, W] uint8.
    images: [B, C, H, W] uint8.   columns: None: nearly square, in full rows if possible.   zoom: of a pixel; None: zoom_of."""
    root, wide = math.ceil(math.sqrt(len(images))), images.shape[3]
    full_rows = (width for width in range(root, 3 * root // 2) if len(images) % width == 0)
    columns, zoom = min(columns or next(full_rows, root), len(images)), zoom or zoom_of(wide)
    wide, high = wide * zoom, images.shape[2] * zoom
    width, height = wide + 4, high + 4 + (14 if names else 0)
    paper = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), (32, 32, 32))
    pen = ImageDraw.Draw(paper)
    for i, image in enumerate(images):
        name = names[i] if names else ""
        left, top = i % columns * width + 2, i // columns * height + 2
        paper.paste(to_pil(image).resize((wide, high), Image.Resampling.NEAREST), (left, top))
        font = font_of(name) or opened("")
        while len(name) > 1 and pen.textlength(name, font) > wide:
            name = name.removesuffix("…")[:-1] + "…"
        pen.text((left, top + high + 11), name, fill="white", font=font, anchor="ls")  # on one line in all fonts
    return torch.frombuffer(bytearray(paper.tobytes()), dtype=torch.uint8).view(paper.height, paper.width, 3).permute(2, 0, 1)


def save_gif(frames: Sequence[Tensor], path: Path, seconds: float = 4.0) -> None:
    """Write [3, H, W] uint8 frames as an endless GIF of about `seconds`, which rests on the last one."""
    pause = max(20, round(1000 * seconds / len(frames)))  # ms; browsers slow down anything under 20
    first, *others = [to_pil(frame) for frame in frames]
    with atomic_file(path) as file:
        first.save(file, format="GIF", save_all=True, append_images=others, duration=[pause] * len(others) + [1500], loop=0)


# --- fonts ----------------------------------------------------------------------------------------------


@functools.cache
def opened(file: str) -> Any:
    """The font, 11 pixels high; "" is Pillow's own, which has ASCII. None if it is not there or has not this size."""
    with suppress(OSError):
        return ImageFont.truetype(file, 11) if file else ImageFont.load_default(11)


@functools.cache
def font_of(name: str) -> Any:
    """The first font that has all letters of the name: Pillow's own, then those of the system. None if there is none."""
    letters = {letter for letter in name + "…" if not re.match("Z|M|Cf", unicodedata.category(letter))}
    if any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in letters) and not features.check("raqm"):
        return None  # nothing else puts the letters of such a script into their order
    found = (font for font in map(opened, ["", *KNOWN]) if font and has(font, letters))
    if font := next(found, None):
        return font
    with suppress(OSError, subprocess.SubprocessError):  # most of Linux has it: the font of the system for these letters
        charset = ":charset=" + " ".join(f"{ord(letter):x}" for letter in letters)
        file = subprocess.run(["fc-match", "-f", "%{file}", charset], capture_output=True, timeout=5, text=True).stdout
        return opened(file) if opened(file) and has(opened(file), letters) else None


def has(font: Any, letters: set[str]) -> bool:
    """Whether each is drawn, and not as the box that stands for what a font lacks."""
    return all(bytes(font.getmask(letter)) not in (bytes(font.getmask("\U0010ffff")), b"") for letter in letters)
