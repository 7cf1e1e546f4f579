"""What somebody says in their own words of the person they look for, read as attributes: by its words, or by an engine.

"No, the jacket was darker" is about a picture that they were shown, so an engine reads the words beside that picture.
"""

from __future__ import annotations

import dataclasses
import json
import re

from ceca.dialogue.answers import spoken
from ceca.dialogue.attributes import Choices, attributes_of, named, read_attributes
from ceca.dialogue.conversation import QUESTIONS, Engine, Subject

TOKENS = 256  # length limit of an answer: JSON with every attribute
# A word of an answer that names no thing, such as "it was a dark red, I think".
_SHORT = re.compile(
    r"an?|the|it|its|it's|this|that|s?he|they|his|her|their|(?:was|were|is|are)(?:n't)?|ha[ds]|have|wore|and|but|no|not|"
    r"yes|i|think|guess|would|say|very|quite|rather|really|just|more|like|kind|sort|of|something|in|dark|light|bright|"
    r"pale|deep|colou?r(?:ed)?|one"
)
# A sentence that tells what somebody does not know, compares, is about the picture, or denies what stands before.
_TELLS_NOTHING = re.compile(
    r"\b(?:no|not|never|\w+n't)\b.*\b(?:know|remember|recall|notice\w*|see|saw|seen|look\w*|idea|attention|sure|say)\b|"
    r"\b(?:than|less|too|never|hardly|barely|picture|image|photo|this one)\b|"
    r"\w.*\b(?:no|not(?: really| it)?|\w+n't(?: it)?)\W*$"
)
# What says that there is no such thing at all, and not only none of a kind ("not a cap", "no long hair").
_ABSENT = re.compile(
    r"\bbald\b|\bnothing\b|(?<!not )\bempty[- ]handed\b|\bhands (?:are|were) empty\b|"
    r"\b(?:no|without(?: an?| any)?|(?:n't|not) (?:have|having|(?:wear|carry|hold)(?:ing)?)(?: an?| any)?) "
    r"(?:hat|hair|pants|trousers|anything)\b|(?:n't|not) (?:have|hold|carry)(?:ing)? anything\b"
)
_CARRIED = re.compile(r"\b(?:hand|hold|carry|carri|bag)")
_NOTHING = re.compile(r"\W*(no|none|nothing|no one)\W*", re.IGNORECASE)


def read_description(text: str, choices: Choices) -> dict[str, str]:
    """Read the attributes that sentences about one person name: nobody knows which sentence answers which question."""
    return attributes_of([(question, text) for question in QUESTIONS], choices)


def read_words(words: str, choices: Choices, asked: str | None = None) -> dict[str, str]:
    """Read the attributes that somebody's words name, without an engine (`attributes_of`).

    Args:
        words: one or more sentences; what they deny or doubt is left out.
        choices: vocabulary.
        asked: the attribute that they were asked about. Then its value alone is an answer, such as "black", unless the
            words name another thing.

    Returns:
        The attributes that are understood, in the order of the vocabulary.

    >>> read_words("no, a red jacket", {"upper_kind": ["coat", "jacket"], "upper_colour": ["black", "red"]})
    {'upper_kind': 'jacket', 'upper_colour': 'red'}
    >>> read_words("dark blue, I think", {"shoes_colour": ["black", "blue"]}, "shoes_colour")
    {'shoes_colour': 'blue'}
    """
    nothing = _NOTHING.fullmatch(words)
    sentences = re.findall(r"[^.;!?\n]+[.;!?\n]?", words.lower().replace("’", "'"))
    words = " ".join(sentence for sentence in sentences if not _TELLS_NOTHING.search(sentence))
    found = read_description(words, choices)
    of_hands = _CARRIED.search(words) or (asked or "").startswith("carried")  # "nothing" may be on the head
    found = {
        name: value
        for name, value in found.items()
        if value not in ("none", "bald") or (_ABSENT.search(words) and (of_hands or not name.startswith("carried")))
    }
    if asked is not None and asked in choices and asked not in found:
        value, others = named(words, choices[asked])
        if (
            nothing
            and "none" in choices[asked]
            and (nothing[1].lower() == "none" or asked.startswith(("hat", "carried")))
        ):
            found[asked] = "none"
        elif value is not None and all(map(_SHORT.fullmatch, others - {*asked.split("_")})):
            found[asked] = value
    return {attribute: found[attribute] for attribute in choices if attribute in found}


def wording(words: str, question: str = "") -> str:
    """Text of the request to an engine.

    Args:
        words: what somebody says.
        question: what they were asked; empty if they speak unasked.
    """
    asked = f" They were asked: {json.dumps(question, ensure_ascii=False)}" if question else ""
    return (
        f"Somebody looks for a person and was shown this image, which may show somebody else.{asked} They say: "
        f"{json.dumps(words, ensure_ascii=False)} Fill in as JSON what these words say of the person they look for, "
        "with 'unknown' for all that they do not mention, whatever the image shows. A comparison, such as 'darker', "
        "is with the person in the image."
    )


async def understand(
    engine: Engine, subject: Subject, words: str, choices: Choices, question: str = ""
) -> dict[str, str]:
    """Have an engine read somebody's words beside the picture that they were shown.

    Args:
        engine: started engine.
        subject: the picture.
        words: what they say.
        choices: vocabulary.
        question: what they were asked; empty if they speak unasked.

    Returns:
        The attributes that the engine understands; none if its answer does not follow the vocabulary.

    Raises:
        DialogueError: the engine cannot answer about this picture.
        EngineError: the engine cannot answer about any picture.
    """
    shown = dataclasses.replace(subject, said=words)
    answer = await engine.answer(shown, (), wording(words, question), TOKENS, choices)
    return read_attributes(spoken(answer.text).text, choices) or {}
