"""Small files that take seconds to decode are refused in milliseconds, and what encoders write is not."""

from __future__ import annotations

import io
import re
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from ceca.datasets.costs import MAX_SCANS, why_costly
from ceca.datasets.images import ImageError, check_image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def scan_bomb(scans: int, size: tuple[int, int] = (4000, 4000), mode: str = "RGB") -> bytes:
    """A progressive JPEG whose last scan is there `scans` times."""
    content = encoded(Image.new(mode, size), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * scans + b"\xff\xd9"


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


SMALL_JPEG, SMALL_PNG = (encoded(Image.new("L", (64, 64)), kind) for kind in ("JPEG", "PNG"))
SMALL_WEBP = encoded(Image.new("RGB", (64, 64)), "WEBP")


def run_length_encoded(side: int) -> bytes:
    """A BMP of one run per pixel."""
    runs = (b"\x01\x05" * side + b"\0\0") * side + b"\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(runs), 0, 0, 1078) + header + bytes(1024) + runs


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (scan_bomb(7_000), "scans of 16,000,000 pixels"),
        (scan_bomb(7_000, mode="L"), "scans of 16,000,000 pixels"),
        (scan_bomb(60), "scans of 16,000,000 pixels"),  # few enough, but of too many pixels
        (scan_bomb(MAX_SCANS, (64, 64)), "scans of 4,096 pixels"),
        (SMALL_JPEG[:2] + b"\xff\xfe\x00\x02" * 1_000_000 + SMALL_JPEG[2:], "pieces"),
        (SMALL_JPEG[:2] + b"\xff" * 4_000_000 + SMALL_JPEG[2:], "pieces"),  # fill bytes
        (SMALL_JPEG[:2] + b"\xff\xd0" * 2_000_000 + SMALL_JPEG[2:], "pieces"),  # restart markers
        (SMALL_PNG[:33] + chunk(b"prVt", b"") * 300_000 + SMALL_PNG[33:], "pieces"),
        (SMALL_PNG[:33] + chunk(b"tEXt", b"a\0b") * 300_000 + SMALL_PNG[33:], "pieces"),
        (SMALL_WEBP + b"JUNK\0\0\0\0" * 300_000, "pieces"),
        (run_length_encoded(2_000), "run-length encoded"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value,
)
def test_what_takes_seconds_to_decode_is_refused_in_milliseconds(content: bytes, says: str) -> None:
    started = time.process_time()
    with pytest.raises(ImageError, match=says) as refused:
        check_image(content)
    assert time.process_time() - started < 0.5
    assert refused.value.reason == "costly_image"


def test_what_encoders_write_is_decoded() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    profile = Image.Exif()
    profile[0x010E] = "a description " * 1_000
    for content in (
        encoded(image, "JPEG", quality=95, progressive=True, exif=profile, icc_profile=bytes(200_000)),
        encoded(image, "JPEG", quality=95, restart_marker_blocks=1),  # thousands of restart markers
        encoded(image, "PNG", compress_level=0),
        encoded(image, "WEBP", lossless=True, exif=profile),
        encoded(image, "BMP"),
        run_length_encoded(100),
        scan_bomb(MAX_SCANS - 10, (64, 64)),
    ):
        assert why_costly(content) == ""
        assert check_image(content)
    small = encoded(Image.new("1", (5_000, 3_000)), "PNG")
    (idat,) = re.findall(rb"IDAT(.*)....\0\0\0\0IEND", small, re.DOTALL)
    pieces = b"".join(chunk(b"IDAT", idat[start : start + 64]) for start in range(0, len(idat), 64))
    assert check_image(small[:33] + pieces + chunk(b"IEND", b"")) == (5_000, 3_000)


def test_a_size_that_is_too_large_is_called_that() -> None:
    huge = SMALL_JPEG.replace(b"\x00\x40\x00\x40", b"\xff\xff\xff\xff")
    with pytest.raises(ImageError) as refused:
        check_image(huge)
    assert refused.value.reason == "image_too_large"


@pytest.mark.parametrize("whole", [SMALL_JPEG, SMALL_PNG, SMALL_WEBP, run_length_encoded(8), scan_bomb(3, (64, 64))])
def test_every_start_of_an_image_is_looked_at_without_an_exception(whole: bytes) -> None:
    for length in range(min(len(whole), 700)):
        assert isinstance(why_costly(whole[:length]), str)
