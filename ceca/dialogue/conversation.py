"""The multi-turn conversation about one image (method: The dialogue), and what an engine must be able to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ceca.dialogue.attributes import Choices, read_attributes
from ceca.errors import UserError

PROMPT_VERSION = "ceca-1"  # changes whenever a prompt below changes

QUESTIONS = (
    "What is the gender of the person in the image? Describe the hair of the person.",
    "What kind of clothes is the person wearing on the upper body? Is the person wearing a hat?",
    "What kind of pants or lower-body garment is the person wearing?",
    "What kind of shoes is the person wearing?",
    "Is the person holding anything in hand?",
)
SUMMARY_REQUEST = (
    "Based on the image and the answers to the previous questions, please provide a summary description of the person."
)
ATTRIBUTES_REQUEST = "Fill in what can be seen of the person as JSON, with 'unknown' where it cannot be seen."


class DialogueError(Exception):
    """This image's conversation failed: `reason` in snake_case and `detail`, for the table of rejects."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class EngineError(UserError):
    """The engine cannot start or go on; no other image would fare better."""


class EngineDied(EngineError):
    """The engine is lost, and another one may fare better."""


@dataclass(frozen=True)
class Subject:
    """What is asked about: an image's id and encoded bytes, and of drawn pedestrians the true attributes and view."""

    image_id: str
    image: bytes
    attributes: Mapping[str, str] | None = None
    view: str | None = None


@dataclass(frozen=True)
class Turn:
    question: str
    answer: str


@dataclass(frozen=True)
class Answer:
    """An engine's answer.

    `cached_tokens` of its prompt were not computed again; `reusable_tokens` are those that the turn before had
    computed, in whole blocks of the engine's cache. `cut_off` tells a length limit.
    """

    text: str
    prompt_tokens: int = 0
    cached_tokens: int = 0
    reusable_tokens: int = 0
    completion_tokens: int = 0
    cut_off: bool = False


@dataclass(frozen=True)
class Dialogue:
    """A finished conversation; token counts are sums over its turns.

    `attributes` are the structured answer, empty where none was asked for. `flags` say what to look at before the
    words are trusted: `answer_cut_off` and `summary_cut_off` by a length limit, `no_attributes` where the structured
    answer did not follow its schema.
    """

    turns: tuple[Turn, ...]
    summary: str
    prompt_tokens: int
    cached_tokens: int
    reusable_tokens: int
    completion_tokens: int
    attributes: Mapping[str, str]
    flags: tuple[str, ...]


class Engine(Protocol):
    """Answers questions about images. `model` names it in the table of dialogues."""

    model: str

    async def start(self) -> None:
        """Get ready; raises EngineError."""

    async def answer(
        self, subject: Subject, history: Sequence[Turn], question: str, max_tokens: int, choices: Choices | None = None
    ) -> Answer:
        """The next answer of a conversation, as JSON of these `choices` where they are given.

        Raises:
            DialogueError: for this image. EngineError: for all.
        """

    async def close(self) -> None: ...


async def converse(
    engine: Engine,
    subject: Subject,
    *,
    questions: int,
    answer_tokens: int,
    summary_tokens: int,
    choices: Choices | None = None,
    attribute_tokens: int = 256,
) -> Dialogue:
    """Ask the first `questions` questions, then for the summary; every turn sees the image and all earlier turns.

    With `choices`, the attributes are asked for last, so that they change no word of the dialogue.

    Raises:
        DialogueError: the engine could not answer about this image, or answered nothing.
    """
    turns: list[Turn] = []
    answers: list[Answer] = []
    for question in QUESTIONS[:questions]:
        answers.append(await _ask(engine, subject, turns, question, answer_tokens))
        turns.append(Turn(question, answers[-1].text))
    summary = await _ask(engine, subject, turns, SUMMARY_REQUEST, summary_tokens)
    flags = []
    if any(answer.cut_off for answer in answers):
        flags.append("answer_cut_off")
    if summary.cut_off:
        flags.append("summary_cut_off")
    answers.append(summary)
    attributes: Mapping[str, str] | None = None
    if choices:
        history = (*turns, Turn(SUMMARY_REQUEST, summary.text))
        answers.append(await engine.answer(subject, history, ATTRIBUTES_REQUEST, attribute_tokens, choices))
        attributes = read_attributes(answers[-1].text, choices)
        if attributes is None:
            flags.append("no_attributes")
    return Dialogue(
        turns=tuple(turns),
        summary=summary.text,
        prompt_tokens=sum(answer.prompt_tokens for answer in answers),
        cached_tokens=sum(answer.cached_tokens for answer in answers),
        reusable_tokens=sum(answer.reusable_tokens for answer in answers),
        completion_tokens=sum(answer.completion_tokens for answer in answers),
        attributes=attributes or {},
        flags=tuple(flags),
    )


async def _ask(engine: Engine, subject: Subject, turns: Sequence[Turn], question: str, max_tokens: int) -> Answer:
    answer = await engine.answer(subject, tuple(turns), question, max_tokens)
    text = one_line(answer.text)
    if not text:
        raise DialogueError("empty_answer", f"{engine.model} answered nothing to {question!r}")
    return replace(answer, text=text)


def one_line(text: str) -> str:
    """Without line breaks and double spaces, as answers stand in the history and in the table."""
    return " ".join(text.split())
