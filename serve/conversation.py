"""A search as a conversation: candidates are ranked by the user's answers, and the next question is proposed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ceca.search.questions import beliefs, next_question, wording
from ceca.search.ranking import Hit
from serve.query import Query
from serve.refusals import WrongAnswer
from serve.schema import Proposed
from serve.service import SearchResult
from serve.snapshot import Snapshot

POOL = 1000  # number of best images that a conversation is about


def agreeing_conditions(snapshot: Snapshot, query: Query) -> dict[str, list[str]] | None:
    """The conditions that select the images that agree with the answers.

    Without them, a short description may leave the person out of the best images, and no answer could bring the person
    back.

    Returns:
        None if no answer is about a structured facet that the query does not already name.
    """
    answers = {
        facet: value
        for facet, value in query.answers.items()
        if value is not None and facet in snapshot.structured and facet not in query.where
    }
    if not answers:
        return None
    return {facet: [value] for facet, value in answers.items() if value in snapshot.possible(facet)}


def converse(snapshot: Snapshot, hits: list[Hit], query: Query) -> SearchResult:
    """Rank candidates by similarity and answers, and find the next question.

    Args:
        snapshot: the edition of the candidates.
        hits: the candidates, best first.
        query: its answers and the number of images to return.

    Raises:
        WrongAnswer: an answer is about an unknown facet, or is not one of its values.
    """
    codes, values = snapshot.attributes([hit.image_id for hit in hits])
    answers = _answer_codes(snapshot, values, query.answers)
    counts = {facet: len(known) for facet, known in values.items()}
    believed = beliefs(np.array([hit.similarity for hit in hits]), codes, counts, answers)
    order = np.lexsort((np.arange(len(hits)), -believed))[: query.top_k]
    question = next_question(believed, codes, counts, set(query.answers))
    proposed = None
    if question is not None:
        shares = sorted(zip(values[question.facet], question.shares.tolist(), strict=True), key=lambda pair: -pair[1])
        proposed = Proposed(facet=question.facet, text=wording(question.facet), values=dict(shares))
    return SearchResult(
        snapshot, [hits[place] for place in order], [float(believed[place]) for place in order], proposed
    )


def _answer_codes(
    snapshot: Snapshot, values: Mapping[str, list[str]], answers: Mapping[str, str | None]
) -> dict[str, int | None]:
    """The code of each answer among the candidates' values.

    None if the user does not know, or if no candidate has the value: then it does not tell candidates apart. Nor does
    an answer about what no candidate's dialogue mentions, which is left out.
    """
    codes: dict[str, int | None] = {}
    for facet, value in answers.items():
        if facet not in values and facet not in snapshot.choices:
            raise WrongAnswer(f"nothing is known about {facet!r}; the candidates differ in {', '.join(sorted(values))}")
        if value is not None and value not in snapshot.possible(facet):
            raise WrongAnswer(f"{facet} cannot be {value!r}; it can be {', '.join(snapshot.possible(facet))}")
        if facet in values:
            codes[facet] = values[facet].index(value) if value in values[facet] else None
    return codes
