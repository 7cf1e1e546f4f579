"""*Simulated* annotator: it knows the true attributes of drawn pedestrians and errs at a configured rate.

With it, the whole pipeline can be run and measured without a multimodal model. Its results say nothing about one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from ceca.config import OracleConfig
from ceca.data.schema import image_id as key_of
from ceca.dialogue.attributes import UNKNOWN, Choices, chosen
from ceca.dialogue.conversation import QUESTIONS, Answer, DialogueError, EngineError, Subject, Turn
from ceca.dialogue.phrases import read_summary, write_answers, write_summary
from ceca.dialogue.understanding import read_words

log = logging.getLogger(__name__)

# Attributes that are hard to see in a view. The simulated annotator reports them wrongly at `hidden_error_rate`.
HIDDEN: dict[str, tuple[str, ...]] = {
    "front": ("hair_length", "lower_pattern", "carried", "carried_colour"),
    "back": ("gender", "upper_kind", "upper_pattern", "hat", "hat_colour"),
    "left": ("hair_colour", "upper_colour", "lower_pattern", "shoes_kind", "carried"),
    "right": ("hair_length", "upper_pattern", "lower_colour", "lower_kind", "shoes_colour"),
}
OPTIONAL = ("hat", "carried")  # things that a person may not have; "none" is a value to report
# What an attribute is of. Where most views say that there is no such thing, it has no colour and no pattern.
OF = {
    "hair_colour": "hair_length",
    "hat_colour": "hat",
    "lower_colour": "lower_kind",
    "lower_pattern": "lower_kind",
    "carried_colour": "carried",
}
HARDLY = 0.25  # vote of a view that hardly shows an attribute: four of them count as much as one that shows it


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
        if subject.views:
            return Answer(self._agree(subject))
        if subject.said:  # it reads the words alone
            said = read_words(subject.said, choices or {})
            return Answer(json.dumps({name: said.get(name, UNKNOWN) for name in choices or {}}))
        if subject.attributes is None:
            raise DialogueError("no_attributes", "the table of attributes has no row for this image")
        seen = self.perceive(subject.image_id, subject.attributes, subject.view)
        if choices:
            return Answer(json.dumps({name: chosen(seen.get(name), values) for name, values in choices.items()}))
        if question in QUESTIONS:
            return Answer(write_answers(seen)[QUESTIONS.index(question)])
        if len(history) < len(QUESTIONS):  # the summary contains only what the questions asked for
            return Answer(" ".join(turn.answer for turn in history))
        return Answer(write_summary(seen, self._random(subject.image_id, "summary")))

    def _agree(self, subject: Subject) -> str:
        """The common summary of several pictures: what most of their own summaries say. It is not told the truth."""
        said = [read_summary(view.summary, self.vocabulary) for view in subject.views]
        hidden = [HIDDEN.get(view.view or "", ()) for view in subject.views]
        return write_summary(majority(said, hidden), self._random(subject.image_id, "summary"))

    def perceive(self, image_id: str, truth: Mapping[str, str], view: str | None) -> dict[str, str]:
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


def majority(said: Sequence[Mapping[str, str]], hidden: Sequence[Collection[str]]) -> dict[str, str]:
    """What most views of a person say (method: Common summaries). Of values with equal votes the first is taken.

    Args:
        said: of each view, attribute → value. A view that does not mention an attribute has no vote.
        hidden: of each view, the attributes that it hardly shows.

    Returns:
        Attribute → value.
    """
    agreed: dict[str, str] = {}
    for name in dict.fromkeys(name for of_view in said for name in of_view):
        if agreed.get(OF.get(name, "")) in ("none", "bald"):
            agreed[name] = "none"
            continue
        votes: dict[str, float] = {}
        for of_view, hard in zip(said, hidden, strict=True):
            if name in of_view and not (name in OF and of_view[name] == "none"):
                votes[of_view[name]] = votes.get(of_view[name], 0.0) + (HARDLY if name in hard else 1.0)
        agreed[name] = max(votes, key=votes.__getitem__)
    return agreed
