"""What every dialogue worker does: one engine, many conversations in flight, from one unit of work to the next."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import pyarrow as pa

from ceca.config import DialogueConfig
from ceca.data.schema import DIALOGUES
from ceca.data.store import Manifest, Reject, Store
from ceca.dialogue.attributes import Choices
from ceca.dialogue.conversation import (
    PROMPT_VERSION,
    SUMMARY_REQUEST,
    Dialogue,
    DialogueError,
    EngineError,
    Subject,
    converse,
)
from ceca.dialogue.engines import generation_settings, make_engine
from ceca.model.tokens import CONTEXT, count_tokens
from ceca.settings import from_mapping
from jobs.runtime.units import Output

REPEATED_AMONG = 8  # images at least, of which more than half have one summary: then it is flagged


class DialogueWorker:
    """Holds one engine, in an event loop of its own so that it lives from one unit to the next.

    Units may be done at once by several threads: their conversations share the engine and one limit, so that those
    of the next unit fill the places that the last ones of this unit leave.
    """

    def __init__(
        self,
        uri: str,
        images: Manifest,
        config: dict[str, Any],
        vocabulary: Choices,
        choices: Choices | None,
        canaries: list[Any],
    ):
        self.store, self.images, self.choices = Store(uri), images, choices
        self.config = from_mapping(DialogueConfig, config)
        self.settings = json.dumps(generation_settings(self.config), sort_keys=True)
        self.truth: dict[str, dict[str, Any]] = {}  # what Subject is told of drawn pedestrians
        if self.config.engine == "oracle":
            table = self.store.read(self.store.current("attributes", "ingest"), ["image_id", "view", "attributes"])
            rows = zip(*(table[name].to_pylist() for name in ("image_id", "view", "attributes")), strict=True)
            self.truth = {key: {"view": view, "attributes": dict(pairs)} for key, view, pairs in rows}
        self.engine = make_engine(self.config, vocabulary)
        self.in_flight = asyncio.Semaphore(self.config.conversations)
        self.occupancy = Occupancy()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self._run(self.engine.start())
        if len(canaries) > 1:
            self._run(self._see_that_answers_differ(self._subjects(canaries)))
        self.occupancy.reset()

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def __call__(self, work: list[Any]) -> Output:
        return self._run(self._converse(self._subjects(work)))

    def _subjects(self, work: list[Any]) -> list[Subject]:
        encoded = self.store.take(self.images, [(part, row) for part, row, _ in work], ["image"])["image"]
        return [
            Subject(image_id=image_id, image=image.as_py(), **self.truth.get(image_id, {}))
            for (_, _, image_id), image in zip(work, encoded, strict=True)
        ]

    async def _see_that_answers_differ(self, subjects: list[Subject]) -> None:
        """Ask for a description of each, before hours are spent on a model that does not see the images."""

        async def one(subject: Subject) -> str | DialogueError:
            try:
                return (await self.engine.answer(subject, (), SUMMARY_REQUEST, self.config.summary_tokens)).text
            except DialogueError as error:
                return error

        results = await asyncio.gather(*(one(subject) for subject in subjects))
        answers = [result for result in results if isinstance(result, str)]
        if not answers:
            raise EngineError(f"none of {len(results)} images got an answer; the last one: {results[-1]}")
        if len(answers) > 1 and len(set(answers)) == 1:
            raise EngineError(
                f"{self.engine.model} gives the same description of {len(answers)} different images "
                f"({answers[0]!r:.120}): it may not see them; check the model and its chat template, or pass "
                "--no-canary if the images are the same"
            )

    async def _converse(self, subjects: list[Subject]) -> Output:
        async def one(subject: Subject) -> Dialogue | Reject:
            async with self.in_flight:
                self.occupancy.change(1)
                try:
                    return await converse(
                        self.engine,
                        subject,
                        questions=self.config.questions,
                        answer_tokens=self.config.answer_tokens,
                        summary_tokens=self.config.summary_tokens,
                        choices=self.choices,
                        attribute_tokens=self.config.attribute_tokens,
                    )
                except DialogueError as error:
                    return Reject(subject.image_id, error.reason, error.detail)
                finally:
                    self.occupancy.change(-1)

        results = await asyncio.gather(*(one(subject) for subject in subjects))
        found = list(zip((subject.image_id for subject in subjects), results, strict=True))
        rows = [(image_id, result) for image_id, result in found if isinstance(result, Dialogue)]
        rejects = [result for _, result in found if isinstance(result, Reject)]
        repeated = _repeated(rows)
        lengths = [count_tokens(made.summary) for _, made in rows]
        table = [self._row(image_id, made, repeated) for image_id, made in rows]
        counts = {
            "dialogues": len(rows),
            "prompt_tokens": sum(made.prompt_tokens for _, made in rows),
            "cached_tokens": sum(made.cached_tokens for _, made in rows),
            "reusable_tokens": sum(made.reusable_tokens for _, made in rows),
            "completion_tokens": sum(made.completion_tokens for _, made in rows),
            "summary_clip_tokens": sum(lengths),
            "summaries_over_77_tokens": sum(length > CONTEXT for length in lengths),
            **{f"flag_{name}": count for name, count in Counter(f for row in table for f in row["flags"]).items()},
            **self.occupancy.take(),
        }
        return Output({"dialogues": pa.Table.from_pylist(table, DIALOGUES)}, rejects, counts)

    def _row(self, image_id: str, made: Dialogue, repeated: str | None) -> dict[str, Any]:
        return {
            "image_id": image_id,
            "turns": [{"question": turn.question, "answer": turn.answer} for turn in made.turns],
            "summary": made.summary,
            "attributes": dict(made.attributes),
            "flags": [*made.flags, *(["repeated"] if made.summary == repeated else [])],
            "model": self.engine.model,
            "prompt_version": PROMPT_VERSION,
            "generation_settings": self.settings,
            "prompt_tokens": made.prompt_tokens,
            "cached_tokens": made.cached_tokens,
            "completion_tokens": made.completion_tokens,
        }


def _repeated(rows: list[tuple[str, Dialogue]]) -> str | None:
    """The summary that more than half of these images share, if any."""
    if len(rows) < REPEATED_AMONG:
        return None
    summary, count = Counter(made.summary for _, made in rows).most_common(1)[0]
    return summary if count > len(rows) / 2 else None


class Occupancy:
    """How well an engine is kept at work: seconds with and without a conversation, and conversation seconds."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.reset()

    def reset(self) -> None:
        self.since = time.monotonic()
        self.busy = self.idle = self.conversations = 0.0

    def change(self, by: int) -> None:
        now = time.monotonic()
        span, self.since = now - self.since, now
        self.conversations += span * self.in_flight
        if self.in_flight:
            self.busy += span
        else:
            self.idle += span
        self.in_flight += by

    def take(self) -> dict[str, float]:
        """What has come together since the last time."""
        self.change(0)
        counts = {"engine_busy_s": self.busy, "engine_idle_s": self.idle, "conversation_s": self.conversations}
        self.reset()
        return counts
