"""CLIP's modules and tokens equal open_clip's: parameters by name, order and random start, and every token."""

from __future__ import annotations

import functools
import logging
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ceca.errors import UserError
from ceca.model import tokens
from ceca.model.clip import CLIP, TINY, describe, descriptions
from ceca.model.tokens import count_tokens, encode, tokenize_numpy

SMALL = ["ceca-tiny", "ViT-S-32", "ViT-M-16-alt"]  # the last one has learned scales


@functools.cache
def theirs() -> Any:
    """open_clip's tokeniser."""
    import open_clip  # slow to import

    return open_clip.tokenizer._tokenizer


@pytest.mark.parametrize("name", SMALL)
def test_a_seed_gives_the_parameters_that_open_clip_gives_in_their_order(name, monkeypatch):
    import open_clip  # slow to import

    open_clip.add_model_config(descriptions()[TINY])
    torch.manual_seed(3)
    ours = CLIP(name, (64, 32)).state_dict()
    torch.manual_seed(3)
    logging.disable(logging.WARNING)
    model = open_clip.create_model(name, pretrained=None, force_image_size=(64, 32), load_weights=False)
    logging.disable(logging.NOTSET)
    theirs = {key: value for key, value in model.state_dict().items() if key != "logit_scale"}
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
    assert [key for key, _ in CLIP(name, (64, 32)).named_parameters()] == [
        key for key, _ in model.named_parameters() if key != "logit_scale"
    ]


@pytest.mark.parametrize("name", ["RN50", "coca_ViT-B-32", "ViT-B-16-SigLIP", "ViT-L-14-CLIPA", "roberta-ViT-B-32"])
def test_a_model_that_is_no_plain_vit_is_refused_by_name(name):
    with pytest.raises(UserError, match=name):
        describe(name)


def test_an_unknown_model_lists_those_that_exist():
    with pytest.raises(UserError, match="valid: ceca-tiny, ViT-B-16-plus"):
        describe("ViT-X-1")


TEXTS = [
    "",
    " ",
    "a woman in a long grey coat with a fur collar, zebra-pattern hat",
    "She's wearing JEANS; they'll say it isn't 2024's best…",
    "caf\u00e9 na\u00efve \u4f60\u597d \U0001f600\U0001f468\u200d\U0001f469",
    "schÃ¶n &amp;amp; &lt;b&gt; \x1b[31mred\x1b[0m \r\n tab\there",
    "<start_of_text>words<end_of_text> <|endoftext|>",
    "\u201cquoted\u201d \u2018so\u2019 ﬁne Ⅷ ½ ١٢٣",
    "x" * 500,
    "word " * 200,
    "\x00\x01\x7f\u0085\u00a0\u2028",
    "İstanbul ǅ ß ſ",
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_equal_open_clips(text):
    assert encode(text) == theirs().encode(text)
    assert np.array_equal(tokenize_numpy([text]), theirs()([text], context_length=77).numpy())
    assert count_tokens(text) == len(theirs().encode(text)) + 2


@given(st.text(max_size=60))
def test_tokens_of_any_text_equal_open_clips(text):
    assert encode(text) == theirs().encode(text)


def test_tokens_of_random_letters_equal_open_clips():
    source = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz'-&;#0123456789 .,ABCéüß漢字😀\n\t"
    for _ in range(3000):
        text = "".join(source.choice(letters) for _ in range(source.randrange(40)))
        assert encode(text) == theirs().encode(text), text


# From all over Unicode, and what the cleaning of texts and the pattern of words treat in another way.
BLOCKS = ((0, 0x7F), (0, 0x24F), (0x370, 0x5FF), (0x600, 0x10FF), (0x1E00, 0x2BFF), (0x3000, 0x9FFF), (0xA000, 0xD7FF))
BLOCKS += ((0xE000, 0xFFFF), (0x10000, 0x1FFFF), (0xE0000, 0x10FFFF))
ODD = (
    " ",
    "  ",
    "\u2028",
    "\x1c",
    "\x85",
    "\xa0",
    "\u3000",
    "\u200b",
    "\ufeff",
    "\x00",
    "&amp;",
    "'s",
    "'LL",
    "ſ",
    "İ",
)
ODD += ("<start_of_text>", "<end_of_text>")


def random_text(source: random.Random) -> str:
    letters = (chr(source.randint(*source.choice(BLOCKS))) for _ in range(source.randrange(1, 24)))
    return "".join(source.choice(ODD) if source.random() < 0.15 else letter for letter in letters)


def test_tokens_of_random_unicode_equal_open_clips():
    source = random.Random(20)
    for text in (random_text(source) for _ in range(1000)):
        assert encode(text) == theirs().encode(text), text


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_tokens_of_a_million_random_texts_equal_open_clips():
    source = random.Random(21)
    for text in (random_text(source) for _ in range(1_000_000)):
        assert encode(text) == theirs().encode(text), text


def test_many_texts_at_once_get_the_tokens_of_each_alone_whatever_was_read_before(monkeypatch):
    source = random.Random(22)
    texts = [random_text(source) for _ in range(200)] + TEXTS
    alone = np.concatenate([tokenize_numpy([text]) for text in texts])
    monkeypatch.setattr(tokens, "AT_ONCE", 7)
    monkeypatch.setattr(tokens, "REMEMBERED", 3)  # pieces are forgotten all the time
    assert np.array_equal(tokenize_numpy(texts), alone)
    assert tokenize_numpy([]).shape == (0, 77)


def test_tokens_of_drawn_captions_equal_open_clips(drawn):
    import json

    for record in json.loads((drawn / "reid_raw.json").read_text()):
        for caption in record["captions"]:
            assert encode(caption) == theirs().encode(caption)
