"""The datasets that a training learns from, and their tables. Imports no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ceca.config import TrainConfig
from ceca.data.store import Manifest, Store
from ceca.errors import UserError


class InputSet(NamedTuple):
    """A dataset that a training learns from.

    Attributes:
        store: the dataset.
        tables: its input tables by name.
        weight: how often an epoch visits each of its pairs.
    """

    store: Store
    tables: Mapping[str, Manifest]
    weight: float = 1.0


def input_sets(store: Store, config: TrainConfig) -> list[InputSet]:
    """What to learn from: the dataset, then the further ones in the order of the settings.

    Raises:
        UserError: a dataset is named twice, or lies where other machines would not find it.
        StoreError: as `input_tables`.
    """
    sets = [InputSet(store, input_tables(store, config))]
    for uri, weight in zip(config.sets, config.set_weights or [1.0] * len(config.sets), strict=True):
        further = Store(uri)
        if further.fs.protocol != store.fs.protocol:
            raise UserError(
                f"{further.uri} and {store.uri} lie in stores of two kinds; copy one to the other's kind, where all "
                "machines of the training find both"
            )
        if further.root in [each.store.root for each in sets]:
            raise UserError(f"{further.uri} is named twice among --data and --sets; leave it out once")
        sets.append(InputSet(further, input_tables(further, config), weight))
    return sets


def versions_of(sets: Sequence[InputSet]) -> dict[str, str]:
    """Versions of the tables of all sets, by names such as `images`, and `images of set 2` for a further one."""
    return {
        f"{name} of set {number}" if number > 1 else name: table.version
        for number, each in enumerate(sets, 1)
        for name, table in each.tables.items()
    }


def input_tables(store: Store, config: TrainConfig) -> dict[str, Manifest]:
    """The tables to learn from, by name; dialogues only if summaries are used.

    Raises:
        StoreError: a table is missing, or no captions belong to the images.
    """
    images = store.current("images", "ingest")
    tables = {"images": images, "captions": store.captions(images)}
    if config.model.summary_weight > 0:
        tables["dialogues"] = store.current("dialogues", "dialogue")
    return tables
