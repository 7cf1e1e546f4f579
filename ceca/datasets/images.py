"""Encoded images: checking and decoding them."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 50_000_000  # a pedestrian crop has about 30,000; far larger is a mistake or an attack
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


class ImageError(ValueError):
    """Bytes that are not a usable image: `reason` in snake_case, `detail` for a person."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def open_image(content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode to RGB, where the header tells of few enough pixels.

    Raises:
        ImageError: not an image, of another format, too large, or truncated.
    """
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
    """Of an encoded image, by its first bytes."""
    if content.startswith(b"\x89PNG"):
        return "image/png"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "image/webp"
    return "image/bmp" if content.startswith(b"BM") else "image/jpeg"


def check_image(content: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of an image that decodes to its last row; raises ImageError."""
    return open_image(content, max_pixels).size


def decode_image(content: bytes, height: int, width: int) -> np.ndarray:
    """Decode and resize: uint8 [height, width, 3]. Raises ImageError."""
    image = open_image(content)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)
