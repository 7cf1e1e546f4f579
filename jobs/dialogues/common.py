"""Common summaries: after the dialogues, an engine writes one summary for all images that are known to be one person.

The result is another version of the table of dialogues. Its `summary` is the common one where there is one, so
training, index, evaluation and search use it without knowing; the images' own summaries are beside it. So a table of
common summaries is also what others are written from, and the version without them may go.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ceca.config import DialogueConfig
from ceca.data.schema import DIALOGUES, OWN_SUMMARY, SCHEMA_VERSION, SUMMARY_OF
from ceca.data.store import Manifest, Reject, Store, version_of
from ceca.data.tables import Images, Positions, read_keys
from ceca.dialogue.attributes import Choices, read_vocabulary
from ceca.dialogue.common import COMMON_VERSION, ask_common, spread
from ceca.dialogue.conversation import Answer, DialogueError, Subject, View
from ceca.dialogue.engines import generation_settings
from ceca.model.tokens import CONTEXT, count_tokens
from ceca.settings import to_mapping
from jobs.dialogues.engine import EngineWorker, engine_workers
from jobs.runtime.console import console
from jobs.runtime.records import ranges, rows_in
from jobs.runtime.units import Output, Plan, Workers, run_plan

OWN = "own"  # note of a table of common summaries: the version of the dialogues that they are written from
COLUMNS = [*DIALOGUES.names, OWN_SUMMARY.name, SUMMARY_OF.name]
TOLD = pa.schema([*DIALOGUES, OWN_SUMMARY, SUMMARY_OF])


def own_version(dialogues: Manifest) -> str:
    """The version of the dialogues without common summaries."""
    return str(dialogues.notes.get(OWN, dialogues.version))


def run_own(store: Store, plan: Plan, workers: Workers, config: DialogueConfig, *, redo: bool) -> dict[str, Manifest]:
    """Run a plan of dialogues, as `run_plan`. If summaries shall agree, a table of common ones has its result too."""
    current = store.manifest("dialogues")
    if config.agree != "none" and not redo and current and own_version(current).partition("-")[0] == plan.version:
        return {"dialogues": current}
    return run_plan(store, plan, workers, redo=redo)


def write_common(
    store: Store, config: DialogueConfig, dialogues: Manifest, images: Images, groups: np.ndarray
) -> dict[str, Manifest]:
    """Publish the dialogues with common summaries.

    Args:
        store: the dataset.
        config: the engine, and which summaries agree.
        dialogues: the dialogues, with or without common summaries.
        images: N images.
        groups: [N] number of each image's group, -1 for none (`ceca.data.groups`).

    Returns:
        The manifest of the table.
    """
    keys = read_keys(store, dialogues)
    made_from = {**dialogues.made_from, "dialogues": own_version(dialogues)}
    # After an erasure there are fewer keys, and what was written from an erased image's summary is written again.
    told = hashlib.sha256(np.sort(keys).tobytes()).hexdigest()
    described = [COMMON_VERSION, made_from, told, config.agree, generation_settings(config), config.images_per_part]
    units = plan_units(keys, images, groups, config.images_per_part)
    workers = engine_workers(config, config.images_per_part)
    plan = Plan(
        stage="agree",
        version=version_of("agree", SCHEMA_VERSION, *described),
        tables=("dialogues",),
        units=units,
        sizes=[sum(unit["groups"]) for unit in units],
        worker=CommonWorker,
        arguments={
            "uri": store.uri,
            "images": images.table,
            "dialogues": dialogues,
            "config": to_mapping(config),
            "vocabulary": read_vocabulary(store, images.table),
        },
        made_from=made_from,
        config={**dialogues.config, "agree": config.agree},
        notes={**dialogues.notes, OWN: own_version(dialogues), "common_version": COMMON_VERSION},
        again="their images keep their own summaries; --redo asks everything again",
    )
    manifests = run_plan(store, plan, workers, redo=False)
    _print_report(manifests["dialogues"])
    return manifests


def plan_units(keys: np.ndarray, images: Images, groups: np.ndarray, size: int) -> list[dict[str, Any]]:
    """The units of work, with every group inside one unit.

    Args:
        keys: [D] of the dialogues' images.
        images: N images.
        groups: [N] as in `write_common`.
        size: rows of a unit, more or less: a group is in the unit in which it begins.

    Returns:
        Of each unit {"dialogues": ranges of rows, "groups": number of rows of each group, one after the other, 1 for a
        dialogue alone, "images": ranges of the rows of the first image of each larger group}.
    """
    place = Positions(images.keys).find(keys)
    group = np.where(place >= 0, groups[place], -1)
    # A group stands where its first dialogue stood.
    leader = np.arange(len(keys))
    grouped = np.flatnonzero(group >= 0)
    _, first, inverse = np.unique(group[grouped], return_index=True, return_inverse=True)
    leader[grouped] = grouped[first][inverse.ravel()]
    order = np.argsort(leader, kind="stable")
    starts = np.flatnonzero(np.diff(leader[order], prepend=-1))
    counts = np.diff(starts, append=len(order))
    units = []
    cuts = np.unique(starts // size, return_index=True)[1].tolist()
    for begin, end in itertools.pairwise([*cuts, len(starts)]):
        mine = slice(begin, end)
        rows = order[starts[begin] : starts[end - 1] + counts[end - 1]]
        several = order[starts[mine][counts[mine] > 1]]
        units.append(
            {
                "dialogues": ranges(rows),
                "groups": counts[mine].tolist(),
                "images": ranges(images.rows[place[several]]),
            }
        )
    return units


class Group(NamedTuple):
    """Dialogues about one person: their rows, the images whose summaries the engine gets, what it is asked about."""

    rows: slice
    told: list[str]
    subject: Subject


class CommonWorker(EngineWorker):
    """Asks for common summaries. A unit of work is as `plan_units` makes it.

    Args:
        uri: as in `EngineWorker`.
        images: as in `EngineWorker`.
        dialogues: the dialogues.
        config: as in `EngineWorker`.
        vocabulary: as in `EngineWorker`.
    """

    def __init__(self, uri: str, images: Manifest, dialogues: Manifest, config: dict[str, Any], vocabulary: Choices):
        super().__init__(uri, images, config, vocabulary)
        self.dialogues = dialogues

    def __call__(self, work: dict[str, Any]) -> Output:
        rows = self.store.take(self.dialogues, self.dialogues.places(rows_in(work["dialogues"])), COLUMNS)
        own = pc.coalesce(rows[OWN_SUMMARY.name], rows["summary"]).to_pylist()
        groups = self._groups(rows["image_id"].to_pylist(), own, work["groups"], self.subjects(work))
        return self.use_engine(self._agree(rows, own, groups))

    def _groups(self, ids: list[str], own: list[str], sizes: list[int], subjects: list[Subject]) -> list[Group]:
        """The groups whose summaries differ; others agree already."""
        found, first, waiting = [], 0, iter(subjects)
        for size in sizes:
            if size > 1:
                told, subject = [first + place for place in spread(size)], next(waiting)
                views = tuple(View(own[row], self.truth.get(ids[row], {}).get("view")) for row in told)
                if len(set(own[first : first + size])) > 1:
                    asked = dataclasses.replace(subject, views=views)
                    found.append(Group(slice(first, first + size), [ids[row] for row in told], asked))
            first += size
        return found

    async def _agree(self, rows: pa.Table, own: list[str], groups: list[Group]) -> Output:
        results = await asyncio.gather(*(self._ask(group.subject) for group in groups))
        summaries = list(own)
        kept: list[str | None] = [None] * len(own)
        of: list[list[str] | None] = [None] * len(own)
        for group, result in zip(groups, results, strict=True):
            if isinstance(result, Answer):
                size = group.rows.stop - group.rows.start
                summaries[group.rows], kept[group.rows] = [result.text] * size, own[group.rows]
                of[group.rows] = [group.told] * size
        columns = {"summary": summaries, OWN_SUMMARY.name: kept, SUMMARY_OF.name: of}
        table = pa.table(
            [pa.array(columns[f.name], f.type) if f.name in columns else rows[f.name] for f in TOLD], schema=TOLD
        )
        answers = [result for result in results if isinstance(result, Answer)]
        counts = {
            "common_summaries": len(answers),
            "images_with_one": sum(one is not None for one in kept),
            "cut_off": sum(answer.cut_off for answer in answers),
            "common_over_77_tokens": sum(count_tokens(answer.text) > CONTEXT for answer in answers),
            "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
            "completion_tokens": sum(answer.completion_tokens for answer in answers),
            **self.occupancy.take(),
        }
        return Output({"dialogues": table}, [one for one in results if isinstance(one, Reject)], counts)

    async def _ask(self, subject: Subject) -> Answer | Reject:
        async with self.conversation():
            try:
                return await ask_common(self.engine, subject, self.config.summary_tokens)
            except DialogueError as error:
                return Reject(subject.image_id, error.reason, error.detail)


def _print_report(table: Manifest) -> None:
    counts = table.notes["counts"]
    written = counts.get("common_summaries", 0)
    if written:
        console.print(
            f"agree: {written:,.0f} common summaries of {counts['images_with_one']:,.0f} images, "
            f"{counts['common_over_77_tokens'] / written:.1%} longer than CLIP's 77 tokens, "
            f"{counts['cut_off'] / written:.1%} cut off; {counts['engine_busy_s']:,.0f} engine seconds"
        )
