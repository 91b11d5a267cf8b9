"""A font that has the letters of a name, for the sheets."""

import functools
import re
import subprocess
import unicodedata
from contextlib import suppress
from typing import Any

from PIL import ImageFont, features

# Fonts of many letters that Linux, macOS and Windows come with. Pillow finds them in the usual folders.
KNOWN = ["DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "Arial Unicode.ttf", "Hiragino Sans GB.ttc"]
KNOWN += ["AppleSDGothicNeo.ttc", "segoeui.ttf", "msyh.ttc", "malgun.ttf"]


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
