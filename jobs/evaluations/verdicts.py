"""Verdicts of an engine about images, asked by Ray workers and kept below verdicts/ in one table per engine.

Questions are asked by image and not by query. So an image that several queries find is asked about a claim once, and
all questions about it follow each other in one engine, whose prefix cache then holds the image. Verdicts of earlier
evaluations, of any model, are not asked for again.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ceca.config import DialogueConfig
from ceca.data.keys import numbers, spelled
from ceca.data.names import VERDICTS
from ceca.data.schema import SCHEMA_VERSION
from ceca.data.schema import VERDICTS as COLUMNS
from ceca.data.store import Manifest, Receipt, Reject, Store, version_of
from ceca.data.tables import Images
from ceca.dialogue.attributes import Choices, oracle_attributes
from ceca.dialogue.conversation import DialogueError, Subject
from ceca.dialogue.engines import generation_settings
from ceca.dialogue.verdicts import Claim, engine_digest, judge
from ceca.settings import to_mapping
from jobs.dialogues.engine import EngineWorker, engine_workers
from jobs.runtime.records import Units
from jobs.runtime.units import Output, Plan, run_plan

COUNTED = ("questions", "engine_busy_s")  # sums over all runs that a table of verdicts comes from


class Question(NamedTuple):
    """What is asked about an image."""

    image_id: str
    claim: Claim


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """Verdicts of one engine.

    Attributes:
        known: verdict of each question. A question that the engine could not answer is missing.
        asked: number of questions that were asked now; the others were known.
        question_s: seconds that the engine was busy per question, over all questions that it was ever asked.
    """

    known: Mapping[Question, str]
    asked: int
    question_s: float


def ask_verdicts(
    store: Store, config: DialogueConfig, images: Images, vocabulary: Choices, questions: Collection[Question]
) -> Verdicts:
    """Ask an engine, and publish its verdicts together with its earlier ones.

    Args:
        store: the dataset.
        config: the engine.
        images: the images that the questions are about.
        vocabulary: attribute → its values, for the oracle.
        questions: what to ask.

    Raises:
        UserError: the oracle has no attributes to read, or the engine answers no question.
    """
    table = f"{VERDICTS}/{engine_digest(config)}"
    made_from = {"images": images.table.version}
    if config.engine == "oracle":
        made_from["attributes"] = oracle_attributes(store, images.table).version
    published = store.manifest(table)
    # Another version of the images may hold another picture under the same id.
    earlier = published if published is not None and published.made_from["images"] == made_from["images"] else None
    known = {} if earlier is None else _read(store, earlier)
    missing: defaultdict[str, list[Claim]] = defaultdict(list)
    for question in sorted(set(questions) - known.keys()):
        missing[question.image_id].append(question.claim)
    if missing:
        plan = _plan(store, config, images, vocabulary, missing, table, made_from, earlier)
        earlier = run_plan(store, plan, engine_workers(config, config.images_per_part), redo=False)[table]
        known = _read(store, earlier)
    totals = {} if earlier is None else _totals(earlier)
    return Verdicts(
        known={question: known[question] for question in questions if question in known},
        asked=sum(map(len, missing.values())),
        question_s=totals.get("engine_busy_s", 0.0) / max(1, totals.get("questions", 0)),
    )


def _plan(
    store: Store,
    config: DialogueConfig,
    images: Images,
    vocabulary: Choices,
    missing: Mapping[str, list[Claim]],
    table: str,
    made_from: Mapping[str, str],
    earlier: Manifest | None,
) -> Plan:
    """The units of work that ask what is missing, image by image."""
    asked = images.take(np.isin(images.keys, numbers(missing)))
    parts = () if earlier is None else earlier.parts
    engine = generation_settings(config)
    units = Units(config.images_per_part, images=asked.rows)
    claims = [missing[image_id] for image_id in spelled(asked.keys)]
    return Plan(
        stage="verdicts",
        version=version_of("verdicts", SCHEMA_VERSION, made_from, engine, [part.sha256 for part in parts], missing),
        tables=(table,),
        units=[
            {**units[unit], "claims": claims[unit * units.size : (unit + 1) * units.size]} for unit in range(len(units))
        ],
        sizes=units.sizes,
        worker=VerdictWorker,
        arguments={
            "uri": store.uri,
            "images": images.table,
            "config": to_mapping(config),
            "vocabulary": vocabulary,
            "table": table,
        },
        made_from=made_from,
        config=engine,
        kept=[Receipt({table: part}) for part in parts],
        notes={"earlier": {} if earlier is None else _totals(earlier)},
        again="the next evaluation asks again",
    )


def _read(store: Store, table: Manifest) -> dict[Question, str]:
    columns = store.read(table).to_pydict()
    claims = map(Claim, columns["attribute"], columns["value"])
    return dict(zip(map(Question, columns["image_id"], claims), columns["verdict"], strict=True))


def _totals(table: Manifest) -> dict[str, float]:
    """Sums of `COUNTED` over all runs that the table comes from."""
    return {name: table.notes["counts"].get(name, 0) + table.notes["earlier"].get(name, 0) for name in COUNTED}


class VerdictWorker(EngineWorker):
    """Asks about claims. A unit of work is {"images": ranges of rows, "claims": for each image, what is asked}.

    Args:
        uri: as in `EngineWorker`.
        images: as in `EngineWorker`.
        config: as in `EngineWorker`.
        vocabulary: as in `EngineWorker`.
        table: name of the table of verdicts.
    """

    def __init__(self, uri: str, images: Manifest, config: dict[str, Any], vocabulary: Choices, table: str):
        super().__init__(uri, images, config, vocabulary)
        self.table = table

    def __call__(self, work: dict[str, Any]) -> Output:
        return self.use_engine(self._ask(self.subjects(work), work["claims"]))

    async def _ask(self, subjects: Sequence[Subject], claims: Sequence[Sequence[Sequence[str]]]) -> Output:
        rejects: list[Reject] = []

        async def about(subject: Subject, asked: Sequence[Sequence[str]]) -> list[dict[str, str]]:
            rows = []
            async with self.conversation():
                for attribute, value in asked:  # one after the other, so that the image is in the cache
                    try:
                        verdict = await judge(self.engine, subject, Claim(attribute, value))
                    except DialogueError as error:
                        rejects.append(Reject(subject.image_id, error.reason, error.detail))
                        break  # its other questions would fail as well
                    rows.append(
                        {"image_id": subject.image_id, "attribute": attribute, "value": value, "verdict": verdict}
                    )
            return rows

        found = await asyncio.gather(*map(about, subjects, claims))
        rows = [row for of_image in found for row in of_image]
        counts = {"questions": len(rows), **self.occupancy.take()}
        return Output({self.table: pa.Table.from_pylist(rows, COLUMNS)}, rejects, counts)
