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
from ceca.datasets.sources.lance import read_lance
from ceca.datasets.sources.tars import read_members

PEEKED = 100  # rows that tell the columns


@dataclasses.dataclass
class Source:
    """A source of images.

    Attributes:
        name: its form, such as `folder` or `cuhk_pedes`.
        place: what is read, for people.
        files: its pictures that are files.
        list_rows: yields the rows of each of its files.
        columns: columns that somebody named: what they say → their names.
        base_name: only the last part of an image's path counts.
        share: shares of train, val and test of images without a split; None makes them the gallery.
        found: what the columns of its first file say, once `records` began.
    """

    name: str
    place: str
    files: Files
    list_rows: Callable[[], Iterable[Iterable[Row | Reject]]]
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
        problem = ""
        for rows in map(iter, self.list_rows()):
            peeked = list(itertools.islice(rows, PEEKED))
            there = dict.fromkeys(column for row in peeked if isinstance(row, Row) for column in row.values)
            if not there:
                problem = problem or next((f"; first: {row.detail}" for row in peeked if isinstance(row, Reject)), "")
                continue
            columns = find_columns(list(there), self.columns, self.place)
            self.found = self.found or columns
            reader = RowReader(columns, self.files.root, self.base_name, self.share)
            for row in itertools.chain(peeked, rows):
                if isinstance(row, Reject):
                    yield row
                else:
                    yield from reader.read(row)
        if not self.found:
            raise DatasetError(f"nothing to read in {self.place}{problem}")

    def read(self, records: Sequence[Record]) -> list[bytes | Reject]:
        """The bytes of images, or why there are none.

        Raises:
            StoreError: the source cannot be read.
        """
        contents: dict[int, bytes | Reject] = {}
        alone = [number for number, record in enumerate(records) if not record.place or len(record.place) < 4]
        for number, content in zip(alone, self.files.read([records[n].source_path for n in alone]), strict=True):
            contents[number] = content
        inside = [
            (file, column, first, second, number)
            for number, record in enumerate(records)
            for file, first, second, column in ([record.place] if record.place and len(record.place) == 4 else [])
        ]
        for (file, column), group in itertools.groupby(sorted(inside), key=lambda place: place[:2]):
            *_, firsts, seconds, numbers = zip(*group, strict=True)
            places = list(zip(firsts, seconds, strict=True))
            for number, held in zip(numbers, self._inside(file, column, places), strict=True):
                path = records[number].source_path
                contents[number] = held or Reject(path, "missing_file", f"{path} is an empty cell")
        return [contents[number] for number in range(len(records))]

    def _inside(self, file: str, column: str, places: list[tuple[int, int]]) -> list[bytes | None]:
        path = f"{self.files.root}/{file}".rstrip("/")
        try:
            if self.name == "lance":
                return list(read_lance(self.files.fs, path, column, places))
            if file.endswith(".tar"):
                return list(read_members(self.files.fs, path, places))
            return list(read_cells(self.files.fs, path, column, places))
        except (OSError, KeyError, ValueError) as error:  # of pyarrow too
            raise StoreError(f"cannot read {path}: {type(error).__name__}: {error}; was it changed?") from error
