"""Pictures of results."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

HIT, MISS, UNKNOWN = "#1a9850", "#d73027", "#888888"


@dataclasses.dataclass(frozen=True)
class RankedList:
    """A query and what was found for it, best first.

    `identity` is the person described, or None where nobody knows; `images` and `identities` belong together.
    """

    query: str
    identity: int | None
    images: Sequence[Image.Image]
    identities: Sequence[int]


def draw_ranked_lists(lists: Sequence[RankedList], out: Path, title: str = "") -> Path:
    """Write a picture with a row per query: its words, then the images, hits framed green and others red."""
    columns = max(len(ranked.images) for ranked in lists)
    figure, axes = plt.subplots(
        len(lists),
        columns + 1,
        figsize=(2.6 + 1.1 * columns, 2.4 * len(lists) + (0.4 if title else 0)),
        gridspec_kw={"width_ratios": [2.3] + [1] * columns},
        squeeze=False,
        layout="constrained",
    )
    for row, ranked in zip(axes, lists, strict=True):
        for axis in row:
            axis.set_axis_off()
        words = textwrap.fill(ranked.query, 30)
        row[0].text(0, 0.5, words, va="center", ha="left", fontsize=10, transform=row[0].transAxes)
        for position, (image, identity) in enumerate(zip(ranked.images, ranked.identities, strict=True)):
            axis = row[position + 1]
            axis.set_axis_on()
            axis.imshow(image.resize((128, 256)))
            axis.set(xticks=[], yticks=[])
            axis.set_title(str(position + 1), fontsize=8, pad=2)
            known = ranked.identity is not None
            colour = (HIT if identity == ranked.identity else MISS) if known else UNKNOWN
            for side in axis.spines.values():
                side.set(edgecolor=colour, linewidth=3.5)
    if title:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return out
