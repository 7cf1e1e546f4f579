"""Stored objects that hold an edition's rows: parts of its tables, and objects of images added since."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from ceca.data.changes import read_added
from ceca.data.store import Manifest, Store
from ceca.search.edition import Edition


@dataclasses.dataclass(frozen=True)
class StoredPart:
    """A part of a table."""

    store: Store
    manifest: Manifest
    number: int

    @property
    def digest(self) -> str:
        return self.manifest.parts[self.number].sha256

    @property
    def together(self) -> int:
        """Number of such objects that one thread reads one after the other."""
        return self.store.together(self.manifest)

    def describe(self, columns: list[str]) -> pa.Table:
        """Small columns, read alone."""
        return self.store.read_columns(self.manifest, self.number, columns)

    def read(self, columns: list[str]) -> pa.Table:
        """Columns of the whole part, after its digest was checked."""
        return self.store.read_part(self.manifest, self.number, columns)

    def take(self, rows: Sequence[int], columns: list[str]) -> pa.Table:
        """Columns of some rows."""
        return self.store.take(self.manifest, [(self.number, row) for row in rows], columns)


@dataclasses.dataclass(frozen=True)
class AddedObject:
    """An object of `added`: images that were added one by one, with all that is known of them."""

    edition: Edition
    name: str
    together = 1

    @property
    def digest(self) -> str:
        return Path(self.name).stem

    def read(self, columns: list[str]) -> pa.Table:
        return read_added(self.edition.store, self.edition.digest, self.name, columns)

    describe = read

    def take(self, rows: Sequence[int], columns: list[str]) -> pa.Table:
        return self.read(columns).take(list(rows))


Source = StoredPart | AddedObject


def list_sources(edition: Edition, table: str) -> list[Source]:
    """The stored objects that hold an edition's rows of `gallery`, `images` or `dialogues`.

    Raises:
        StoreError: the version of the table is gone.
    """
    manifest = edition.told() if table == "dialogues" else edition.manifest(table)
    parts = [StoredPart(edition.store, manifest, number) for number in range(len(manifest.parts))] if manifest else []
    return [*parts, *(AddedObject(edition, name) for name in edition.added)]
