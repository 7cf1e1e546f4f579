"""Named records that every source yields: an image, what is known of it, and where its bytes are."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NamedTuple

from ceca.data.schema import NOBODY, caption_id
from ceca.data.schema import image_id as image_id_of
from ceca.data.store import Reject
from ceca.errors import UserError

SPLITS = ("train", "val", "test")
GALLERY = "test"  # split of an image whose source names none
# A number made of a name lies above all numbers that people give, and a web page reads it without rounding.
NAMED = 2**52


class DatasetError(UserError):
    """The source does not hold a dataset that can be read."""


class Caption(NamedTuple):
    """A caption and its position in the record's list of captions."""

    position: int
    text: str


@dataclasses.dataclass(frozen=True)
class Record:
    """An image and what its source says about it.

    Attributes:
        source_path: path of the image in its source; decides its id.
        identity: number of the person, or `NOBODY`.
        split: one of SPLITS.
        captions: usable captions.
        camera: name of the camera.
        time: time of the picture, ISO 8601 in UTC.
        place: where the bytes are, if they are not a file: (file, number, number, column), as its reader understands
            it; or the size of the file.
        tracklet: name of the tracklet, unique among those of the camera.
    """

    source_path: str
    identity: int
    split: str
    captions: tuple[Caption, ...]
    camera: str | None = None
    time: str | None = None
    place: Sequence[Any] | None = None
    tracklet: str | None = None

    @property
    def image_id(self) -> str:
        return image_id_of(self.source_path)


def is_text(text: str) -> bool:
    """Whether a text can be stored: JSON can spell halves of surrogate pairs, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def read_captions(
    captions: Sequence[Any], path: str, earlier: Sequence[Caption] = ()
) -> tuple[tuple[Caption, ...], list[Reject]]:
    """Usable captions of a record and a reject for each other one.

    Args:
        captions: what the record lists.
        path: the image's path.
        earlier: captions of an earlier record of the same image; a repetition of them is left out.
    """
    first = max((caption.position for caption in earlier), default=-1) + 1
    known = {caption.text for caption in earlier}
    usable: list[Caption] = []
    rejects = []
    for number, text in enumerate(captions, first):
        if not isinstance(text, str) or not text.strip():
            reason, detail = "empty_caption", f"caption {number} of {path} is {text!r:.100}"
        elif not is_text(text):
            reason, detail = "bad_caption", f"caption {number} of {path} has half a character: {text!r:.100}"
        else:
            if text.strip() not in known:
                usable.append(Caption(number, text.strip()))
            continue
        rejects.append(Reject(caption_id(image_id_of(path), number), reason, detail))
    return tuple(usable), rejects


def join(earlier: Record, later: Record) -> Record | Reject:
    """Join two records of one image: some files have a record per caption.

    Returns:
        The earlier record with the captions of both, or why the later one is left out.
    """
    if (earlier.identity, earlier.split) != (later.identity, later.split):
        detail = f"named again as {later.identity} in {later.split}; {earlier.identity} in {earlier.split} is kept"
        return Reject(later.source_path, "duplicated_record", detail)
    texts = [caption.text for caption in later.captions]
    captions, _ = read_captions(texts, earlier.source_path, earlier.captions)
    if not captions:
        return Reject(later.source_path, "duplicated_record", "repeats an earlier record, which is kept")
    return dataclasses.replace(earlier, captions=(*earlier.captions, *captions))


def read_identity(value: Any) -> int | None:
    """The number of a person; `NOBODY` if the value is empty, None if it cannot be one.

    A whole number stands for itself, also as text. Any other text gets a number that is made from it, always the same.

    >>> read_identity("0012"), read_identity(12.0), read_identity(""), read_identity("Ann") == read_identity("Ann")
    (12, 12, -1, True)
    """
    if value is None or value != value:  # a missing number is NaN
        return NOBODY
    if isinstance(value, bool):
        return None
    if isinstance(value, float | Decimal):
        value = int(value) if math.isfinite(value) and value == int(value) else None
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else None
    if not isinstance(value, str) or not is_text(value):
        return None
    text = value.strip()
    if text.lower() in ("", "nan", "none", "null"):
        return NOBODY
    if re.fullmatch(r"-?\d{1,15}(\.0*)?", text, re.ASCII):
        return int(text.partition(".")[0])
    return NAMED + int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % NAMED


def parse_int(digits: str) -> float:
    """A number of a JSON file. One of thousands of digits, which Python refuses, becomes infinite: its row is bad."""
    return int(digits) if len(digits) < 1000 else math.inf


def read_time(value: Any) -> str | None:
    """The time of a picture as ISO 8601 in UTC.

    Args:
        value: ISO 8601, seconds or milliseconds since 1970, or a datetime; UTC unless it says otherwise.

    Raises:
        ValueError: the value is none of these.
    """
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str):
        value = float(value) if re.fullmatch(r"\d{9,}(\.\d+)?", value.strip(), re.ASCII) else value
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            when = datetime.fromtimestamp(value / 1000 if value > 1e11 else value, UTC)
        else:
            when = value if isinstance(value, datetime) else datetime.fromisoformat(str(value).strip())
    except (AttributeError, OverflowError, OSError, TypeError) as error:
        raise ValueError(str(error)) from None
    try:
        return (when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)).isoformat()
    except OverflowError as error:  # in UTC it is before the year 1 or after the year 9999
        raise ValueError(str(error)) from None
