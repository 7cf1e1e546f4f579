"""Why a query returns an image: what each word adds, and which sentences about the image are closest to the query."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ceca.search.catalogue import Told
from serve.query import Embeddings
from serve.schema import Sentence, Word
from serve.service import Explanation
from serve.snapshot import Snapshot

WORDS = 60  # words of a query whose contribution is computed


class Parts(NamedTuple):
    """A query and an image's dialogue, cut into what is explained.

    `sentences` are pairs of a source (`summary`, or the question) and a text.
    """

    query: str
    words: list[str]
    sentences: list[tuple[str, str]]

    @property
    def texts(self) -> list[str]:
        """The texts to embed: the query, the query without each of its words, and the sentences."""
        without = [" ".join(self.words[:n] + self.words[n + 1 :]) for n in range(len(self.words))]
        return [self.query, *without, *(text for _, text in self.sentences)]


def cut(query: str, dialogue: Told | None) -> Parts:
    """Cut a query into words, and an image's dialogue, if there is one, into sentences."""
    return Parts(query, query.split()[:WORDS], _sentences(dialogue.turns, dialogue.summary) if dialogue else [])


def explain(snapshot: Snapshot, parts: Parts, texts: Embeddings, image: Embeddings, omega: float) -> Explanation:
    """Compute an explanation.

    Args:
        snapshot: the edition of the image.
        parts: words and sentences.
        texts: embeddings of `parts.texts`.
        image: the image's embeddings.
        omega: ω, the weight of the local similarity.
    """
    whole, local = texts
    count = len(parts.words)

    def fused(other: Embeddings) -> np.ndarray:
        return (1 - omega) * whole @ other[0] + omega * local @ other[1]

    with_image = fused(image)
    with_query = fused((whole[0], local[0]))[1 + count :]
    ordered = sorted(zip(parts.sentences, with_query.tolist(), strict=True), key=lambda pair: -pair[1])
    return Explanation(
        snapshot,
        similarity=float(with_image[0]),
        global_similarity=float(whole[0] @ image[0]),
        local_similarity=float(local[0] @ image[1]),
        words=tuple(
            Word(word=word, contribution=float(with_image[0] - with_image[1 + n])) for n, word in enumerate(parts.words)
        ),
        sentences=tuple(
            Sentence(source=source, text=text, similarity=similarity) for (source, text), similarity in ordered
        ),
    )


def _sentences(turns: Sequence[tuple[str, str]], summary: str) -> list[tuple[str, str]]:
    """The sentences of a summary, and the answers of a dialogue, each with its source."""
    sentences = [("summary", text) for text in re.split(r"(?<=[.!?])\s+", summary) if text.strip()]
    return sentences + [(question, answer) for question, answer in turns if answer.strip()]
