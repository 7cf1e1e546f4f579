"""Does it help if the engine answers the next question itself, by the best images, instead of the person who searches?

    ceca evaluate --data data --model ceca-0 --split test --rerank-engine oracle    # of each model, once
    python benchmarks/selfanswers.py --data data --models ceca-0 ceca-1 ceca-2

Verdicts (`ceca.dialogue.verdicts`) are about what a description states. Here the simulated annotator is also asked what
it does not state: the questions that tell most about the ten best images (`next_question`). What the likely images
show, each by its probability, is taken for the answer, and images that agree with it move up. Both weights are learned
on the validation split. The table shows test: Rank-1 and mAP without an engine, with verdicts, and with self-answers
besides, as mean and deviation over the models; and how many questions a query costs.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from ceca.config import EvaluateConfig, OracleConfig
from ceca.data.store import Store
from ceca.dialogue.attributes import Choices, read_truth, read_vocabulary
from ceca.dialogue.oracle import OracleEngine
from ceca.evaluation.evaluation import embedded_sides
from ceca.evaluation.reranking import PRECISION, Best, learn_weight
from ceca.search.questions import beliefs, next_question
from ceca.search.reranking import rerank_by_verdicts
from jobs.evaluations.embedding import embed_split
from jobs.evaluations.ranking import rank
from jobs.evaluations.reranking import Side, side_of
from jobs.evaluations.verdicts import Verdicts

OMEGA = 0.3
Seen = Mapping[str, Mapping[str, str]]  # image id → what the annotator sees there


@dataclasses.dataclass(frozen=True)
class Settings:
    """Dataset, and models whose splits `val` and `test` are embedded."""

    data: str
    models: tuple[str, ...]
    error_rates: tuple[float, ...] = (0.05, 0.15, 0.3)
    questions: int = 3
    """Questions that the annotator answers about the ten best images of a query."""


def stated_support(side: Side, seen: Seen) -> np.ndarray:
    """Claims that fit minus claims that differ, [Q, K]."""

    def judge(image_id: str, attribute: str, value: str) -> str:
        found = seen[image_id].get(attribute)
        return "unseen" if found is None else "fits" if found == value else "differs"

    known = {question: judge(question.image_id, *question.claim) for question in side.questions()}
    return side.support(Verdicts(known, asked=len(known), question_s=0.0))


def own_support(side: Side, similarity: np.ndarray, seen: Seen, vocabulary: Choices, most: int) -> tuple[Any, float]:
    """How far images agree with what the likely ones show, [Q, K], over the annotator's own answers.

    Returns:
        Σ over questions of P(value of the image) - Σ_v P(v)², with P by the beliefs; and questions asked per query.
    """
    counts = {facet: len(values) for facet, values in vocabulary.items()}
    agreement, asked = np.zeros(similarity.shape), 0
    for row, (ids, claims) in enumerate(zip(side.ids.tolist(), side.claims, strict=True)):
        codes = {
            facet: np.array([values.index(seen[i][facet]) if seen[i].get(facet) in values else -1 for i in ids])
            for facet, values in vocabulary.items()
        }
        believed = beliefs(similarity[row], {}, {}, {})
        known = {claim.attribute for claim in claims}
        for _ in range(most):
            if (question := next_question(believed, codes, counts, known)) is None:
                break
            known.add(question.facet)
            asked += len(ids)
            of_image = codes[question.facet]
            share = question.shares[of_image] - question.shares @ question.shares
            agreement[row] += np.where(of_image >= 0, share, 0.0)
    return agreement, asked / len(similarity)


def figures(best: Best) -> np.ndarray:
    """Rank-1 and mAP in percent."""
    return 100 * best.figures[:, [0, PRECISION]].mean(axis=0)


def again(best: Best, similarity: np.ndarray) -> Best:
    """The best images, ranked by other similarities."""
    return dataclasses.replace(best, similarity=similarity, figures=best.ranked_by(similarity))


def main(settings: Settings) -> None:
    store = Store(settings.data)
    images = store.current("images", "ingest")
    vocabulary, truth = read_vocabulary(store, images), read_truth(store, images)
    vocabulary = {facet: tuple(values) for facet, values in vocabulary.items()}
    sides = {}
    for model in settings.models:
        for split in ("val", "test"):
            config = EvaluateConfig(model=model, split=split, omega=OMEGA)
            tables = embed_split(store, config)
            embedded = embedded_sides(config, *tables)
            ranks = rank(*embedded, [OMEGA])[OMEGA]
            sides[model, split] = side_of(store, config, OMEGA, tables, embedded, ranks, vocabulary)
    for rate in settings.error_rates:
        engine = OracleEngine(OracleConfig(error_rate=rate), vocabulary)
        seen = {key: engine.perceive(key, of["attributes"], of["view"]) for key, of in truth.items()}
        rows: dict[str, list[np.ndarray]] = {"no engine": [], "verdicts": [], "and self-answers": []}
        costs, weights = [], []
        for model in settings.models:
            ranked, cost = {}, 0.0
            weight = learn_weight(sides[model, "val"].best, stated_support(sides[model, "val"], seen))
            own = {}
            for split in ("val", "test"):
                side = sides[model, split]
                new = rerank_by_verdicts(side.best.similarity, stated_support(side, seen), weight)
                ranked[split] = again(side.best, new)
                own[split], cost = own_support(side, new, seen, vocabulary, settings.questions)
            second = learn_weight(ranked["val"], own["val"])
            last = again(ranked["test"], rerank_by_verdicts(ranked["test"].similarity, own["test"], second))
            costs.append(cost)
            weights.append(second)
            for name, best in zip(rows, (sides[model, "test"].best, ranked["test"], last), strict=True):
                rows[name].append(figures(best))
        print(f"\nerror rate {rate:.0%}; self-answers: {np.mean(costs):.0f} questions a query, weights {weights}")
        for name, found in rows.items():
            mean, deviation = np.mean(found, axis=0), np.std(found, axis=0, ddof=min(1, len(found) - 1))
            print(f"{name:18}Rank-1 {mean[0]:6.2f} ± {deviation[0]:.2f}   mAP {mean[1]:6.2f} ± {deviation[1]:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
