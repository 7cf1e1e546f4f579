"""A *simulated* annotator: it knows the drawn pedestrians' true attributes and errs at a configured rate.

It lets the whole pipeline run and be measured without a multimodal model. What it scores says nothing about one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence

import numpy as np

from ceca.config import OracleConfig
from ceca.data.schema import image_id as key_of
from ceca.dialogue.attributes import UNKNOWN, Choices
from ceca.dialogue.conversation import QUESTIONS, Answer, DialogueError, EngineError, Subject, Turn

log = logging.getLogger(__name__)

# Attributes of which a view shows little: what a simulated annotator gets wrong at `hidden_error_rate`.
HIDDEN: dict[str, tuple[str, ...]] = {
    "front": ("hair_length", "lower_pattern", "carried", "carried_colour"),
    "back": ("gender", "upper_kind", "upper_pattern", "hat", "hat_colour"),
    "left": ("hair_colour", "upper_colour", "lower_pattern", "shoes_kind", "carried"),
    "right": ("hair_length", "upper_pattern", "lower_colour", "lower_kind", "shoes_colour"),
}

PLURAL = ("trousers", "jeans", "shorts", "leggings")


class OracleEngine:
    """Answers from `Subject.attributes`; an error is drawn once per image and attribute, so answers and summary agree.

    Args:
        vocabulary: the values an attribute can have, from which a wrong one is taken.
    """

    def __init__(self, config: OracleConfig, vocabulary: Mapping[str, Sequence[str]]):
        self.config, self.vocabulary = config, vocabulary
        self.model = f"oracle (simulated annotator, error rate {config.error_rate:g})"

    async def start(self) -> None:
        if not self.vocabulary:
            raise EngineError(
                "the oracle answers from the attributes of drawn pedestrians and this dataset has none; "
                "choose --engine vllm or --engine openai"
            )
        log.info(
            "dialogues come from a simulated annotator that knows the truth and errs in %.0f %% of attributes; "
            "they say nothing about a multimodal model",
            100 * self.config.error_rate,
        )

    async def close(self) -> None:
        return None

    async def answer(
        self, subject: Subject, history: Sequence[Turn], question: str, max_tokens: int, choices: Choices | None = None
    ) -> Answer:
        if subject.attributes is None:
            raise DialogueError("no_attributes", "the image has no row in the table of attributes")
        seen = self._perceive(subject.image_id, subject.attributes, subject.view)
        if choices:
            reported = {name: seen.get(name, UNKNOWN) for name in choices}
            return Answer(json.dumps({n: value if value in choices[n] else UNKNOWN for n, value in reported.items()}))
        sentences = _sentences(seen)
        if question in QUESTIONS:
            return Answer(sentences[QUESTIONS.index(question)])
        if len(history) < len(QUESTIONS):  # it knows no more than it was asked
            return Answer(" ".join(turn.answer for turn in history))
        return Answer(_summary(seen, self._random(subject.image_id, "summary")))

    def _perceive(self, image_id: str, truth: Mapping[str, str], view: str | None) -> dict[str, str]:
        """The attributes as reported: each wrong with the configured probability."""
        hidden = HIDDEN.get(view or "", ())
        seen = dict(truth)
        for name, value in truth.items():
            random = self._random(image_id, name)
            others = [other for other in self._values(name) if other != value]
            # A kind may be there or not; the colour or pattern of something that is there is one of the others.
            applies = value != "none" or name in ("hat", "carried")
            rate = self.config.error_rate
            if name in hidden and self.config.hidden_error_rate is not None:
                rate = self.config.hidden_error_rate
            if others and applies and random.random() < rate:
                seen[name] = others[int(random.integers(len(others)))]
        for thing, colour in (("hair_length", "hair_colour"), ("hat", "hat_colour"), ("carried", "carried_colour")):
            if seen[thing] not in ("none", "bald") and seen[colour] == "none":  # a thing that is only imagined
                colours = self._values(colour)
                seen[colour] = colours[int(self._random(image_id, f"imagined {colour}").integers(len(colours)))]
        return seen

    def _values(self, name: str) -> list[str]:
        values = self.vocabulary.get(name, ())
        return [value for value in values if value != "none" or name in ("hat", "carried")]

    def _random(self, image_id: str, what: str) -> np.random.Generator:
        return np.random.default_rng(int(key_of(f"{self.config.seed}/{image_id}/{what}"), 16))


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _noun(colour: str, pattern: str, kind: str) -> str:
    pattern = "" if pattern == "plain" else f"{pattern} "
    words = f"{colour} {pattern}{kind}".strip()
    return words if kind in PLURAL else _article(words)


def _parts(seen: Mapping[str, str]) -> dict[str, str]:
    gender = seen["gender"]
    hair = "no hair" if seen["hair_length"] == "bald" else f"{seen['hair_length']} {seen['hair_colour']} hair"
    return {
        "who": gender,
        "pronoun": {"woman": "She", "man": "He", "female": "She", "male": "He"}.get(gender, "The person"),
        "hair": hair,
        "upper": _noun(seen["upper_colour"], seen["upper_pattern"], seen["upper_kind"]),
        "hat": "no hat" if seen["hat"] == "none" else _article(f"{seen['hat_colour']} {seen['hat']}"),
        "lower": (
            ""
            if seen["lower_kind"] == "none"  # under a dress
            else _noun(seen["lower_colour"], seen["lower_pattern"], seen["lower_kind"])
        ),
        "shoes": f"{seen['shoes_colour']} {seen['shoes_kind']}",
        "carried": "nothing" if seen["carried"] == "none" else _article(f"{seen['carried_colour']} {seen['carried']}"),
    }


def _sentences(seen: Mapping[str, str]) -> tuple[str, ...]:
    """Answers to the five questions."""
    p = _parts(seen)
    return (
        f"The person is a {p['who']} with {p['hair']}.",
        f"The person is wearing {p['upper']} and {p['hat']}.",
        f"The person is wearing {p['lower'] or 'no separate lower-body garment'}.",
        f"The person is wearing {p['shoes']}.",
        f"The person is carrying {p['carried']}.",
    )


def _summary(seen: Mapping[str, str], random: np.random.Generator) -> str:
    p = _parts(seen)

    def upper_and_lower(between: str) -> str:
        return f"{p['upper']}{between}{p['lower']}" if p["lower"] else p["upper"]

    templates = (
        f"A {p['who']} with {p['hair']} wearing {upper_and_lower(', ')} and {p['shoes']}. "
        f"{p['pronoun']} carries {p['carried']} and wears {p['hat']}.",
        f"The {p['who']} has {p['hair']}, is dressed in {upper_and_lower(' with ')}, and wears {p['shoes']} "
        f"and {p['hat']}. {p['pronoun']} holds {p['carried']}.",
        f"The person is a {p['who']} with {p['hair']} and {p['hat']}, in {upper_and_lower(' and ')}. "
        f"The shoes are {p['shoes']}. {p['pronoun']} is carrying {p['carried']}.",
    )
    return templates[int(random.integers(len(templates)))]
