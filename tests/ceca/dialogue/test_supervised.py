"""Supervision: an engine that dies or stops answering is replaced, and conversations continue."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from ceca.dialogue.conversation import Answer, DialogueError, EngineDied, EngineError, Subject
from ceca.dialogue.supervised import Supervised

SUBJECT = Subject("one", b"image")


class Flawed:
    """Engine with a fault.

    Args:
        lasts: number of questions that it answers before the fault.
        then: the fault: "die", "hang", "no start" (it cannot start at all), or "" for none.
    """

    model = "flawed"

    def __init__(self, lasts: int, then: str):
        self.lasts, self.then = lasts, then
        self.started = self.abandoned = False

    async def start(self) -> None:
        if self.then == "no start":
            raise EngineError("cannot start")
        self.started = True

    async def close(self) -> None: ...

    async def abandon(self) -> None:
        self.abandoned = True

    async def answer(self, subject, history, question, max_tokens, choices=None):
        await asyncio.sleep(0)
        if subject.image == b"bad":
            raise DialogueError("not_an_image", "bad")
        self.lasts -= 1
        if self.lasts < 0 and self.then == "die":
            raise EngineDied("out of memory")
        if self.lasts < 0 and self.then == "hang":
            await asyncio.Event().wait()
        return Answer(f"{subject.image_id}: {question}")


def use(engines: list[Flawed], act: Callable[[Supervised], object], restarts: int = 2, stall_s: float = 0.1):
    """Run `act` with a supervised engine that uses these engines one after the other."""
    waiting = iter(engines)

    async def run():
        engine = Supervised(lambda: next(waiting), stall_s=stall_s, restarts=restarts)
        await engine.start()
        try:
            return await asyncio.wait_for(act(engine), 20)
        finally:
            await engine.close()

    return asyncio.run(run())


async def ask_many(engine: Supervised, number: int = 12) -> list[str]:
    questions = (engine.answer(Subject(f"image-{n}", b"image"), (), "who?", 9) for n in range(number))
    return [answer.text for answer in await asyncio.gather(*questions)]


EXPECTED = [f"image-{n}: who?" for n in range(12)]


@pytest.mark.parametrize("fault", ["die", "hang"])
def test_every_question_is_answered_by_the_next_engine(fault: str):
    engines = [Flawed(5, fault), Flawed(3, fault), Flawed(99, "")]
    assert use(engines, ask_many) == EXPECTED
    assert [engine.abandoned for engine in engines] == [True, True, False]


@pytest.mark.parametrize("fault", ["die", "hang"])
def test_an_engine_that_is_lost_too_often_ends_the_run(fault: str):
    with pytest.raises(EngineError, match=r"lost for the second time .*start the same command again"):
        use([Flawed(5, fault), Flawed(3, fault)], ask_many, restarts=1)


def test_a_replacement_that_cannot_start_fails_all_open_questions():
    async def act(engine: Supervised) -> list[object]:
        questions = (engine.answer(SUBJECT, (), "who?", 9) for _ in range(4))
        return await asyncio.gather(*questions, return_exceptions=True)

    results = use([Flawed(2, "die"), Flawed(0, "no start")], act)
    assert [str(result) for result in results if isinstance(result, EngineError)] == ["cannot start"] * 2
    assert sum(isinstance(result, Answer) for result in results) == 2


def test_a_slow_engine_that_still_answers_is_not_replaced():
    class Slow(Flawed):
        async def answer(self, *arguments, **named):
            async with turn:
                await asyncio.sleep(0.06)
                return await super().answer(*arguments, **named)

    turn = asyncio.Lock()  # one answer per 60 ms: a question waits longer than the allowed silence
    engine = Slow(99, "")
    assert use([engine], lambda supervised: ask_many(supervised, 5), stall_s=0.15) == EXPECTED[:5]
    assert not engine.abandoned


def test_an_error_of_one_image_does_not_affect_others():
    async def act(engine: Supervised) -> Answer:
        with pytest.raises(DialogueError, match="not_an_image"):
            await engine.answer(Subject("broken", b"bad"), (), "who?", 9)
        return await engine.answer(SUBJECT, (), "who?", 9)

    engine = Flawed(9, "die")
    assert use([engine], act).text == "one: who?"
    assert not engine.abandoned


def test_a_cancelled_question_does_not_affect_the_engine():
    async def act(engine: Supervised) -> str:
        hanging = asyncio.ensure_future(engine.answer(SUBJECT, (), "who?", 9))
        await asyncio.sleep(0.02)
        hanging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hanging
        return "cancelled"

    engine = Flawed(0, "hang")
    assert use([engine], act, stall_s=30) == "cancelled"
    assert not engine.abandoned
