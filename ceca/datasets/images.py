"""Check and decode encoded images."""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from ceca.datasets.costs import why_costly

MAX_PIXELS = 50_000_000  # a pedestrian crop has about 30,000; a much larger image is a mistake or an attack
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


class ImageError(ValueError):
    """The bytes are not a usable image.

    Args:
        reason: short reason in snake_case.
        detail: message for a person.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class Size(NamedTuple):
    """Size of an image in pixels."""

    width: int
    height: int


def open_image(content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image to RGB. What decoding costs in time and memory is checked before the pixels are decoded.

    Args:
        content: encoded image.
        max_pixels: largest accepted number of pixels.

    Raises:
        ImageError: the bytes are not an image in one of FORMATS, or the image is too large, takes too
            long to decode, or is truncated.
    """
    if why := why_costly(content):
        raise ImageError("costly_image", why)
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageError("not_an_image", f"{len(content)} bytes starting {content[:8]!r}") from None
    except Image.DecompressionBombError as error:  # Pillow's own limit
        raise ImageError("image_too_large", str(error)) from None
    except (OSError, ValueError) as error:
        raise ImageError("not_an_image", str(error)) from None
    if image.width * image.height > max_pixels:
        raise ImageError("image_too_large", f"{image.width}x{image.height} pixels, at most {max_pixels:,}")
    try:
        image.load()
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError("truncated_image", str(error)) from None
    return image.convert("RGB")


def mime_type(content: bytes) -> str:
    """Return the MIME type of an encoded image, by its first bytes."""
    if content.startswith(b"\x89PNG"):
        return "image/png"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    return "image/bmp" if content.startswith(b"BM") else "image/jpeg"


def check_image(content: bytes, max_pixels: int = MAX_PIXELS) -> Size:
    """Return the size of an image after decoding all of it.

    Args:
        content: encoded image.
        max_pixels: largest accepted number of pixels.

    Raises:
        ImageError: the image cannot be decoded (see `open_image`).
    """
    return Size(*open_image(content, max_pixels).size)


def decode_image(content: bytes, height: int, width: int) -> np.ndarray:
    """Decode and resize an image.

    Args:
        content: encoded image.
        height: height of the result in pixels.
        width: width of the result in pixels.

    Returns:
        uint8 [height, width, 3].

    Raises:
        ImageError: the image cannot be decoded (see `open_image`).
    """
    image = open_image(content)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)
