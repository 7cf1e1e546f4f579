"""Facets: properties of a gallery's images that a search can filter by before it takes the best.

Identity and split come from the gallery, camera and time from the images table, and attributes from the dialogues if
they were asked for. A facet is a dictionary-encoded column, small integer codes for few values; `time` is numbers, and
its conditions are ranges (`ceca.search.times`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ceca.data.schema import TIME
from ceca.errors import UserError
from ceca.search.columns import NEVER, Columns, open_columns
from ceca.search.edition import Edition
from ceca.search.sources import list_sources
from ceca.search.times import in_ranges, read_range, spell

# Table → columns.
FACETS = {"gallery": ("identity", "split"), "images": ("camera", TIME.name), "dialogues": ("attributes",)}
SHOWN = 20  # largest number of values that an error lists


class FacetError(UserError):
    """A search condition names a facet or value that no image has."""


class Facets:
    """The facets of N images.

    Args:
        columns: facet → column of N values; null if an image has no value.
        count: N.
        times: [N] int64, microseconds since 1970, as in `Columns`; None if no image has a time.
    """

    def __init__(self, columns: Mapping[str, pa.DictionaryArray], count: int, times: np.ndarray | None = None):
        self.columns, self.count, self.times = dict(columns), count, times

    @property
    def names(self) -> list[str]:
        """The facets that a condition can name."""
        return [*self.columns, *([] if self.times is None else [TIME.name])]

    def values(self, name: str) -> list[str]:
        """Sorted values of a facet; of `time`, the earliest and the latest."""
        if name == TIME.name and self.times is not None:
            known = self.times[self.times != NEVER]
            return [spell(int(known.min())), spell(int(known.max()))]
        return sorted(value for value in self.columns[name].dictionary.to_pylist() if value is not None)

    def check(self, conditions: Mapping[str, Sequence[str]]) -> None:
        """Check that every facet and value exists.

        Args:
            conditions: facet → accepted values.

        Raises:
            FacetError: one does not exist; the message lists the ones that do.
        """
        for name, wanted in conditions.items():
            if name not in self.names:
                raise FacetError(f"no facet {name!r} to filter by; there are {', '.join(self.names) or 'none'}")
            if name == TIME.name and self.times is not None:
                _check_times(wanted)
                continue
            known = set(self.columns[name].dictionary.to_pylist())
            unknown = [value for value in wanted if value not in known]
            if unknown or not wanted:
                listed = self.values(name)
                more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
                raise FacetError(
                    f"no image has {name} {', '.join(map(repr, unknown)) or 'of no value'}; "
                    f"there are {', '.join(listed[:SHOWN])}{more}"
                )

    def where(self, conditions: Mapping[str, Sequence[str]]) -> np.ndarray:
        """Find the images that have an accepted value of every facet.

        Args:
            conditions: facet → accepted values.

        Returns:
            [N] booleans.

        Raises:
            FacetError: as in `check`.
        """
        self.check(conditions)
        return self.mask(conditions)

    def mask(self, conditions: Mapping[str, Sequence[str]]) -> np.ndarray:
        """The same as `where` without the check, for a shard: no image of it may have a value that the gallery has."""
        allowed = np.ones(self.count, bool)
        for name, wanted in conditions.items():
            if name == TIME.name and self.times is not None:
                allowed &= in_ranges(self.times, wanted)
                continue
            column = self.columns.get(name)
            if column is None:
                return np.zeros(self.count, bool)
            codes = [code for code, value in enumerate(column.dictionary.to_pylist()) if value in wanted]
            fitting = pc.is_in(column.indices, pa.array(codes, column.indices.type))  # false for null
            allowed &= fitting.to_numpy(zero_copy_only=False)
        return allowed


def _check_times(wanted: Sequence[str]) -> None:
    try:
        ranges = [read_range(text) for text in wanted]
    except ValueError as error:
        raise FacetError(str(error)) from None
    if not ranges:
        raise FacetError("no range of time was given")


def parse_conditions(words: Sequence[str]) -> dict[str, list[str]]:
    """Parse conditions of the form `facet=value,value`. A repeated facet adds values.

    >>> parse_conditions(["camera=c1,c2", "hat=cap"])
    {'camera': ['c1', 'c2'], 'hat': ['cap']}

    Raises:
        FacetError: a condition has no `=`.
    """
    conditions: dict[str, list[str]] = {}
    for word in words:
        name, sign, values = word.partition("=")
        if not sign:
            raise FacetError(f"a condition is written facet=value or facet=value,value; found {word!r}")
        conditions.setdefault(name.strip(), []).extend(value.strip() for value in values.split(","))
    return conditions


def open_facets(edition: Edition, ids: np.ndarray) -> Facets:
    """Read the facets of images from an edition's tables.

    Args:
        edition: the edition.
        ids: [N] uint64, ids of the images.

    Returns:
        The facets in the order of `ids`. A facet for which no image has a value is left out.
    """
    columns = [open_columns(edition, table, list_sources(edition, table), names) for table, names in FACETS.items()]
    return facets_of(ids, columns)


def facets_of(ids: np.ndarray, columns: Sequence[Columns]) -> Facets:
    """Facets from columns that were read: those of the tables in `FACETS`, in its order."""
    known, times = {}, None
    for of_table in columns:
        rows = of_table.index.find(ids)
        if of_table.times is not None:
            times = of_table.times_of(rows)
        for name in sorted(of_table.values, key=lambda name: (name != "identity", name)):
            column = of_table.aligned(name, rows)
            if column.null_count < len(ids):
                known[name] = column
    return Facets(known, len(ids), times)
