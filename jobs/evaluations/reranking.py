"""Re-ranking of a split's queries by verdicts of an engine, with a weight that is learned on the validation split."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa

from ceca.config import DialogueConfig, EvaluateConfig
from ceca.data.store import Store
from ceca.data.tables import find_images
from ceca.dialogue.attributes import Choices, read_vocabulary
from ceca.dialogue.verdicts import Claim, stated
from ceca.errors import UserError
from ceca.evaluation.evaluation import Embedded, best_images, embedded_sides, texts_of
from ceca.evaluation.reranking import Best, learn_weight
from ceca.evaluation.significance import COMPARED, paired_bootstrap
from ceca.metrics import PER_QUERY, Matches
from ceca.search.confidence import CALIBRATED_ON
from ceca.search.reranking import rerank_by_verdicts, support, worth_asking
from jobs.evaluations.embedding import embed_split
from jobs.evaluations.ranking import rank
from jobs.evaluations.verdicts import Question, Verdicts, ask_verdicts

Tables = tuple[pa.Table, pa.Table]  # embedded queries and images
Sides = tuple[Embedded, Embedded]  # texts and images


@dataclasses.dataclass(frozen=True)
class Side:
    """The queries of a split.

    Attributes:
        best: their best images.
        ids: [Q, K] ids of these.
        claims: what each query states; nothing where the engine is not asked.
    """

    best: Best
    ids: np.ndarray
    claims: list[tuple[Claim, ...]]

    def questions(self) -> list[Question]:
        """What each query asks about each of its best images."""
        return [
            Question(image_id, claim)
            for ids, claims in zip(self.ids.tolist(), self.claims, strict=True)
            for image_id in ids
            for claim in claims
        ]

    def support(self, verdicts: Verdicts) -> np.ndarray:
        """Claims that fit minus claims that differ, [Q, K]. What the engine could not answer counts as unseen."""
        known = verdicts.known
        return np.array(
            [
                [support(known.get(Question(image_id, claim), "unseen") for claim in claims) for image_id in ids]
                for ids, claims in zip(self.ids.tolist(), self.claims, strict=True)
            ]
        )


def side_of(
    store: Store,
    config: EvaluateConfig,
    omega: float,
    tables: Tables,
    sides: Sides,
    figures: np.ndarray,
    vocabulary: Choices,
) -> Side:
    """What re-ranking needs of a split; arguments as in `rerank_split`."""
    (queries, gallery), (texts, images) = tables, sides
    nearest = best_images(texts, images, omega, config.rerank_images)
    best = Best(
        similarity=nearest.similarity,
        own=images.identities[nearest.positions] == texts.identities[:, None],
        matches=Matches(texts.identities, images.identities).count,
        identities=texts.identities,
        figures=figures,
    )
    asked = worth_asking(nearest.similarity, config.rerank_margin)
    captions = store.read(store.captions(store.current("images", "ingest")), ["caption_id", "text"])
    texts_asked = texts_of(queries, captions)
    return Side(
        best,
        np.array(gallery["image_id"].to_pylist(), object)[nearest.positions],
        [
            stated(text, vocabulary) if text and ask else ()
            for text, ask in zip(texts_asked, asked.tolist(), strict=True)
        ],
    )


def rerank_split(
    store: Store, config: EvaluateConfig, omega: float, tables: Tables, sides: Sides, figures: np.ndarray
) -> tuple[np.ndarray, dict[str, Any]]:
    """Rank the best images of each query again by what an engine says of them.

    Args:
        store: the dataset.
        config: the evaluation, with its engine.
        omega: its ω.
        tables: the split's queries and gallery.
        sides: their embeddings.
        figures: [Q, 8] figures of the queries by the fused similarity.

    Returns:
        The new figures [Q, 8]; and for the result's file the weight, the cost, and the differences of figures.
    """
    engine = config.engine
    assert engine is not None, "nobody to ask"
    listed = find_images(store, store.current("images", "ingest"))
    vocabulary = read_vocabulary(store, listed.table)
    side = learned_on = side_of(store, config, omega, tables, sides, figures, vocabulary)
    if not len(find_images(store, listed.table, CALIBRATED_ON)):
        raise UserError(
            f"the weight of an engine's verdicts is learned on the split {CALIBRATED_ON}, and {store.uri} has no image "
            "of it; leave --rerank-engine out, or ingest the dataset with --split-share"
        )
    if config.split != CALIBRATED_ON:
        there = dataclasses.replace(config, split=CALIBRATED_ON)
        tables = embed_split(store, there)
        sides = embedded_sides(dataclasses.replace(there, omega=omega), *tables)
        learned_on = side_of(store, there, omega, tables, sides, rank(*sides, [omega])[omega], vocabulary)
    questions = side.questions()
    verdicts = ask_verdicts(store, engine, listed, vocabulary, {*questions, *learned_on.questions()})
    weight = learn_weight(learned_on.best, learned_on.support(verdicts))
    again = side.best.ranked_by(rerank_by_verdicts(side.best.similarity, side.support(verdicts), weight))
    different = len(set(questions))
    differences = {
        label: paired_bootstrap(100 * figures[:, column], 100 * again[:, column], side.best.identities)
        for label, column in ((label, PER_QUERY.index(name)) for label, name in COMPARED.items())
    }
    return again, {
        "engine": describe(engine),
        "images": config.rerank_images,
        "margin": config.rerank_margin,
        "weight": weight,
        "queries_asked": sum(map(bool, side.claims)),
        "questions": len(questions),
        "different_questions": different,
        "asked_now": verdicts.asked,  # of the validation split too
        "engine_seconds_per_query": verdicts.question_s * different / len(again),
        "differences": {label: dataclasses.asdict(difference) for label, difference in differences.items()},
    }


def describe(engine: DialogueConfig) -> str:
    """An engine in a few words, for tables."""
    if engine.engine == "oracle":
        return f"simulated, error rate {engine.oracle.error_rate:g}"
    return f"{engine.engine}, {getattr(engine, engine.engine).model}"
