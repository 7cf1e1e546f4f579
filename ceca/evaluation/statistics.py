"""Size of a dataset: people, images and captions by split, and the lengths of its texts."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from ceca.data.store import Store
from ceca.model.tokens import count_tokens


class SplitSize(NamedTuple):
    """Number of people, images and captions in a split."""

    people: int
    images: int
    captions: int


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Size of a dataset.

    Attributes:
        splits: split → its size, in the order of the images table.
        images_of_person: number of images of each person.
        caption_words: number of words of each caption.
        summary_tokens: number of CLIP tokens of each summary; empty before the stage `dialogue`.
    """

    splits: dict[str, SplitSize]
    images_of_person: list[int]
    caption_words: list[int]
    summary_tokens: list[int]


def share_cut(texts: Collection[str], context: int) -> float:
    """The share of texts, 0 to 1, that are longer than a model's context and are cut."""
    return sum(count_tokens(text) > context for text in texts) / max(1, len(texts))


def read_statistics(store: Store) -> Statistics:
    """Count the current tables of a dataset."""
    table = store.current("images", "ingest")
    images = store.read(table, ["identity", "split"]).to_pydict()
    captions = store.read(store.captions(table), ["split", "text"]).to_pydict()
    dialogues = store.manifest("dialogues")
    summaries: list[str] = []
    if dialogues is not None and dialogues.rows and dialogues.made_from.get("images") == table.version:
        summaries = store.read(dialogues, ["summary"])["summary"].to_pylist()
    splits = {}
    for split in dict.fromkeys(images["split"]):
        people = [
            identity for identity, where in zip(images["identity"], images["split"], strict=True) if where == split
        ]
        splits[split] = SplitSize(len(set(people)), len(people), captions["split"].count(split))
    return Statistics(
        splits,
        list(Counter(images["identity"]).values()),
        [len(text.split()) for text in captions["text"]],
        [count_tokens(summary) for summary in summaries],
    )
