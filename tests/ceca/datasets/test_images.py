"""Encoded images: valid ones decode to the requested size, and each kind of damage has its own reason."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ceca.datasets.images import ImageError, check_image, decode_image, mime_type


def encoded(format: str, mode: str = "RGB", size: tuple[int, int] = (20, 40)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("format", "mode", "mime"),
    [
        ("JPEG", "RGB", "image/jpeg"),
        ("JPEG", "L", "image/jpeg"),
        ("JPEG", "CMYK", "image/jpeg"),
        ("PNG", "RGBA", "image/png"),
        ("PNG", "P", "image/png"),
        ("WEBP", "RGB", "image/webp"),
        ("BMP", "RGB", "image/bmp"),
    ],
)
def test_every_accepted_format_and_mode_decodes_to_rgb_of_the_requested_size(format: str, mode: str, mime: str):
    content = encoded(format, mode)
    assert check_image(content) == (20, 40)
    pixels = decode_image(content, height=64, width=32)
    assert (pixels.shape, pixels.dtype) == ((64, 32, 3), np.uint8)
    assert mime_type(content) == mime


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not_an_image"),
        (b"this is text", "not_an_image"),
        (encoded("GIF", "P"), "not_an_image"),
        (encoded("JPEG")[:-200], "truncated_image"),
        (encoded("PNG")[:-200], "truncated_image"),
        (encoded("PNG", "1", (8000, 8000)), "image_too_large"),
    ],
)
def test_unusable_bytes_have_a_reason(content: bytes, reason: str):
    with pytest.raises(ImageError) as caught:
        check_image(content)
    assert caught.value.reason == reason


WHOLE = encoded("JPEG")


@given(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=40))
def test_damaged_bytes_decode_or_raise_an_image_error(position: int, damage: bytes):
    content = WHOLE[:position] + damage + WHOLE[position + len(damage) :]
    try:
        shape = decode_image(content, 16, 8).shape
    except ImageError as error:
        reason = error.reason
    else:
        reason = "none" if shape == (16, 8, 3) else "wrong shape"
    assert reason in ("none", "not_an_image", "truncated_image", "image_too_large")
