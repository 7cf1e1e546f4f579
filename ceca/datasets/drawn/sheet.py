"""A sheet of drawn images with their captions, to look at."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .generate import LAYOUTS

_CELL = (176, 336)  # an image, pixels
_GAP = 16
_FONT_SIZE = 13


def contact_sheet(folder: Path, out: Path, *, rows: int, columns: int, seed: int = 0) -> None:
    """Draw a sheet of `rows` by `columns` images of different people, each above its first caption.

    Args:
        folder: a drawn dataset of any layout.
        out: the picture to write; its suffix (.png, .jpg) chooses the format.
        rows: images below one another.
        columns: images beside one another.
        seed: chooses the images.

    Raises:
        ValueError: the folder holds no annotation file, or fewer people than the sheet has cells.
    """
    folder = Path(folder)
    layout = next((layout for layout in LAYOUTS.values() if (folder / layout.annotations).exists()), None)
    if layout is None:
        raise ValueError(f"{folder} holds none of {', '.join(one.annotations for one in LAYOUTS.values())}")
    records = json.loads((folder / layout.annotations).read_text())
    people = sorted({record["id"] for record in records})
    if not 1 <= rows * columns <= len(people):
        raise ValueError(f"a sheet of {rows} x {columns} needs as many people; {folder} has {len(people)}")
    rng = np.random.default_rng(seed)
    font = ImageFont.load_default(size=_FONT_SIZE)
    chosen = []
    for person in rng.choice(people, size=rows * columns, replace=False):
        images = [record for record in records if record["id"] == person]
        chosen.append(images[int(rng.integers(len(images)))])
    captions = [textwrap.wrap(record["captions"][0], width=27) for record in chosen]
    text_height = max(map(len, captions)) * (_FONT_SIZE + 4) + 6
    width, height = _CELL[0] + _GAP, _CELL[1] + text_height + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, rows * height + _GAP), (250, 250, 248))
    pen = ImageDraw.Draw(sheet)
    for cell, record in enumerate(chosen):
        x, y = _GAP + cell % columns * width, _GAP + cell // columns * height
        with Image.open(folder / "imgs" / record[layout.image_key]) as image:
            sheet.paste(image.resize(_CELL, Image.Resampling.LANCZOS), (x, y))
        text = "\n".join(captions[cell])
        pen.multiline_text((x, y + _CELL[1] + 6), text, fill=(40, 40, 44), font=font, spacing=4)
    sheet.save(out)
