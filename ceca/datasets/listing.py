"""A listing of a source's records, on disk: a manifest of any length takes little memory.

Notable: SQLite joins the records of one image, which may stand anywhere in a file, and sorts beyond the memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from ceca.data.store import Reject
from ceca.datasets.records import SPLITS, Caption, DatasetError, Record, join


@dataclasses.dataclass(frozen=True)
class Count:
    """Size of a split. A count is None where the publication does not report it."""

    images: int
    identities: int
    captions: int | None = None


class Listing:
    """Records in the order of their source, one per image, and the rejects of the source.

    Args:
        rows: what the source yields.
    """

    def __init__(self, rows: Iterable[Record | Reject]):
        self._folder = tempfile.TemporaryDirectory(prefix="ceca-listing-")
        self._base = sqlite3.connect(f"{self._folder.name}/listing", isolation_level=None)
        self._base.execute("PRAGMA journal_mode = OFF")
        self._base.execute("PRAGMA synchronous = OFF")
        self._base.execute("CREATE TABLE found (row INTEGER PRIMARY KEY, image TEXT, record TEXT)")
        self._base.execute("CREATE TABLE kept (row INTEGER PRIMARY KEY, image TEXT, split TEXT, identity INTEGER)")
        self.rejects: list[Reject] = []
        self._captions = dict.fromkeys(SPLITS, 0)
        self.timed = self.tracked = False  # whether a record has a time, a tracklet
        digest = hashlib.sha256()
        self._base.execute("BEGIN")
        self._base.executemany("INSERT INTO found (image, record) VALUES (?, ?)", self._written(rows))
        self._base.execute("CREATE INDEX by_image ON found (image, row)")
        self._base.executemany("INSERT INTO kept VALUES (?, ?, ?, ?)", self._joined(digest))
        self._base.execute("CREATE INDEX kept_by_image ON kept (image)")
        self._base.execute("COMMIT")
        self.digest = digest.hexdigest()

    def __enter__(self) -> Listing:
        return self

    def __exit__(self, *_: object) -> None:
        self._base.close()
        self._folder.cleanup()

    def _written(self, rows: Iterable[Record | Reject]) -> Iterator[tuple[str, str]]:
        for row in rows:
            if isinstance(row, Reject):
                self.rejects.append(row)
            else:
                yield row.image_id, write_record(row)

    def _joined(self, digest: Any) -> Iterator[tuple[int, str, str, int]]:
        """Join the records of an image, write the joined one in the place of the first, and yield what is counted."""
        repeated = self._base.execute(
            "SELECT image, row, record FROM found WHERE image IN "
            "(SELECT image FROM found GROUP BY image HAVING count(*) > 1) ORDER BY image, row"
        )
        for _, group in itertools.groupby(repeated, key=lambda row: row[0]):
            (_, first, written), *others = group
            whole = read_record(written)
            for _, number, other in others:
                joined = join(whole, read_record(other))
                if isinstance(joined, Reject):
                    self.rejects.append(joined)
                else:
                    whole = joined
                self._base.execute("DELETE FROM found WHERE row = ?", (number,))
            self._base.execute("UPDATE found SET record = ? WHERE row = ?", (write_record(whole), first))
        for row, image, written in self._base.execute("SELECT row, image, record FROM found ORDER BY row"):
            digest.update(written.encode() + b"\n")
            record = read_record(written)
            self._captions[record.split] += len(record.captions)
            self.timed = self.timed or record.time is not None
            self.tracked = self.tracked or record.tracklet is not None
            yield row, image, record.split, record.identity

    def __len__(self) -> int:
        return int(self._base.execute("SELECT count(*) FROM kept").fetchone()[0])

    def refuse_empty(self, place: str) -> None:
        """Refuse a source without a usable record.

        Args:
            place: the source, for people.

        Raises:
            DatasetError: there is none; the message has the most common reasons.
        """
        if len(self):
            return
        reasons = Counter(f"{reject.reason} ({reject.detail})" for reject in self.rejects).most_common(3)
        common = "; ".join(f"{count} x {reason}" for reason, count in reasons)
        raise DatasetError(f"{place}: none of its {len(self.rejects)} records can be used; most common: {common}")

    def counts(self) -> dict[str, Count]:
        """Size of each split that has records. Images of nobody are of one person each."""
        rows = self._base.execute(
            "SELECT split, count(*), count(DISTINCT nullif(identity, -1)), sum(identity = -1) FROM kept GROUP BY split"
        )
        found = {split: Count(images, people + nobody, self._captions[split]) for split, images, people, nobody in rows}
        return {split: found[split] for split in SPLITS if split in found}

    def lacks(self, images: Iterable[str]) -> list[str]:
        """Those of these image ids that are not listed."""
        ask = "SELECT 1 FROM found WHERE image = ?"
        return [image for image in images if self._base.execute(ask, (image,)).fetchone() is None]

    def leave_out(self, images: Iterable[str]) -> None:
        """Leave out images by id."""
        self._base.executemany("DELETE FROM kept WHERE image = ?", ((image,) for image in images))

    def cut(self, size: int, limit: int | None = None) -> Iterator[list[str]]:
        """Cut the records into units of at most `size`, as text (`read_record`).

        Args:
            size: records of a unit.
            limit: only this number of records, from the first; None means all.
        """
        rows = self._base.execute(
            "SELECT record FROM found JOIN kept USING (row) ORDER BY row LIMIT ?", (-1 if limit is None else limit,)
        )
        while unit := [written for (written,) in itertools.islice(rows, size)]:
            yield unit


def write_record(record: Record) -> str:
    """A record as one line of JSON. Its digest decides a version: without a tracklet it is as before there were any."""
    values = [getattr(record, field.name) for field in dataclasses.fields(record)]
    return json.dumps(values if record.tracklet is not None else values[:-1])


def read_record(line: str) -> Record:
    """Read what `write_record` wrote."""
    path, identity, split, captions, *rest = json.loads(line)
    return Record(path, identity, split, tuple(Caption(*caption) for caption in captions), *rest)
