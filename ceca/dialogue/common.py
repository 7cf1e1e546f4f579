"""Common summaries: one description of a person from the summaries of several pictures (method: Common summaries)."""

from __future__ import annotations

from collections.abc import Sequence

from ceca.dialogue.conversation import Answer, Engine, Subject, View, ask_summary

COMMON_VERSION = "common-1"  # must change if the request changes
MOST_VIEWS = 12  # summaries that one request holds; of more pictures, this many are taken, spread evenly


def wording(views: Sequence[View]) -> str:
    """Text of the request for the common summary of these views."""
    told = "\n".join(f"{number}. {view.summary}" for number, view in enumerate(views, 1))
    return (
        f"{len(views)} pictures show the same person. Each was described alone, and you see the first one.\n{told}\n"
        "Please provide one summary description of the person that holds for all pictures. Add what only some of them "
        "show. Where the descriptions contradict each other, keep what most of them say, and do not trust a "
        "description in what its picture hardly shows. Do not mention the pictures."
    )


async def ask_common(engine: Engine, subject: Subject, max_tokens: int) -> Answer:
    """Ask for the common summary of the pictures of one person.

    The engine gets one picture and the texts about all: so any engine can answer, in one turn, whatever their number.

    Args:
        engine: started engine.
        subject: the first picture, with `views`.
        max_tokens: length limit of the summary.

    Raises:
        DialogueError: the engine cannot answer, or the summary refuses or says nothing.
        EngineError: the engine cannot answer about any image.
    """
    return await ask_summary(engine, subject, (), wording(subject.views), max_tokens)


def spread(number: int) -> list[int]:
    """The views that are told the engine, of this number of views.

    >>> spread(3), spread(23)
    ([0, 1, 2], [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22])
    """
    if number <= MOST_VIEWS:
        return list(range(number))
    return [round(place * (number - 1) / (MOST_VIEWS - 1)) for place in range(MOST_VIEWS)]
