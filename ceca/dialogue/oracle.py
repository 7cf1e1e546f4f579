"""*Simulated* annotator: it knows the true attributes of drawn pedestrians and errs at a configured rate.

With it, the whole pipeline can be run and measured without a multimodal model. Its results say nothing about one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence

import numpy as np

from ceca.config import OracleConfig
from ceca.data.schema import image_id as key_of
from ceca.datasets.drawn.captions import PLURAL, with_article
from ceca.dialogue.attributes import Choices, chosen
from ceca.dialogue.conversation import QUESTIONS, Answer, DialogueError, EngineError, Subject, Turn

log = logging.getLogger(__name__)

# Attributes that are hard to see in a view. The simulated annotator reports them wrongly at `hidden_error_rate`.
HIDDEN: dict[str, tuple[str, ...]] = {
    "front": ("hair_length", "lower_pattern", "carried", "carried_colour"),
    "back": ("gender", "upper_kind", "upper_pattern", "hat", "hat_colour"),
    "left": ("hair_colour", "upper_colour", "lower_pattern", "shoes_kind", "carried"),
    "right": ("hair_length", "upper_pattern", "lower_colour", "lower_kind", "shoes_colour"),
}
OPTIONAL = ("hat", "carried")  # things that a person may not have; "none" is a value to report


class OracleEngine:
    """Engine that answers from `Subject.attributes`.

    Whether an attribute is wrong is decided once per image and attribute, so the answers and the summary agree.

    Args:
        config: settings of the oracle.
        vocabulary: possible values of each attribute; wrong values are taken from it.
    """

    def __init__(self, config: OracleConfig, vocabulary: Mapping[str, Sequence[str]]):
        self.config, self.vocabulary = config, vocabulary
        self.model = f"oracle (simulated annotator, error rate {config.error_rate:g})"

    async def start(self) -> None:
        if not self.vocabulary:
            raise EngineError(
                "the oracle answers from the attributes of drawn pedestrians, and this dataset has none; "
                "choose --engine vllm or --engine openai"
            )
        log.info(
            "the dialogues come from a simulated annotator that knows the truth and errs in %.0f %% of the attributes; "
            "they say nothing about a multimodal model",
            100 * self.config.error_rate,
        )

    async def close(self) -> None:
        return None

    async def answer(
        self, subject: Subject, history: Sequence[Turn], question: str, max_tokens: int, choices: Choices | None = None
    ) -> Answer:
        if subject.attributes is None:
            raise DialogueError("no_attributes", "the table of attributes has no row for this image")
        seen = self._perceive(subject.image_id, subject.attributes, subject.view)
        if choices:
            return Answer(json.dumps({name: chosen(seen.get(name), values) for name, values in choices.items()}))
        sentences = _sentences(seen)
        if question in QUESTIONS:
            return Answer(sentences[QUESTIONS.index(question)])
        if len(history) < len(QUESTIONS):  # the summary contains only what the questions asked for
            return Answer(" ".join(turn.answer for turn in history))
        return Answer(_summary(seen, self._random(subject.image_id, "summary")))

    def _perceive(self, image_id: str, truth: Mapping[str, str], view: str | None) -> dict[str, str]:
        """Return the attributes as reported: each one is wrong with the configured probability."""
        hidden = HIDDEN.get(view or "", ())
        seen = dict(truth)
        for name, value in truth.items():
            random = self._random(image_id, name)
            others = [other for other in self._values(name) if other != value]
            # A hat or carried thing may wrongly be reported or missed. Other values that are "none" stay "none".
            applies = value != "none" or name in OPTIONAL
            rate = self.config.error_rate
            if name in hidden and self.config.hidden_error_rate is not None:
                rate = self.config.hidden_error_rate
            if others and applies and random.random() < rate:
                seen[name] = others[int(random.integers(len(others)))]
        for thing, colour in (("hair_length", "hair_colour"), ("hat", "hat_colour"), ("carried", "carried_colour")):
            # A wrongly reported thing needs a colour.
            if seen[thing] not in ("none", "bald") and seen[colour] == "none":
                colours = self._values(colour)
                seen[colour] = colours[int(self._random(image_id, f"imagined {colour}").integers(len(colours)))]
        return seen

    def _values(self, name: str) -> list[str]:
        """Return the values that may be reported for an attribute."""
        values = self.vocabulary.get(name, ())
        return [value for value in values if value != "none" or name in OPTIONAL]

    def _random(self, image_id: str, purpose: str) -> np.random.Generator:
        """Return a random generator that depends only on the seed, the image and the purpose."""
        return np.random.default_rng(int(key_of(f"{self.config.seed}/{image_id}/{purpose}"), 16))


def _parts(seen: Mapping[str, str]) -> dict[str, str]:
    """Return the phrases of the answers and the summary."""
    gender = seen["gender"]

    def thing(name: str) -> str:
        return with_article(f"{seen[f'{name}_colour']} {seen[name]}")

    def garment(name: str) -> str:
        kind, colour, pattern = (seen[f"{name}_{part}"] for part in ("kind", "colour", "pattern"))
        words = f"{colour} {'' if pattern == 'plain' else f'{pattern} '}{kind}".strip()
        return words if kind in PLURAL else with_article(words)

    return {
        "who": gender,
        "pronoun": {"woman": "She", "man": "He", "female": "She", "male": "He"}.get(gender, "The person"),
        "hair": "no hair" if seen["hair_length"] == "bald" else f"{seen['hair_length']} {seen['hair_colour']} hair",
        "upper": garment("upper"),
        "hat": "no hat" if seen["hat"] == "none" else thing("hat"),
        "lower": "" if seen["lower_kind"] == "none" else garment("lower"),  # a dress has no lower garment
        "shoes": f"{seen['shoes_colour']} {seen['shoes_kind']}",
        "carried": "nothing" if seen["carried"] == "none" else thing("carried"),
    }


def _sentences(seen: Mapping[str, str]) -> tuple[str, ...]:
    """Return the answers to the five questions."""
    p = _parts(seen)
    return (
        f"The person is a {p['who']} with {p['hair']}.",
        f"The person is wearing {p['upper']} and {p['hat']}.",
        f"The person is wearing {p['lower'] or 'no separate lower-body garment'}.",
        f"The person is wearing {p['shoes']}.",
        f"The person is carrying {p['carried']}.",
    )


def _summary(seen: Mapping[str, str], random: np.random.Generator) -> str:
    """Return a summary in one of three wordings."""
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
