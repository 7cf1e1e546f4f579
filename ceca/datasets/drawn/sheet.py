"""Contact sheet: drawn images with their captions in one picture."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ceca.datasets.layouts import LAYOUTS

_CELL = (176, 336)  # width and height of an image in pixels
_GAP = 16  # pixels between images
_FONT_SIZE = 13


def contact_sheet(folder: Path, out: Path, *, rows: int, columns: int, seed: int = 0) -> None:
    """Draw a sheet of `rows` by `columns` images of different people, each above its first caption.

    Args:
        folder: drawn dataset in any layout.
        out: output file; its suffix (.png, .jpg) chooses the format.
        rows: number of rows.
        columns: number of images in a row.
        seed: seed of the choice of images.

    Raises:
        ValueError: the folder has no annotation file, or fewer people than the sheet has images.
    """
    folder = Path(folder)
    layout = next((layout for layout in LAYOUTS.values() if (folder / layout.annotation).exists()), None)
    if layout is None:
        raise ValueError(
            f"{folder} has no annotation file; looked for {', '.join(layout.annotation for layout in LAYOUTS.values())}"
        )
    records = [record for record in json.loads((folder / layout.annotation).read_text()) if record["captions"]]
    people = sorted({record["id"] for record in records})
    if not 1 <= rows * columns <= len(people):
        raise ValueError(
            f"a sheet of {rows} x {columns} images needs {rows * columns} people; {folder} has {len(people)}"
        )
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
