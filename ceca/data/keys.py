"""Keys of images as numbers: half the memory of their 16 hex digits, sorted and joined by NumPy."""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

AT_ONCE = 2**18  # keys that are looked up together: a few MB, however many there are
DIGITS = 16  # of a key, see `ceca.data.schema.image_id`
_NOWHERE = np.zeros(1, np.int64)


def numbers(ids: pa.Array | pa.ChunkedArray | Iterable[str]) -> np.ndarray:
    """Keys as numbers, [N] uint64.

    Args:
        ids: the keys, 16 hex digits each.

    Raises:
        ValueError: one of them is no key.
    """
    if not isinstance(ids, pa.Array | pa.ChunkedArray):
        ids = pa.array(ids, pa.string())
    whole = (ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids).cast(pa.large_binary())
    try:
        _, ends, content = whole.buffers()
        places = np.frombuffer(ends, np.int64)[whole.offset : whole.offset + len(whole) + 1] if len(whole) else _NOWHERE
        digits = bytes(content[places[0] : places[-1]]) if content is not None else b""
        if whole.null_count or (np.diff(places) != DIGITS).any() or digits != digits.lower():
            raise ValueError
        return np.frombuffer(binascii.unhexlify(digits), ">u8").astype(np.uint64)
    except ValueError:
        raise ValueError(f"keys of images have {DIGITS} hex digits, and some of these do not") from None


def known_numbers(ids: Iterable[str]) -> np.ndarray:
    """Keys as numbers, [N] uint64, without ids that no image of a table can have: records of removals may name any."""
    return numbers([image_id for image_id in ids if re.fullmatch(f"[0-9a-f]{{{DIGITS}}}", image_id)])


def spelled(keys: np.ndarray) -> list[str]:
    """Keys as 16 hex digits again."""
    return [f"{key:0{DIGITS}x}" for key in keys.tolist()]


class Positions:
    """Finds positions of keys.

    Args:
        keys: [N] uint64 in any order.
        first: the first position of a repeated key counts, and not the last.
    """

    def __init__(self, keys: np.ndarray, *, first: bool = False):
        self.order = np.argsort(keys, kind="stable").astype(np.int32)
        self.sorted = keys[self.order]
        self.first = first

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """The position of each wanted key, [M] int64; -1 where it is not among the keys."""
        found = np.full(len(wanted), -1)
        for start in range(0, len(wanted) if len(self.sorted) else 0, AT_ONCE):
            some = wanted[start : start + AT_ONCE]
            by_size = np.argsort(some)  # neighbours are then found in memory that was just read: ten times as fast
            asked = some[by_size]
            if self.first:
                place = np.minimum(np.searchsorted(self.sorted, asked), len(self.sorted) - 1)
            else:
                place = np.maximum(np.searchsorted(self.sorted, asked, side="right") - 1, 0)
            found[start + by_size] = np.where(self.sorted[place] == asked, self.order[place], -1)
        return found

    def unique(self) -> np.ndarray:
        """The keys, each once, sorted."""
        return self.sorted[np.diff(self.sorted, prepend=~self.sorted[:1]) != 0]

    def of(self, key: str) -> int | None:
        """The position of one key, given by its hex digits; None if it is not among the keys."""
        (position,) = self.find(np.array([int(key, 16)], np.uint64)).tolist()
        return None if position < 0 else position
