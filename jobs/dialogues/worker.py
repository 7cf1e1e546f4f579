"""The worker of the dialogue stage."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any, NamedTuple

import pyarrow as pa

from ceca.data.schema import DIALOGUES
from ceca.data.store import Manifest, Reject
from ceca.dialogue.answers import refuses
from ceca.dialogue.attributes import Choices
from ceca.dialogue.conversation import (
    PROMPT_VERSION,
    SUMMARY_REQUEST,
    Dialogue,
    DialogueError,
    Subject,
    ask,
    converse,
)
from ceca.dialogue.engines import generation_settings
from ceca.model.tokens import CONTEXT, count_tokens
from jobs.dialogues.engine import CanaryError, EngineWorker
from jobs.runtime.units import Output

REPEATED_AMONG = 8  # a summary is flagged if more than half of at least this many images share it


class DialogueWorker(EngineWorker):
    """Describes images. A unit of work is {"images": ranges of rows}.

    Conversations of the next unit take the places that the last ones of this unit leave.

    Args:
        uri: as in `EngineWorker`.
        images: as in `EngineWorker`.
        config: as in `EngineWorker`.
        vocabulary: as in `EngineWorker`.
        choices: attribute → its values to ask for in a structured answer; None if there is no structured answer.
        canaries: a unit of images whose descriptions must differ before the work starts.
    """

    def __init__(
        self,
        uri: str,
        images: Manifest,
        config: dict[str, Any],
        vocabulary: Choices,
        choices: Choices | None,
        canaries: dict[str, list[list[int]]],
    ):
        super().__init__(uri, images, config, vocabulary)
        self.choices = choices
        self.settings = json.dumps(generation_settings(self.config), sort_keys=True)
        checked = self.subjects(canaries)
        if len(checked) > 1:
            self.use_engine(self._check_canaries(checked))
        self.occupancy.reset()

    def __call__(self, work: dict[str, list[list[int]]]) -> Output:
        return self.use_engine(self._converse(self.subjects(work)))

    async def _check_canaries(self, subjects: list[Subject]) -> None:
        """Ask for a description of each image, to stop a model that does not see the images before the work starts.

        Raises:
            CanaryError: no image got an answer, all got the same one, or the model refuses them all.
        """

        async def one(subject: Subject) -> str | DialogueError:
            try:
                return (await ask(self.engine, subject, (), SUMMARY_REQUEST, self.config.summary_tokens)).text
            except DialogueError as error:
                return error

        results = await asyncio.gather(*(one(subject) for subject in subjects))
        answers = [result for result in results if isinstance(result, str)]
        if not answers:
            raise CanaryError(f"none of {len(results)} images got an answer; the last one: {results[-1]}")
        if len(answers) > 1 and len(set(answers)) == 1:
            raise CanaryError(
                f"{self.engine.model} gives the same description of {len(answers)} different images "
                f"({answers[0]!r:.120}): it may not see them; check the model and its chat template, or pass "
                "--no-canary if the images are the same"
            )
        if all(refuses(answer) for answer in answers):
            raise CanaryError(
                f"{self.engine.model} refuses to describe {len(answers)} of {len(results)} images "
                f"({answers[0]!r:.120}); choose another model"
            )

    async def _converse(self, subjects: list[Subject]) -> Output:
        async def one(subject: Subject) -> Dialogue | Reject:
            async with self.conversation():
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

        results = await asyncio.gather(*(one(subject) for subject in subjects))
        described = [
            Described(subject.image_id, result)
            for subject, result in zip(subjects, results, strict=True)
            if isinstance(result, Dialogue)
        ]
        repeated = _repeated_summary(described)
        table = [self._row(one, repeated) for one in described]
        flags = Counter(flag for row in table for flag in row["flags"])
        counts = {
            **_count(described),
            **{f"flag_{name}": count for name, count in flags.items()},
            **self.occupancy.take(),
        }
        rejects = [result for result in results if isinstance(result, Reject)]
        return Output({"dialogues": pa.Table.from_pylist(table, DIALOGUES)}, rejects, counts)

    def _row(self, described: Described, repeated: str | None) -> dict[str, Any]:
        dialogue = described.dialogue
        return {
            "image_id": described.image_id,
            "turns": [{"question": turn.question, "answer": turn.answer} for turn in dialogue.turns],
            "summary": dialogue.summary,
            "attributes": dict(dialogue.attributes),
            "flags": [*dialogue.flags, *(["repeated"] if dialogue.summary == repeated else [])],
            "model": self.engine.model,
            "prompt_version": PROMPT_VERSION,
            "generation_settings": self.settings,
            "prompt_tokens": dialogue.prompt_tokens,
            "cached_tokens": dialogue.cached_tokens,
            "completion_tokens": dialogue.completion_tokens,
        }


class Described(NamedTuple):
    """An image and its dialogue."""

    image_id: str
    dialogue: Dialogue


def _count(described: list[Described]) -> dict[str, int]:
    """Sums over dialogues, for the summary of the stage."""
    dialogues = [one.dialogue for one in described]
    lengths = [count_tokens(dialogue.summary) for dialogue in dialogues]
    return {
        "dialogues": len(dialogues),
        "prompt_tokens": sum(dialogue.prompt_tokens for dialogue in dialogues),
        "cached_tokens": sum(dialogue.cached_tokens for dialogue in dialogues),
        "reusable_tokens": sum(dialogue.reusable_tokens for dialogue in dialogues),
        "completion_tokens": sum(dialogue.completion_tokens for dialogue in dialogues),
        "summary_clip_tokens": sum(lengths),
        "summaries_over_77_tokens": sum(length > CONTEXT for length in lengths),
    }


def _repeated_summary(described: list[Described]) -> str | None:
    """The summary that more than half of the images share, or None."""
    if len(described) < REPEATED_AMONG:
        return None
    summary, count = Counter(one.dialogue.summary for one in described).most_common(1)[0]
    return summary if count > len(described) / 2 else None
