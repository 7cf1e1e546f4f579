"""Rows of tables that are text: CSV, JSON lines, and JSON lists and objects of any length."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, TextIO

from ceca.data.store import Reject
from ceca.datasets.records import DatasetError, parse_int
from ceca.datasets.rows import Row

CHUNK = 2**20  # characters read at once
LONGEST = 2**26  # characters of one value in a JSON file
csv.field_size_limit(2**24)

ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")


def text_rows(fs: Any, path: str, name: str) -> Iterator[Row | Reject]:
    """Rows of a file.

    Args:
        fs: its filesystem.
        path: its path; .gz and other compressed files are read too.
        name: its name, for people.

    Raises:
        DatasetError: it is no such file.
    """
    # A character that is no UTF-8 spoils its row and no other: such a text is refused later.
    with (
        _explained(name),
        fs.open(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="", compression="infer") as file,
    ):
        kind = ending(path)
        if kind in (".csv", ".tsv"):
            yield from csv_rows(file, name)
        elif kind == ".json":
            yield from _json_rows(file, name)
        else:
            yield from _line_rows(file, name)


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn the errors of unpacking into one that names the file."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{name} cannot be unpacked ({type(error).__name__}: {error}); download it again") from None
    except OSError as error:
        if error.errno is not None:  # of the disk; bz2 and zstd raise it without a number
            raise
        raise DatasetError(f"{name} cannot be unpacked ({error}); download it again") from None


def ending(path: str) -> str:
    """The ending that says what a file is, without that of its compression.

    >>> ending("a/people.CSV.gz"), ending("a/people"), ending("shard-0.tar")
    ('.csv', '', '.tar')
    """
    found = re.search(r"(\.\w+?)(\.(gz|bz2|xz|zst|zip))?$", path.rpartition("/")[2].lower())
    return found[1] if found else ""


def csv_rows(file: TextIO, name: str) -> Iterator[Row | Reject]:
    header = file.readline()
    if not header.strip():
        raise DatasetError(f"{name} is empty: its first line must name the columns")
    delimiter = max("\t;|,", key=header.count) if any(mark in header for mark in "\t;|,") else ","
    try:
        names = [cell.strip() for cell in next(csv.reader([header], delimiter=delimiter))]
        if header.startswith(("\udcff\udcfe", "\udcfe\udcff")):
            raise DatasetError(f"{name} is UTF-16; save it as UTF-8")
        if len(set(names)) < len(names):
            raise DatasetError(f"{name} names a column twice: {', '.join(names)}")
        ended = False

        def lines() -> Iterator[str]:
            nonlocal ended
            yield from file
            ended = True

        reader, line = csv.reader(lines(), delimiter=delimiter), 1
        for cells in reader:
            first, line = line + 1, reader.line_num + 1
            where = f"{name} line {line}"
            if ended:  # within a cell: it asked for a further line
                lost = f"and is never closed, so lines {first} to {line} are one row"
                yield Reject(where, "open_quote", f"{name}: a quotation mark is opened in line {first} {lost}")
                continue
            if not any(cells):
                continue
            if len(cells) > len(names):
                yield Reject(where, "bad_row", f"{where}: {len(cells)} cells for {len(names)} columns")
                continue
            yield Row(dict(zip(names, cells, strict=False)), where)
    except csv.Error as error:
        raise DatasetError(f"{name} is no table of text: {error}") from None


def _line_rows(file: TextIO, name: str) -> Iterator[Row | Reject]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"{name} line {number}"
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Reject(where, "not_a_record", f"{where} is not valid JSON: {error}")
            continue
        yield _row(item, where)


def _json_rows(file: TextIO, name: str) -> Iterator[Row | Reject]:
    for number, (key, item) in enumerate(json_items(file, name)):
        if key is not None and not isinstance(item, dict):
            yield Row({"image": key, "text": item}, f"{name} {key!r:.100}")  # an image's path and its captions
        else:
            yield _row(item, f"{name} record {number}")


def _row(item: Any, where: str) -> Row | Reject:
    if isinstance(item, dict):
        return Row(item, where)
    return Reject(where, "not_a_record", f"{where}: expected an object, found {item!r:.100}")


def json_items(file: TextIO, name: str) -> Iterator[tuple[str | None, Any]]:
    """Items of a JSON list, or keys and values of an object, one at a time.

    Args:
        file: the file, as text.
        name: its name, for errors.

    Yields:
        (None, item) of a list, (key, value) of an object.

    Raises:
        DatasetError: it is neither, or not valid JSON.
    """
    read = _Reader(file, name)
    first = read.mark()
    if first not in ("[", "{"):
        raise DatasetError(f"{name}: expected a JSON list of records, found {first or 'nothing'!r}")
    end, comma = "]" if first == "[" else "}", ""
    while True:
        if read.peek() == end and comma != ",":
            read.mark()
            break
        key = None
        if first == "{":
            key = read.value()
            if not isinstance(key, str) or read.mark() != ":":
                raise read.wrong("expected a key and a colon")
        yield key, read.value()
        comma = read.mark()
        if comma == end:
            break
        if comma != ",":
            raise read.wrong("expected a comma")
    if rest := read.peek():
        raise read.wrong(f"found {rest!r} after the end")


class _Reader:
    """Values and marks of a JSON text, without the whole text in memory."""

    def __init__(self, file: TextIO, name: str):
        self.file, self.name = file, name
        self.text, self.at, self.before, self.ended = "", 0, 0, False
        self.decoder = json.JSONDecoder(parse_int=parse_int)

    def wrong(self, problem: object) -> DatasetError:
        return DatasetError(
            f"{self.name} is not valid JSON at character {self.before + self.at:,}: {problem}; "
            "download the file again from its publisher"
        )

    def _more(self) -> bool:
        """Read on; twice as much as is kept, so that a long value is not decoded over and over."""
        if self.ended:
            return False
        self.before += self.at
        kept = self.text[self.at :]
        if len(kept) > LONGEST:
            raise self.wrong(f"a value of more than {LONGEST:,} characters")
        read = self.file.read(max(CHUNK, len(kept)))
        self.text, self.at, self.ended = kept + read, 0, not read
        return bool(read)

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self.at < len(self.text):
                if not self.text[self.at].isspace():
                    return self.text[self.at]
                self.at += 1
            if not self._more():
                return ""

    def mark(self) -> str:
        """Take the next character that is no space; empty at the end."""
        found = self.peek()
        self.at += len(found)
        return found

    def value(self) -> Any:
        """Take the next value."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
                if end < len(self.text) or not self._more():  # a number may go on
                    self.at = end
                    return value
            except (ValueError, RecursionError) as error:
                if isinstance(error, RecursionError) or not self._more():
                    raise self.wrong(error) from None
