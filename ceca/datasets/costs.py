"""What an image costs to decode, told from its bytes alone.

The size in pixels bounds the memory that decoding takes, but not the time: a JPEG may go over all its pixels in
thousands of scans, and any format may consist of millions of pieces that a program reads one by one. Both fit into a
small file. Pieces are counted here before anything is decoded, which takes milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# Encoders write 1 scan, or about 10 if progressive. Each scan goes over all pixels.
USUAL_SCANS, MAX_SCANS = 12, 100
MAX_SCANNED_PIXELS = 1_000_000_000  # scans times pixels: 62 scans of 16 million pixels
# Encoders write pieces of 8 kB and more, besides some dozens of small ones.
MAX_PIECES, BYTES_PER_PIECE = 1_000, 1024
MAX_RUN_LENGTH_BYTES = 512 * 1024  # Pillow unpacks run-length encoded BMPs byte by byte, in Python

MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # after a scan's data; 0xFF 0x00 and restart markers belong to it
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of a frame's header, which holds its size
BARE = {0x01, 0xD8}  # markers without a length, besides restart markers
RUN_LENGTH_ENCODED = (b"\1\0\0\0", b"\2\0\0\0")


def why_costly(content: bytes) -> str:
    """Why an encoded image takes too long to decode; empty if it does not.

    Args:
        content: the encoded image.
    """
    most = MAX_PIECES + len(content) // BYTES_PER_PIECE
    if content.startswith(b"\xff\xd8"):
        return _jpeg(content, most)
    if content.startswith(b"\x89PNG"):
        return _too_many(_png_pieces(content), most)
    if content.startswith(b"RIFF"):
        return _too_many(_webp_pieces(content), most)
    if content.startswith(b"BM") and content[30:34] in RUN_LENGTH_ENCODED and len(content) > MAX_RUN_LENGTH_BYTES:
        return f"a run-length encoded BMP of {len(content):,} bytes, at most {MAX_RUN_LENGTH_BYTES:,}"
    return ""


def _jpeg(content: bytes, most: int) -> str:
    """Go over the markers as libjpeg does. Pillow itself reads those before the first scan, byte by byte."""
    scans = pieces = pixels = between = 0
    place = 2
    while (found := MARKER.search(content, place)) is not None:
        marker, start = content[found.start() + 1], found.end()
        if marker == END_OF_IMAGE:
            break
        pieces += 1
        between += 0 if scans else found.start() - place
        if max(pieces, between) > most:
            return f"more than {most:,} pieces"
        if marker in FRAMES:
            height, width = content[start + 3 : start + 5], content[start + 5 : start + 7]
            pixels = max(pixels, int.from_bytes(height, "big") * int.from_bytes(width, "big"))
        if marker == START_OF_SCAN:
            scans += 1
            if scans > MAX_SCANS or (scans > USUAL_SCANS and scans * pixels > MAX_SCANNED_PIXELS):
                return f"more than {scans - 1} scans of {pixels:,} pixels"
        place = start
        if marker not in BARE:
            place += max(int.from_bytes(content[start : start + 2], "big"), 2)
    return ""


def _png_pieces(content: bytes) -> Iterator[int]:
    """The places of a PNG's pieces: length, name, content, checksum."""
    place = 8
    while place < len(content) and content[place + 4 : place + 8] != b"IEND":
        yield place
        place += 12 + int.from_bytes(content[place : place + 4], "big")


def _webp_pieces(content: bytes) -> Iterator[int]:
    """The places of a WebP's pieces: name, length, content of an even length."""
    place = 12
    while place < len(content):
        yield place
        length = int.from_bytes(content[place + 4 : place + 8], "little")
        place += 8 + length + length % 2


def _too_many(pieces: Iterator[int], most: int) -> str:
    return f"more than {most:,} pieces" if any(number >= most for number, _ in enumerate(pieces)) else ""
