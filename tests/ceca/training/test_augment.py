"""Augmentation of pixels and words: each change does what it says, and workers share one stream of random numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ceca.config import AugmentationConfig
from ceca.model.backbone import tokenize
from ceca.model.embed import MEAN, STD, normalize
from ceca.model.tokens import MASK
from ceca.training.augment import _erased, augment_images, draw, generator, mask_words

NONE = AugmentationConfig(flip=0, pad=0, erase=0, word_mask=0)
IMAGES = torch.randint(0, 256, (6, 12, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_normalisation_is_clips():
    pixel = torch.tensor([10, 128, 250], dtype=torch.uint8)
    pixels = normalize(pixel.expand(1, 2, 2, 3))
    assert pixels.shape == (1, 3, 2, 2)
    expected = [(value / 255 - m) / s for value, m, s in zip(pixel.tolist(), MEAN, STD, strict=True)]
    assert pixels[0, :, 0, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_without_augmentation_pixels_are_only_normalised():
    torch.testing.assert_close(augment_images(IMAGES, draw(6, 5, generator(1)), NONE), normalize(IMAGES))


def test_a_flip_mirrors_left_and_right():
    flipped = augment_images(IMAGES, draw(6, 5, generator(1)), dataclasses.replace(NONE, flip=1))
    torch.testing.assert_close(flipped, normalize(IMAGES).flip(3))


def test_a_crop_shifts_the_image_over_a_black_frame():
    draws = draw(1, 5, generator(1))
    draws = dataclasses.replace(draws, shift=torch.tensor([[0.99, 0.0]]))  # pad 2: two down, two to the left
    (shifted,) = augment_images(IMAGES[:1], draws, dataclasses.replace(NONE, pad=2))
    whole = normalize(IMAGES[:1])[0]
    black = normalize(torch.zeros(1, 12, 8, 3, dtype=torch.uint8))[0]
    torch.testing.assert_close(shifted[:, :10, 2:], whole[:, 2:, :6])
    torch.testing.assert_close(shifted[:, 10:, :], black[:, 10:, :])
    torch.testing.assert_close(shifted[:, :, :2], black[:, :, :2])


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), low=st.floats(0.02, 0.4), extra=st.floats(0, 0.3))
def test_an_erased_area_is_one_rectangle_of_the_size_asked_for(seed: int, low: float, extra: float):
    config = dataclasses.replace(NONE, erase=1, erase_area=(low, low + extra))
    white = torch.full((4, 64, 32, 3), 255, dtype=torch.uint8)
    erased = (augment_images(white, draw(4, 5, generator(seed)), config) == 0).all(dim=1)
    for mask in erased:
        if not mask.any():  # none of ten rectangles fits
            continue
        rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        tall, wide = int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)
        assert int(mask.sum()) == tall * wide
        rounding = (tall + wide) / 2 + 1  # half a pixel per side
        assert low * 64 * 32 - rounding <= tall * wide <= (low + extra) * 64 * 32 + rounding
        assert tall < 64
        assert wide < 32


def kolmogorov_smirnov(first: np.ndarray, second: np.ndarray) -> float:
    """The largest difference of two samples' cumulative distributions."""
    places = np.concatenate([first, second])
    shares = [np.searchsorted(np.sort(sample), places, side="right") / len(sample) for sample in (first, second)]
    return float(np.abs(shares[0] - shares[1]).max())


def test_erased_rectangles_are_distributed_as_torchvisions():
    from torchvision.transforms import RandomErasing  # slow to import

    count, config = 10_000, dataclasses.replace(NONE, erase=1)
    height, width = 384, 128
    ours = []
    for start in range(0, count, 500):
        for mask in _erased(draw(500, 5, generator(start)), config, height, width):
            rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
            tall, wide = int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)
            ours.append((int(rows[0]), int(columns[0]), tall, wide))
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = [
        RandomErasing.get_params(image, scale=config.erase_area, ratio=(0.3, 3.3), value=[0.0])[:4]
        for _ in range(count)
    ]

    def columns(boxes: list[tuple[int, int, int, int]]) -> dict[str, np.ndarray]:
        top, left, tall, wide = np.array(boxes, dtype=float).T
        return {"area": tall * wide, "aspect": tall / wide, "top": top, "left": left}

    for name, values in columns(theirs).items():
        distance = kolmogorov_smirnov(columns(ours)[name], values)
        assert distance < 1.95 * (2 / count) ** 0.5, name  # exceeded once in a thousand draws of one distribution


def test_an_erased_area_has_the_configured_value():
    config = dataclasses.replace(NONE, erase=1, erase_area=(0.2, 0.3), erase_value=(7.0, 8.0, 9.0))
    found = augment_images(torch.zeros(1, 64, 32, 3, dtype=torch.uint8), draw(1, 5, generator(0)), config)[0]
    places = found[0] == 7
    assert places.any()
    for channel, value in enumerate((7.0, 8.0, 9.0)):
        assert torch.equal(found[channel] == value, places)


def test_workers_draw_what_one_worker_draws_for_their_rows():
    whole, again = (draw(8, 77, generator(3, 1, 5)) for _ in range(2))
    for field in dataclasses.fields(whole):
        own = getattr(again.rows(slice(4, 8)), field.name)
        assert torch.equal(own, getattr(whole, field.name)[4:])


def test_every_step_has_its_own_random_numbers():
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1)]
    assert len({float(torch.rand((), generator=generator(*key), dtype=torch.double)) for key in keys}) == len(keys)


TEXT = "a woman in a long grey coat with a fur collar carries a handbag"


def test_words_are_touched_masked_replaced_and_dropped_in_the_published_shares():
    ids = tokenize([TEXT] * 4000)
    words = int(ids[0].argmax()) - 1
    draws = draw(4000, 77, generator(0))
    changed = mask_words(ids, draws, 0.2)
    masked = int((changed == MASK).sum())
    dropped = int((changed == 0).sum() - (ids == 0).sum())
    assert masked / (4000 * words) == pytest.approx(0.2 * 0.6, rel=0.05)
    assert dropped / (4000 * (words - 1)) == pytest.approx(0.2 * 0.2, rel=0.05)  # the first word is never dropped
    whole = changed[(changed == 0).sum(dim=1) == (ids[0] == 0).sum()]
    replaced = ((whole != ids[0]) & (whole != MASK)).float().mean() * 77 / words
    assert float(replaced) == pytest.approx(0.2 * 0.2, rel=0.15)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
def test_a_masked_text_keeps_start_end_and_at_least_one_word(seed: int, share: float):
    ids = tokenize([TEXT, "man", "", "x " * 100])
    changed = mask_words(ids, draw(4, 77, generator(seed)), share)
    ends = changed.argmax(dim=1)
    assert torch.equal(changed[:, 0], ids[:, 0])
    assert torch.equal(changed.amax(dim=1), ids.amax(dim=1))
    assert torch.equal(ends >= 2, ids.argmax(dim=1) >= 2)
    positions = torch.arange(77)
    assert bool(((changed == 0) == (positions > ends[:, None])).all())  # nothing but padding after the end


def test_no_share_touches_nothing():
    ids = tokenize([TEXT])
    assert torch.equal(mask_words(ids, draw(1, 77, generator(0)), 0.0), ids)
