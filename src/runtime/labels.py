"""Class labels as people type and read them."""

import difflib
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from src.pictures import to_image
from src.utils import FlagError


def parse_classes(words: str, classes: Sequence[str], class_ids: Sequence[str]) -> list[int]:
    """ "goldfish,n02124075,17" -> labels; "all" -> every label. Names in any case, ids, or indices from 0.
    Raises FlagError for a word that is none of them, with the nearest names."""
    if words.strip().lower() == "all":
        return list(range(len(classes)))
    label_of = {class_id.lower(): label for label, class_id in enumerate(class_ids)}
    for label, name in enumerate(classes):
        label_of.setdefault(name.lower(), label)
    labels = []
    for word in (word.strip() for word in words.split(",")):
        if word.lower() in label_of:
            labels.append(label_of[word.lower()])
        elif word.isdecimal() and int(word) < len(classes):
            labels.append(int(word))
        elif word.isdecimal():
            raise FlagError(
                f"--classes: got {word}, but the checkpoint's {len(classes)} classes have indices 0 to {len(classes) - 1}."
            )
        else:
            near = difflib.get_close_matches(word.lower(), label_of, 3, cutoff=0.5)
            parts = [name for name in label_of if word.lower() in name][:3]
            advice = (
                f"did you mean {', '.join(dict.fromkeys(near + parts))}?"
                if near or parts
                else f"there are {', '.join(classes[:10])}, ..."
            )
            raise FlagError(f"--classes: the checkpoint has no class {word!r}; {advice}")
    return labels


def labelled_sheet(pictures: Tensor, names: Sequence[str], columns: int) -> Tensor:
    """A grid with the name of its class under each picture. pictures: [B, 3, S, S] uint8. Returns [3, H, W] uint8."""
    font = ImageFont.load_default(size=11)
    size, line = pictures.shape[-1], 14
    zoom = max(1, round(96 / size))  # wide enough for a name
    width, height = size * zoom + 4, size * zoom + line + 4
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), (32, 32, 32))
    pen = ImageDraw.Draw(sheet)
    for i, (picture, name) in enumerate(zip(pictures, names)):
        left, top = i % columns * width + 2, i // columns * height + 2
        sheet.paste(to_image(picture).resize((size * zoom, size * zoom), Image.Resampling.NEAREST), (left, top))
        while pen.textlength(name, font) > width - 4:
            name = name.removesuffix("…")[:-1] + "…"
        pen.text((left, top + size * zoom), name, fill="white", font=font)
    return torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(sheet.height, sheet.width, 3).permute(2, 0, 1)
