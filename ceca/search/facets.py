"""Facets: what a gallery's images are filtered by before the best are taken.

Identity and split come with the gallery, the camera with the images, and the attributes with the dialogues, where they
were asked for. They are kept as small numbers that stand for their few values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from ceca.data.schema import NOBODY
from ceca.errors import UserError
from ceca.search.edition import Edition

SHOWN = 20  # values that an error names


class FacetError(UserError):
    """A condition that no image can be asked for."""


class Facets:
    """Columns of `count` values each, null where an image has none."""

    def __init__(self, columns: Mapping[str, pa.DictionaryArray], count: int):
        self.columns, self.count = dict(columns), count

    def values(self, name: str) -> list[str]:
        """What a facet can be, sorted."""
        return sorted(value for value in self.columns[name].dictionary.to_pylist() if value is not None)

    def check(self, conditions: Mapping[str, Sequence[str]]) -> None:
        """See that every facet and value named is there.

        Raises:
            FacetError: one is not; says which there are.
        """
        for name, wanted in conditions.items():
            if name not in self.columns:
                raise FacetError(f"no facet {name!r} to filter by; there are {', '.join(self.columns) or 'none'}")
            there = set(self.columns[name].dictionary.to_pylist())
            unknown = [value for value in wanted if value not in there]
            if unknown or not wanted:
                listed = self.values(name)
                more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
                raise FacetError(
                    f"no image has {name} {', '.join(map(repr, unknown)) or 'of no value'}; "
                    f"there are {', '.join(listed[:SHOWN])}{more}"
                )

    def where(self, conditions: Mapping[str, Sequence[str]]) -> Tensor:
        """[N] booleans: images that have, of every facet named, one of its values.

        Raises:
            FacetError: as in `check`.
        """
        self.check(conditions)
        return self.mask(conditions)

    def mask(self, conditions: Mapping[str, Sequence[str]]) -> Tensor:
        """`where` over a share of a gallery, in which a value that exists may not be."""
        allowed = torch.ones(self.count, dtype=torch.bool)
        for name, wanted in conditions.items():
            column = self.columns.get(name)
            if column is None:
                return torch.zeros(self.count, dtype=torch.bool)
            codes = [code for code, value in enumerate(column.dictionary.to_pylist()) if value in wanted]
            found = pc.is_in(column.indices, pa.array(codes, column.indices.type))  # null is in nothing
            allowed &= torch.from_numpy(found.to_numpy(zero_copy_only=False))
        return allowed


def parse_conditions(words: Sequence[str]) -> dict[str, list[str]]:
    """`camera=c1,c2` and so on → facets and values; the same facet twice adds values.

    Raises:
        FacetError: there is no `=`.
    """
    found: dict[str, list[str]] = {}
    for word in words:
        name, sign, values = word.partition("=")
        if not sign:
            raise FacetError(f"a condition is written facet=value or facet=value,value; found {word!r}")
        found.setdefault(name.strip(), []).extend(value.strip() for value in values.split(","))
    return found


def open_facets(edition: Edition, image_ids: Sequence[str]) -> Facets:
    """The facets of these images of an edition, from the tables that it was made from."""
    store, ids = edition.store, pa.array(image_ids, pa.string())
    added = edition.read_added(["image_id", "identity", "split", "camera", "attributes"])

    def whole(table: pa.Table, *columns: str) -> pa.Table:
        """These columns of a table and of what was added."""
        return pa.concat_tables([part.select(["image_id", *columns]) for part in (table, *added)])

    indexed = whole(store.read(edition.manifest("gallery"), ["image_id", "identity", "split"]), "identity", "split")
    identity = _aligned(ids, indexed, "identity")
    columns = {
        "identity": pc.if_else(pc.equal(identity, NOBODY), None, identity).cast(pa.string()),
        "split": _aligned(ids, indexed, "split"),
        "camera": _aligned(
            ids, whole(store.read(edition.manifest("images"), ["image_id", "camera"]), "camera"), "camera"
        ),
    }
    dialogues = edition.told()
    if dialogues is not None:
        table = whole(store.read(dialogues, ["image_id", "attributes"]), "attributes")
        told = _aligned(ids, table, "attributes")
        for name in sorted(pc.unique(told.keys).to_pylist()):
            columns[name] = pc.map_lookup(told, name, "first")
    known = {name: column.dictionary_encode() for name, column in columns.items() if column.null_count < len(ids)}
    return Facets(known, len(ids))


def _aligned(ids: pa.Array, table: pa.Table, column: str) -> pa.Array:
    """The table's column in the order of `ids`, null where it has no such image."""
    rows = pc.index_in(ids, table["image_id"].combine_chunks())
    return table[column].combine_chunks().take(rows)
