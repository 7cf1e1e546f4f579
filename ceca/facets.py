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

from ceca.errors import UserError
from ceca.store import Manifest, Store

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
        allowed = torch.ones(self.count, dtype=torch.bool)
        for name, wanted in conditions.items():
            column = self.columns[name]
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


def open_facets(store: Store, gallery: Manifest, image_ids: Sequence[str]) -> Facets:
    """The facets of these images of a gallery, from the versions of the tables that it was made from."""
    table = store.read(gallery, ["image_id", "identity", "split"])
    ids = pa.array(image_ids, pa.string())
    columns = {
        "identity": _aligned(ids, table, "identity").cast(pa.string()),
        "split": _aligned(ids, table, "split"),
    }
    images = store.manifest("images", gallery.made_from.get("images"))
    if images is not None and images.rows:
        columns["camera"] = _aligned(ids, store.read(images, ["image_id", "camera"]), "camera")
    dialogues = (
        store.manifest("dialogues", gallery.made_from["dialogues"]) if "dialogues" in gallery.made_from else None
    )
    if dialogues is not None and dialogues.rows:
        told = _aligned(ids, store.read(dialogues, ["image_id", "attributes"]), "attributes")
        for name in sorted(pc.unique(told.keys).to_pylist()):
            columns[name] = pc.map_lookup(told, name, "first")
    known = {name: column.dictionary_encode() for name, column in columns.items() if column.null_count < len(ids)}
    return Facets(known, len(ids))


def _aligned(ids: pa.Array, table: pa.Table, column: str) -> pa.Array:
    """The table's column in the order of `ids`, null where it has no such image."""
    rows = pc.index_in(ids, table["image_id"].combine_chunks())
    return table[column].combine_chunks().take(rows)
