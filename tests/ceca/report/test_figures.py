"""Figures of a report: text is wrapped by its real width, and no image is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ceca.report.figures import SCALE, TEXT, Described, _font, draw_dialogues, wrap_to_width

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("C",)), max_size=30)


@settings(deadline=None)
@given(st.lists(WORDS, max_size=12), st.integers(30, 300))
def test_no_line_is_wider_than_asked_and_no_word_is_lost(words: list[str], width: int):
    text = " ".join(words)
    lines = wrap_to_width(text, width, TEXT)
    for line in lines:
        assert len(line) == 1 or _font(TEXT, "normal").getlength(line) <= width * SCALE
    assert "".join(lines).replace(" ", "") == "".join(text.split())


def test_wide_letters_make_shorter_lines_than_narrow_ones():
    assert len(wrap_to_width("WWWW " * 20, 200, TEXT)) > 2 * len(wrap_to_width("iiii " * 20, 200, TEXT))


def test_a_picture_of_dialogues_holds_every_image_and_grows_with_its_text(tmp_path: Path):
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]
    cards = [Described(Image.new("RGB", (60, 120), colour), "a man", "a man in a coat") for colour in colours]
    first = np.asarray(Image.open(draw_dialogues([("one", cards[:3]), ("two", cards[3:])], tmp_path / "a.png")))
    for colour in colours:
        assert (first == colour).all(axis=2).sum() > 10_000
    wordy = [Described(card.image, card.caption, "word " * 400) for card in cards]
    second = Image.open(draw_dialogues([("one", wordy[:3]), ("two", wordy[3:])], tmp_path / "b.png"))
    assert second.height > first.shape[0]
    assert second.width == first.shape[1]
