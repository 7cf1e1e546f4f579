"""Check and decode encoded images.

Every picture reaches every model as a viewer shows it, through `open_image`: 16-bit grey is scaled to 8 bits, EXIF's
orientation is applied, transparent pictures lie on white, colours are converted to sRGB, and of an animation the first
frame counts.
"""

import functools
import io
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from ceca.datasets.costs import why_costly

MAX_PIXELS = 50_000_000  # a pedestrian crop has about 30,000; a much larger image is a mistake or an attack
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
COLOUR_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # mode of an image → colour space of its ICC profile
SRGB_GAMMA = 1 / 2.2  # of a PNG file that needs no correction
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation → what turns the image upright; 1 and unknown numbers change nothing


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
    """Decode an image to RGB, as a viewer shows it. What decoding costs is checked before the pixels are decoded.

    Args:
        content: encoded image.
        max_pixels: largest accepted number of pixels.

    Raises:
        ImageError: the bytes are not an image in one of FORMATS, or the image is too large, takes too
            long to decode, or is truncated.
    """
    return _as_shown(_decode(content, max_pixels))


def plain_image(content: bytes) -> bytes:
    """Encode an image such that every program shows the same, for models that decode it themselves.

    Args:
        content: encoded image.

    Returns:
        The same bytes if no program can misread them, else a PNG of what `open_image` returns.

    Raises:
        ImageError: the image cannot be decoded (see `open_image`).
    """
    image = _decode(content, MAX_PIXELS)
    special = "icc_profile" in image.info or image.has_transparency_data or getattr(image, "n_frames", 1) > 1
    if image.mode in ("L", "RGB") and not special and _orientation(image) == 1 and _gamma(image) is None:
        return content
    buffer = io.BytesIO()
    _as_shown(image).save(buffer, "PNG")
    return buffer.getvalue()


def _decode(content: bytes, max_pixels: int) -> Image.Image:
    """Decode an image in its own mode; see `open_image`."""
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
    except Exception as error:  # Pillow raises what a damaged file makes its readers raise
        raise ImageError("truncated_image", str(error)) from None
    if image.mode == "P" and image.palette is None:
        raise ImageError("truncated_image", "its colours are numbers in a palette, and it has no palette")
    return image


def _as_shown(image: Image.Image) -> Image.Image:
    """Convert a decoded image of any mode to RGB, as a viewer shows it."""
    shown = _in_srgb(image)
    if image.has_transparency_data:
        background = Image.new("RGB", image.size, "white")
        background.paste(shown, mask=_opacity(image))
        shown = background
    turn = TURNS.get(_orientation(image))
    return shown if turn is None else shown.transpose(turn)


def _in_srgb(image: Image.Image) -> Image.Image:
    """The colours of an image as RGB, without its transparency, converted from its ICC profile or gamma to sRGB."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion makes everything above 255 white
        colours = image.convert("I").point([(value + 128) // 257 for value in range(2**16)], "L")
    elif image.mode in ("1", "LA"):
        colours = image.convert("L")
    elif image.mode in COLOUR_SPACES:
        colours = image
    else:  # a palette with transparency loses it with a warning unless it becomes RGBA first
        colours = image.convert("RGBA").convert("RGB")
    transform = _srgb_transform(image.info.get("icc_profile") or b"", colours.mode)
    if transform is not None:
        return transform.apply(colours)
    colours = colours.convert("RGB")
    gamma = _gamma(image)
    if gamma is not None:
        colours = colours.point([round(255 * (value / 255) ** (SRGB_GAMMA / gamma)) for value in range(256)] * 3)
    return colours


@functools.lru_cache(maxsize=8)  # the images of a dataset share few profiles
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The conversion from an ICC profile to sRGB; None if it is sRGB itself, damaged, or for another kind of image."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if opened.profile.xcolor_space.strip() != COLOUR_SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (OSError, ValueError, ImageCms.PyCMSError):
        return None
    if mode != "CMYK":
        steps = np.arange(0, 256, 17, dtype=np.uint8)
        samples = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(len(steps), -1, 3)
        known = Image.fromarray(samples).convert(mode)
        difference = np.asarray(transform.apply(known), int) - np.asarray(known.convert("RGB"), int)
        if np.abs(difference).max() <= 2:  # rounding
            return None
    return transform


def _opacity(image: Image.Image) -> Image.Image:
    """Mask of a transparent image: 0 where nothing is to be seen."""
    if image.mode.startswith("I"):  # one value of 16 bits is transparent
        return Image.fromarray(np.asarray(image) != image.info["transparency"])
    return image.convert("RGBA").getchannel("A")


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation of an image, 1 to 8; 1 is upright, and stands for EXIF data that cannot be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises whatever the damage leads to
        return 1
    return orientation if orientation in TURNS else 1


def _gamma(image: Image.Image) -> float | None:
    """Gamma of a PNG file without a colour profile; None if it is about that of sRGB."""
    gamma = image.info.get("gamma")
    if not gamma or "srgb" in image.info or "icc_profile" in image.info or abs(gamma / SRGB_GAMMA - 1) < 0.05:
        return None
    return float(gamma)


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


def decode_image(content: bytes, height: int, width: int, resize: str = "bicubic") -> np.ndarray:
    """Decode and resize an image.

    Args:
        content: encoded image.
        height: height of the result in pixels.
        width: width of the result in pixels.
        resize: `bicubic` or `bilinear`, with antialiasing, as Pillow and torchvision do it.

    Returns:
        uint8 [height, width, 3].

    Raises:
        ImageError: the image cannot be decoded (see `open_image`).
    """
    image = open_image(content)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling[resize.upper()])
    return np.asarray(image)
