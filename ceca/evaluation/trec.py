"""Evaluations as TREC's files, which `trec_eval`, `ir_measures` and others read: a run, and what is right (qrels).

A query is a caption and a document is an image, each by its id; an image is relevant if it shows the caption's person.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ceca.evaluation.evaluation import Embedded
from ceca.metrics import STRIP, Matches, slices
from ceca.model.ceca import fused_similarity


def run_lines(
    texts: Embedded,
    images: Embedded,
    captions: Sequence[str],
    documents: Sequence[str],
    *,
    omega: float,
    top_k: int,
    tag: str,
) -> Iterator[str]:
    """Yield the lines of a run: `query Q0 document rank score tag`.

    Args:
        texts: the queries.
        images: the gallery.
        captions: ids of the queries.
        documents: ids of the images.
        omega: ω, the share of the local similarity.
        top_k: images per query.
        tag: name of the run, without spaces.
    """
    for rows in slices(len(captions), max(1, STRIP // len(documents))):
        similarity = fused_similarity((texts.pair[0][rows], texts.pair[1][rows]), images.pair, omega)
        best = similarity.topk(min(top_k, len(documents)), dim=1)
        for caption, scores, places in zip(captions[rows], best.values.numpy(), best.indices.numpy(), strict=True):
            for rank, (score, place) in enumerate(zip(scores, places, strict=True), 1):
                yield f"{caption} Q0 {documents[place]} {rank} {score:.9g} {tag}\n"


def qrel_lines(texts: Embedded, images: Embedded, captions: Sequence[str], documents: Sequence[str]) -> Iterator[str]:
    """Yield the lines of qrels, `query 0 document 1`; arguments as of `run_lines`.

    A query about a person who is in no image has no line, and programs leave it out; here it counts as a miss.
    """
    matches = Matches(texts.identities, images.identities)
    for rows in slices(len(captions), 1024):
        for caption, places in zip(captions[rows], matches.columns(rows), strict=True):
            for place in np.sort(places[places >= 0]):
                yield f"{caption} 0 {documents[place]} 1\n"
