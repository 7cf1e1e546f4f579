"""The figures of a report: ranked lists, dialogues, comparisons, training curves, statistics.

Notable: every function takes plain numbers and images, writes one figure and returns its path; none reads a dataset.
Charts are drawn by matplotlib, without a display, as the file's suffix says; without a suffix as PNG and SVG.
Dialogues are drawn as pixels, because their text is wrapped by the real width of the font.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from ceca.errors import UserError
from ceca.report.records import Described, RankedList

HIT, MISS, UNKNOWN = "#1a9850", "#d73027", "#888888"
PAPER, INK, FAINT, ACCENT = "#ffffff", "#1f2328", "#8a9099", "#2b6cb0"


# --- ranked lists -----------------------------------------------------------------------------------------


def draw_ranked_lists(lists: Sequence[RankedList], out: Path, title: str = "") -> Path:
    """Draw one row per query: its words, then its images. Hits have a green frame, others a red one.

    Without a known person, frames are grey.
    """
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
        _draw_ranked_list(row, ranked)
    if title:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    return _save(figure, out)


def _draw_ranked_list(row: Sequence[Axes], ranked: RankedList) -> None:
    for axis in row:
        axis.set_axis_off()
    words = textwrap.fill(ranked.query, 30)
    row[0].text(0, 0.5, words, va="center", ha="left", fontsize=10, transform=row[0].transAxes)
    row[0].text(0, 0.98, ranked.label, va="top", weight="bold", fontsize=10, transform=row[0].transAxes)
    for position, (image, identity) in enumerate(zip(ranked.images, ranked.identities, strict=True), 1):
        axis = row[position]
        axis.set_axis_on()
        axis.imshow(image.resize((128, 256)))
        axis.set(xticks=[], yticks=[])
        axis.set_title(str(position), fontsize=8, pad=2)
        colour = UNKNOWN
        if ranked.identity is not None:
            colour = HIT if identity == ranked.identity else MISS
        for side in axis.spines.values():
            side.set(edgecolor=colour, linewidth=3.5)


# --- dialogues --------------------------------------------------------------------------------------------

SCALE = 2  # pixels per unit of the sizes below, so that text stays sharp on a fine screen
CARD, PHOTO, GAP, PADDING = 400, (96, 192), 16, 24
TEXT, LABEL, TITLE = 11.5, 9.0, 15.0  # font sizes
LEADING = 1.4  # distance between lines, in font sizes


def draw_dialogues(datasets: Sequence[tuple[str, Sequence[Described]]], out: Path, columns: int = 3) -> Path:
    """Draw images with their original caption and their generated summary, one block per dataset.

    Args:
        datasets: pairs of a title and its images.
        out: the file; its suffix is the format.
        columns: images per row.
    """
    width = 2 * PADDING + columns * CARD + (columns - 1) * GAP
    blocks = [(title, [cards[i : i + columns] for i in range(0, len(cards), columns)]) for title, cards in datasets]
    height = PADDING + sum(
        TITLE * 2 + sum(max(_card_height(card) for card in row) + GAP for row in rows) for _, rows in blocks
    )
    sheet = Image.new("RGB", (width * SCALE, round((height + PADDING - GAP) * SCALE)), PAPER)
    pen = ImageDraw.Draw(sheet)
    top = float(PADDING)
    for title, rows in blocks:
        _write(pen, PADDING, top, [title], TITLE, INK, "bold")
        top += TITLE * 2
        for row in rows:
            for position, card in enumerate(row):
                _draw_card(sheet, pen, card, PADDING + position * (CARD + GAP), top)
            top += max(_card_height(card) for card in row) + GAP
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    return out


def _draw_card(sheet: Image.Image, pen: ImageDraw.ImageDraw, card: Described, left: float, top: float) -> None:
    photo = card.image.convert("RGB").resize((PHOTO[0] * SCALE, PHOTO[1] * SCALE), Image.Resampling.LANCZOS)
    sheet.paste(photo, (round(left * SCALE), round(top * SCALE)))
    for label, colour, lines in _card_text(card):
        top = _write(pen, left + PHOTO[0] + GAP, top, [label], LABEL, colour, "bold")
        top = _write(pen, left + PHOTO[0] + GAP, top, lines, TEXT, INK) + TEXT * 0.6


def _card_text(card: Described) -> list[tuple[str, str, list[str]]]:
    """The texts beside an image: label, colour of the label, wrapped lines."""
    wide = CARD - PHOTO[0] - GAP
    texts = (("CAPTION", FAINT, card.caption or "(none)"), ("SUMMARY", ACCENT, card.summary))
    return [(label, colour, wrap_to_width(text, wide, TEXT)) for label, colour, text in texts]


def _card_height(card: Described) -> float:
    text = sum(LABEL * LEADING + len(lines) * TEXT * LEADING + TEXT * 0.6 for _, _, lines in _card_text(card))
    return max(float(PHOTO[1]), text)


def _write(
    pen: ImageDraw.ImageDraw,
    left: float,
    top: float,
    lines: Sequence[str],
    size: float,
    ink: str,
    weight: str = "normal",
) -> float:
    """Write lines below each other from a point on, and return the top of the next line."""
    for line in lines:
        pen.text((left * SCALE, top * SCALE), line, fill=ink, font=_font(size, weight))
        top += size * LEADING
    return top


def wrap_to_width(text: str, width: float, size: float) -> list[str]:
    """Break a text into lines of at most `width` units, measured in the font; a longer word is cut.

    Args:
        text: words, separated by white space.
        width: in units of the picture (`SCALE` pixels each).
        size: of the font.
    """
    font, lines, line = _font(size, "normal"), [], ""
    for word in text.split():
        joined = f"{line} {word}".strip()
        if font.getlength(joined) <= width * SCALE:
            line = joined
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width * SCALE:
            fits = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width * SCALE)
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    return [*lines, line] if line else lines


@functools.cache
def _font(size: float, weight: str) -> ImageFont.FreeTypeFont:
    properties = font_manager.FontProperties(family="DejaVu Sans", weight=weight)  # the font ships with matplotlib
    return ImageFont.truetype(font_manager.findfont(properties), round(size * SCALE))


# --- charts -----------------------------------------------------------------------------------------------


def draw_comparison(rows: Mapping[str, Mapping[str, tuple[float, float]]], out: Path) -> Path:
    """Draw methods side by side: Rank-1 and mAP in percent, with deviations.

    Args:
        rows: method → metric → (mean, deviation).
        out: the file.
    """
    figure, axis = plt.subplots(figsize=(1.6 + 1.3 * len(rows), 3.4), layout="constrained")
    places = range(len(rows))
    for offset, (key, label, colour) in enumerate(
        [("rank1", "Rank-1", "#4575b4"), ("mean_average_precision", "mAP", "#fdae61")]
    ):
        means, deviations = zip(*(row[key] for row in rows.values()), strict=True)
        bars = axis.bar(
            [place + (offset - 0.5) * 0.38 for place in places], means, 0.36, yerr=deviations, label=label,
            color=colour, capsize=3,
        )  # fmt: skip
        axis.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    axis.set_xticks(list(places), list(rows))
    axis.set(ylabel="percent", ylim=(0, 105))
    _open_frame(axis)
    axis.legend(frameon=False, ncols=2, loc="upper left")
    return _save(figure, out)


def draw_training(
    curves: Mapping[str, Mapping[str, Sequence[float]]], validation: Mapping[str, Any], out: Path
) -> Path:
    """Draw training runs: the loss by step, and Rank-1 on the validation split by epoch.

    Args:
        curves: run → columns of its curve: `step`, `loss` and one per term.
        validation: run → (epochs, Rank-1 in percent); two empty lists without validation.
        out: the file.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, columns in curves.items():
        left.plot(columns["step"], columns["loss"], label=name, linewidth=1)
        epochs, rank1 = validation[name]
        right.plot(epochs, rank1, marker="o", markersize=3, label=name)
    left.set(xlabel="step", ylabel="loss")
    right.set(xlabel="epoch", ylabel="validation Rank-1, percent")
    _open_frame(left, right, grid=True)
    left.legend(frameon=False)
    return _save(figure, out)


def draw_omega(curves: Mapping[str, Mapping[float, tuple[float, float]]], out: Path) -> Path:
    """Draw Rank-1 and Rsum by ω; the best point of each curve is marked.

    Args:
        curves: model → ω → (Rank-1 in percent, Rsum).
        out: the file.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, position, label in zip(axes, (0, 1), ("Rank-1, percent", "Rsum"), strict=True):
        for name, points in curves.items():
            omegas, values = list(points), [point[position] for point in points.values()]
            best = max(range(len(values)), key=values.__getitem__)
            (line,) = axis.plot(omegas, values, marker="o", markersize=3, linewidth=1.2, label=name)
            axis.plot(omegas[best], values[best], marker="*", markersize=13, color=line.get_color())
            words = f"{values[best]:.1f} at {omegas[best]:g}"
            axis.annotate(
                words, (omegas[best], values[best]), (0, 9), textcoords="offset points", ha="center", fontsize=8
            )
        axis.margins(y=0.15)
        axis.set(xlabel="ω: global 0 … 1 local", ylabel=label)
        _open_frame(axis, grid=True)
    axes[0].legend(frameon=False)
    return _save(figure, out)


def draw_reliability(
    bins: Mapping[str, Sequence[Mapping[str, float]]], alarms: Mapping[str, Sequence[tuple[float, float]]], out: Path
) -> Path:
    """Draw whether confidence can be believed, and who is identified at which share of false alarms.

    Args:
        bins: model → bins of a reliability diagram: `confidence`, and `right`, the share that is right.
        alarms: model → points (share of false alarms, share identified), ascending.
        out: the file.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    left.plot([0, 1], [0, 1], color=FAINT, linestyle=":", linewidth=1)
    for name, rows in bins.items():
        left.plot([row["confidence"] for row in rows], [row["right"] for row in rows], marker="o", label=name)
    for name, points in alarms.items():
        right.plot([100 * x for x, _ in points], [100 * y for _, y in points], linewidth=1.2, label=name)
    left.set(xlabel="confidence", ylabel="share of first hits that are right", xlim=(0, 1), ylim=(0, 1))
    right.set(xlabel="false alarms, percent", ylabel="identified, percent", ylim=(0, 100))
    _open_frame(left, right, grid=True)
    if bins:
        left.legend(frameon=False)
    right.legend(frameon=False, loc="lower right")
    return _save(figure, out)


def draw_statistics(
    images_per_person: Sequence[int], words: Sequence[int], tokens: Sequence[int], limit: int, out: Path
) -> Path:
    """Draw histograms of a dataset: images per person, words per caption, CLIP tokens per summary.

    Args:
        images_per_person: one number per person.
        words: one number per caption.
        tokens: one number per summary; empty leaves the third histogram out.
        limit: CLIP's context length, drawn as a line; longer summaries are cut.
        out: the file.
    """
    panels = [("images per person", images_per_person), ("words per caption", words)]
    if tokens:
        panels.append(("CLIP tokens per summary", tokens))
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3), layout="constrained", squeeze=False)
    for axis, (label, values) in zip(axes[0], panels, strict=True):
        low, high = min(values), max(values)
        step = max(1, (high - low) // 40)
        edges = [edge - 0.5 for edge in range(low, high + step + 1, step)]
        axis.hist(values, bins=edges, color=ACCENT, edgecolor=PAPER, linewidth=0.5)
        axis.set(xlabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        _open_frame(axis)
    if tokens:
        axes[0, -1].axvline(limit, color=MISS, linewidth=1)
        axes[0, -1].text(
            limit, 0.98, f"{limit}: CLIP's limit ", ha="right", va="top", fontsize=8, color=MISS,
            transform=axes[0, -1].get_xaxis_transform(),
        )  # fmt: skip
    axes[0, 0].set(ylabel="count")
    return _save(figure, out)


def draw_attributes(
    confused: Mapping[str, tuple[float, float]], rank1: Mapping[str, tuple[float, int]], out: Path, title: str = ""
) -> Path:
    """Draw a model's errors: by attribute on the left, by condition of the image on the right.

    Args:
        confused: attribute → (share of wrong results at rank 1 whose value differs from the described image's, the
            same share among random images of other people).
        rank1: condition of the described image → (Rank-1 in percent, number of queries).
        out: the file.
        title: of the figure.
    """
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 1.2 + 0.28 * max(len(confused), len(rank1))), layout="constrained"
    )
    order = sorted(confused, key=lambda name: confused[name][0] / max(confused[name][1], 1e-9))
    for place, name in enumerate(order):
        wrong, anyone = (100 * share for share in confused[name])
        left.barh(place, wrong, color=ACCENT, label="of wrong first places" if not place else None)
        left.plot([anyone, anyone], [place - 0.4, place + 0.4], color=INK, label=None if place else "of random people")
    left.set_yticks(range(len(order)), [name.replace("_", " ") for name in order])
    left.set(xlabel="has another value than the person described, percent", xlim=(0, 100))
    left.legend(frameon=False, loc="lower right", fontsize=8)
    names = list(rank1)[::-1]
    right.barh(range(len(names)), [rank1[name][0] for name in names], color=HIT)
    right.set_yticks(range(len(names)), [f"{name} ({rank1[name][1]:,})" for name in names])
    right.set(xlabel="Rank-1 of sentences about such images, percent", xlim=(0, 100))
    _open_frame(left, right)
    if title:
        figure.suptitle(title, fontsize=9)
    return _save(figure, out)


# --- all figures ------------------------------------------------------------------------------------------


def _open_frame(*axes: Axes, grid: bool = False) -> None:
    """Hide the top and the right line of a chart's frame."""
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        if grid:
            axis.grid(alpha=0.3)


def _save(figure: Figure, out: Path) -> Path:
    """Write and close a figure: in the format of the file's suffix, or as PNG and SVG without one.

    Raises:
        UserError: the suffix is not a format that matplotlib writes.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        for path in [out] if out.suffix else [out.with_suffix(".png"), out.with_suffix(".svg")]:
            figure.savefig(path, dpi=130)
    except ValueError as error:  # its message lists the valid formats
        raise UserError(f"cannot write {out}: {error}") from None
    finally:
        plt.close(figure)
    return out
