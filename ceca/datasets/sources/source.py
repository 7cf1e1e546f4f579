"""One source: what it says about its images, and their bytes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ceca.data.store import Reject, StoreError
from ceca.datasets.records import DatasetError, Record
from ceca.datasets.rows import Row, RowReader, find_columns
from ceca.datasets.sources.arrow import read_cells
from ceca.datasets.sources.files import Files
from ceca.datasets.sources.tars import read_members

PEEKED = 100  # rows that tell the columns


@dataclasses.dataclass
class Source:
    """A source of images.

    Attributes:
        name: its form, such as `folder` or `cuhk_pedes`.
        place: what is read, for people.
        files: its pictures that are files.
        list_rows: yields its rows.
        columns: columns that somebody named: what they say → their names.
        base_name: only the last part of an image's path counts.
        share: shares of train, val and test of images without a split; None makes them the gallery.
        found: what the columns say, once `records` began.
    """

    name: str
    place: str
    files: Files
    list_rows: Callable[[], Iterable[Row | Reject]]
    columns: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    base_name: bool = False
    share: Sequence[float] | None = None
    found: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @property
    def fingerprint(self) -> str | None:
        """Digest of what decides the records, if it is known without listing them."""
        return None

    @property
    def attributes(self) -> dict[str, Any] | None:
        """Ground truth of drawn pedestrians, {"vocabulary": …, "images": […]}; None of other sources."""
        return None

    def records(self) -> Iterator[Record | Reject]:
        """Yield a record per row, and a reject for each that cannot be used, one at a time.

        Raises:
            DatasetError: there is nothing to read, or a file or its columns cannot be read.
        """
        rows = iter(self.list_rows())
        peeked = list(itertools.islice(rows, PEEKED))
        there = dict.fromkeys(column for row in peeked if isinstance(row, Row) for column in row.values)
        if not there:
            problem = f"; first: {peeked[0].detail}" if peeked and isinstance(peeked[0], Reject) else ""
            raise DatasetError(f"nothing to read in {self.place}{problem}")
        self.found = find_columns(list(there), self.columns, self.place)
        reader = RowReader(self.found, self.files.root, self.base_name, self.share)
        for row in itertools.chain(peeked, rows):
            if isinstance(row, Reject):
                yield row
            else:
                yield from reader.read(row)

    def read(self, records: Sequence[Record], column: str = "") -> list[bytes | Reject]:
        """The bytes of images, or why there are none.

        Args:
            records: the images.
            column: the column of images inside a table.

        Raises:
            StoreError: the source cannot be read.
        """
        inside = [number for number, record in enumerate(records) if record.place and len(record.place) == 3]
        alone = sorted(set(range(len(records))) - set(inside))
        contents: dict[int, bytes | Reject] = dict(
            zip(alone, self.files.read([records[number].source_path for number in alone]), strict=True)
        )
        by_place = sorted(inside, key=lambda number: tuple(records[number].place or ()))
        for file, numbers in itertools.groupby(by_place, key=lambda number: (records[number].place or ("",))[0]):
            group = list(numbers)
            places = [(place[1], place[2]) for number in group if (place := records[number].place)]
            for number, content in zip(group, self._inside(file, column, places), strict=True):
                path = records[number].source_path
                contents[number] = content or Reject(path, "missing_file", f"{path} is an empty cell")
        return [contents[number] for number in range(len(records))]

    def _inside(self, file: str, column: str, places: list[tuple[int, int]]) -> list[bytes | None]:
        path = f"{self.files.root}/{file}"
        try:
            if file.endswith(".tar"):
                return list(read_members(self.files.fs, path, places))
            return list(read_cells(self.files.fs, path, column, places))
        except (OSError, KeyError, ValueError) as error:  # of pyarrow too
            raise StoreError(f"cannot read {path}: {type(error).__name__}: {error}; was it changed?") from error
