"""Multi-turn conversation about one image (method: The dialogue), and the interface of an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from ceca.dialogue.answers import refuses, says_nothing, spoken
from ceca.dialogue.attributes import Choices, read_attributes
from ceca.errors import UserError

AT_ONCE = 64  # conversations that keep an engine busy that does not say another number
PROMPT_VERSION = "ceca-1"  # must change if a prompt below changes

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
    """The conversation about one image failed; the image becomes a reject.

    Args:
        reason: short reason in snake_case.
        detail: message for a person.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class EngineError(UserError):
    """The engine cannot start or cannot continue, for any image."""


class EngineDied(EngineError):
    """The engine has died. A new engine may work."""


class View(NamedTuple):
    """A picture of a person as it was described alone: its summary, and its view if the person is drawn."""

    summary: str
    view: str | None = None


@dataclass(frozen=True)
class Subject:
    """The image that a conversation is about.

    Attributes:
        image_id: key of the image.
        image: encoded bytes.
        attributes: true attributes of a drawn pedestrian.
        view: view of a drawn pedestrian.
        views: pictures of the same person that the question is about (`ceca.dialogue.common`), this one among them.
        said: what somebody who was shown the picture says of the person they look for, if the question is about that
            (`ceca.dialogue.understanding`).
    """

    image_id: str
    image: bytes
    attributes: Mapping[str, str] | None = None
    view: str | None = None
    views: tuple[View, ...] = ()
    said: str = ""


class Turn(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Answer:
    """Answer of an engine.

    Attributes:
        text: the answer, from an engine as the model wrote it.
        prompt_tokens: tokens of the prompt.
        cached_tokens: prompt tokens that came from the engine's cache.
        reusable_tokens: prompt tokens that the previous turn had computed, in whole blocks of the engine's cache.
        completion_tokens: tokens of the answer.
        cut_off: the answer reached the length limit.
        thought: the engine keeps thoughts of the model apart, or thoughts were removed from the text.
        refusal: an endpoint's word that it refuses, beside the text; empty if it does not.
    """

    text: str
    prompt_tokens: int = 0
    cached_tokens: int = 0
    reusable_tokens: int = 0
    completion_tokens: int = 0
    cut_off: bool = False
    thought: bool = False
    refusal: str = ""


@dataclass(frozen=True)
class Dialogue:
    """Finished conversation. Token counts are sums over all turns.

    Attributes:
        turns: questions and answers, without the summary.
        summary: description of the person.
        prompt_tokens: see `Answer`.
        cached_tokens: see `Answer`.
        reusable_tokens: see `Answer`.
        completion_tokens: see `Answer`.
        attributes: structured answer; empty if none was requested.
        flags: warnings about the text: `answer_cut_off` and `summary_cut_off` (length limit reached), `answer_refused`
            (the model refuses a question, but not the summary), `thoughts_removed`, `no_attributes` (the structured
            answer does not follow its schema).
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
    """Model that answers questions about images. `model` is its name in the table of dialogues."""

    model: str

    async def start(self) -> None:
        """Start the engine.

        Raises:
            EngineError: the engine cannot start.
        """

    async def answer(
        self, subject: Subject, history: Sequence[Turn], question: str, max_tokens: int, choices: Choices | None = None
    ) -> Answer:
        """Answer the next question of a conversation.

        Args:
            subject: image that the question is about.
            history: earlier turns of the conversation.
            question: next question.
            max_tokens: length limit of the answer.
            choices: vocabulary of a structured answer in JSON; None for free text.

        Raises:
            DialogueError: the engine cannot answer about this image.
            EngineError: the engine cannot answer about any image.
        """

    async def close(self) -> None:
        """Release the resources of the engine."""


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
    """Hold the conversation about one image: questions, summary, then attributes. Each turn sees all earlier turns.

    The attributes come last, so that they do not change the text of the dialogue.

    Args:
        engine: started engine.
        subject: image that the conversation is about.
        questions: number of questions, the first ones of QUESTIONS.
        answer_tokens: length limit of an answer.
        summary_tokens: length limit of the summary.
        choices: vocabulary of the attributes; None asks for no attributes.
        attribute_tokens: length limit of the structured answer.

    Raises:
        DialogueError: the engine cannot answer about this image, an answer is empty, or the summary refuses or says
            nothing.
        EngineError: the engine cannot answer about any image.
    """
    turns: list[Turn] = []
    answers: list[Answer] = []
    for question in QUESTIONS[:questions]:
        answers.append(await ask(engine, subject, turns, question, answer_tokens))
        turns.append(Turn(question, answers[-1].text))
    summary = await ask_summary(engine, subject, turns, SUMMARY_REQUEST, summary_tokens)
    flags = []
    if any(answer.cut_off for answer in answers):
        flags.append("answer_cut_off")
    if summary.cut_off:
        flags.append("summary_cut_off")
    if any(refuses(answer.text) for answer in answers):
        flags.append("answer_refused")
    answers.append(summary)
    if any(answer.thought for answer in answers):
        flags.append("thoughts_removed")
    attributes: Mapping[str, str] | None = None
    if choices:
        history = (*turns, Turn(SUMMARY_REQUEST, summary.text))
        answers.append(await engine.answer(subject, history, ATTRIBUTES_REQUEST, attribute_tokens, choices))
        attributes = read_attributes(spoken(answers[-1].text).text, choices)
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


async def ask(engine: Engine, subject: Subject, turns: Sequence[Turn], question: str, max_tokens: int) -> Answer:
    """Ask a question and return what counts of the answer: on one line, without thoughts.

    Raises:
        DialogueError: the engine cannot answer about this image, refuses to, or answers nothing.
        EngineError: the engine cannot answer about any image.
    """
    answer = await engine.answer(subject, tuple(turns), question, max_tokens)
    text, thought = spoken(answer.text)
    thought |= answer.thought
    if answer.refusal:
        raise DialogueError("refused", f"{engine.model} refuses {question!r}: {answer.refusal:.200}")
    if not text:
        why = " but thoughts" if thought else ""
        advice = f"; it reached the limit of {max_tokens} tokens" if answer.cut_off else ""
        raise DialogueError("empty_answer", f"{engine.model} answered nothing{why} to {question!r}{advice}")
    return replace(answer, text=text, thought=thought)


async def ask_summary(
    engine: Engine, subject: Subject, turns: Sequence[Turn], question: str, max_tokens: int
) -> Answer:
    """Ask for a summary, as `ask` does.

    Raises:
        DialogueError: as of `ask`, or the summary refuses or says nothing.
        EngineError: the engine cannot answer about any image.
    """
    summary = await ask(engine, subject, turns, question, max_tokens)
    if refuses(summary.text):
        raise DialogueError("refused", f"{engine.model} refuses to describe the person: {summary.text:.200}")
    if says_nothing(summary.text):
        raise DialogueError("empty_answer", f"{engine.model} says nothing in its summary: {summary.text!r}")
    return summary


def chat_messages(
    history: Sequence[Turn], question: str, image: Mapping[str, Any], *, plain_answers: bool = False
) -> list[dict[str, Any]]:
    """Write a conversation as chat messages, with the image in the first one.

    Args:
        history: earlier turns.
        question: next question.
        image: content part of the image.
        plain_answers: write an answer as a string instead of a list of parts, for endpoints that require it.
    """
    messages: list[dict[str, Any]] = []
    for turn in history:
        answer = turn.answer if plain_answers else [{"type": "text", "text": turn.answer}]
        messages.append({"role": "user", "content": [{"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
    messages[0]["content"].insert(0, image)
    return messages
