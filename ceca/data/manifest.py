"""A published version of a table: its manifest, and the parts that it names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from ceca.data.filesystems import StoreError
from ceca.data.schema import SCHEMA_VERSION


class MissingPart(StoreError, FileNotFoundError):
    """A part that its manifest names is not there: it has been written again since, or the dataset is not whole."""

    @classmethod
    def at(cls, place: str) -> MissingPart:
        return cls(f"{place} is named by its manifest but missing; run its stage with --redo")


@dataclasses.dataclass(frozen=True)
class Part:
    """One Parquet file of a table: path below the table, number of rows, size in bytes, SHA-256 of the content."""

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Description of a published version of a table.

    `made_from` maps each input, e.g. `images` or `model`, to its version or digest. `config` holds the stage's
    settings, `notes` the stage's own findings, and `created` is the time of publication (UTC).
    """

    table: str
    version: str
    rows: int
    parts: tuple[Part, ...]
    made_from: Mapping[str, str]
    config: Mapping[str, Any]
    notes: Mapping[str, Any]
    created: str
    schema_version: int = SCHEMA_VERSION

    def check(self) -> None:
        """Check the type of each field, which comes from an object that anybody may have written.

        Raises:
            TypeError: a field has another type.
        """
        words: list[Any] = [self.table, self.version, self.created, *self.made_from, *self.made_from.values()]
        numbers = [self.rows]
        for part in self.parts:
            words += [part.path, part.sha256]
            numbers += [part.rows, part.bytes]
        wrong: list[Any] = [word for word in words if not isinstance(word, str)]
        wrong += [number for number in numbers if not isinstance(number, int) or number < 0]
        wrong += [given for given in (self.config, self.notes) if not isinstance(given, dict)]
        if wrong:
            raise TypeError(f"{wrong[0]!r:.60} has the wrong type")

    def places(self, rows: np.ndarray) -> list[tuple[int, int]]:
        """Places (part, row within the part) of rows of the whole table.

        Args:
            rows: [N] numbers of rows, from 0.
        """
        ends = np.cumsum([part.rows for part in self.parts])
        part = np.searchsorted(ends, rows, side="right")
        starts = np.concatenate([[0], ends])[part]
        return list(zip(part.tolist(), (rows - starts).tolist(), strict=True))
