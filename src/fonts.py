"""A font that has the letters of a name, for the sheets."""

import functools
import re
import subprocess
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from PIL import ImageFont, features

SIZE = 11  # pixels
# Fonts of many letters that Linux, macOS and Windows come with. Pillow finds them in the usual folders.
KNOWN = ["DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf"]
KNOWN += ["Arial Unicode.ttf", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc", "segoeui.ttf", "msyh.ttc", "malgun.ttf"]

Font = Any  # ImageFont.FreeTypeFont
own = functools.cache(lambda: ImageFont.load_default(SIZE))  # Pillow's: it has ASCII


@functools.cache
def font_of(name: str) -> Font | None:
    """The first font that has all letters of the name: Pillow's own, then those of the system. None if there is none."""
    is_mirrored = any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in name)
    if is_mirrored and not features.check("raqm"):  # which puts the letters of such a script into their order
        return None
    return next((font for font in fonts(name) if has(font, f"{name}…")), None)


def fonts(name: str) -> Iterator[Font]:
    yield own()
    yield from filter(None, map(opened, KNOWN))
    with suppress(OSError, subprocess.SubprocessError):  # most of Linux has it: the font of the system for these letters
        letters = " ".join(f"{ord(letter):x}" for letter in set(name))
        command = ["fc-match", "-f", "%{file}", f":charset={letters}"]
        file = subprocess.run(command, capture_output=True, timeout=5, check=True, text=True).stdout
        yield from filter(None, [opened(file)])


@functools.cache
def opened(file: str) -> Font | None:
    with suppress(OSError):  # not there, or of a kind that has no letters of this size
        return ImageFont.truetype(file, SIZE)
    return None


def has(font: Font, text: str) -> bool:
    """Whether no letter is drawn as the box that stands for what a font lacks. Marks that change others are left out."""
    box = bytes(font.getmask("\U0010ffff"))
    letters = [letter for letter in set(text) if not re.match("Z|M|Cf", unicodedata.category(letter))]
    return all(bytes(font.getmask(letter)) not in (box, b"") for letter in letters)
