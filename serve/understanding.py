"""What a searcher says in their own words, read as answers of a conversation: by a vocabulary, and by an engine."""

from __future__ import annotations

import asyncio
import logging
import time

from ray.serve.handle import DeploymentHandle

from ceca.dialogue.attributes import Choices
from ceca.dialogue.conversation import Subject
from ceca.dialogue.understanding import read_words
from ceca.search.questions import wording
from serve.judge import Heard
from serve.refusals import NotFound, invalid
from serve.reranking import AWAY, ENGINE_SHARE, NO_ENGINE, away
from serve.schema import Understood, WordsRequest
from serve.snapshot import Snapshot

log = logging.getLogger(__name__)


async def understand(snapshot: Snapshot, judge: DeploymentHandle | None, said: WordsRequest) -> Understood:
    """Read a searcher's words.

    What the engine understands counts before what the vocabulary does; without it, that stays.

    Args:
        snapshot: the edition that is searched.
        judge: handle of `serve.judge.Judge`; None if the service has no engine.
        said: the words, and what they are about.

    Raises:
        NotFound: the gallery does not have the picture.
        RequestValidationError: nobody is asked about this facet.
    """
    started, choices = time.monotonic(), snapshot.choices
    if said.facet is not None and said.facet not in choices:
        message = f"nobody is asked about {said.facet!r}; people are asked about {', '.join(sorted(choices))}"
        raise invalid("facet", "unknown", message)
    if said.image_id is not None and said.image_id not in snapshot.catalogue:
        raise NotFound(f"no image {said.image_id} in this gallery")
    heard, vocabulary = Heard(None), _all_choices(snapshot)
    if said.seconds is not None:
        try:
            async with asyncio.timeout(said.seconds):
                heard = await _ask(snapshot, judge, said, vocabulary, ENGINE_SHARE * said.seconds)
        except TimeoutError:
            pass
        except AWAY as error:
            log.warning("a searcher's words: %s", error)
            heard = Heard(None, away(error))
        if heard == Heard(None):
            heard = Heard(None, f"the engine has not read the words within {said.seconds:g} s")
    read = read_words(said.words, vocabulary, said.facet) | (heard.answers or {})
    return Understood(
        answers={facet: value for facet, value in read.items() if value in choices.get(facet, ())},
        by="words" if heard.answers is None else "engine",
        reason=heard.problem,
        seconds=round(time.monotonic() - started, 3),
    )


def _all_choices(snapshot: Snapshot) -> Choices:
    """The whole vocabulary: "a red shirt" also tells a colour in a gallery that does not know kinds of clothes."""
    known, all_known = snapshot.choices, snapshot.vocabulary
    return {
        name: tuple({**dict.fromkeys(all_known.get(name, ())), **dict.fromkeys(known.get(name, ()))})
        for name in {**known, **all_known}
    }


async def _ask(
    snapshot: Snapshot, judge: DeploymentHandle | None, said: WordsRequest, vocabulary: Choices, seconds: float
) -> Heard:
    """Ask the engine to read the words."""
    if judge is None:
        return Heard(None, NO_ENGINE)
    picture = await snapshot.file(said.image_id) if said.image_id else None
    if picture is None or said.image_id is None:
        return Heard(None, "the engine reads words beside a picture: name one by image_id")
    question = wording(said.facet) if said.facet is not None else ""
    subject = Subject(said.image_id, picture)
    heard: Heard = await judge.understand.remote(subject, said.words, vocabulary, question, seconds)
    return heard
