"""An engine under watch: one that dies or falls silent is replaced, and what it was asked is asked again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from ceca.dialogue.attributes import Choices
from ceca.dialogue.conversation import Answer, DialogueError, Engine, EngineDied, EngineError, Subject, Turn

log = logging.getLogger(__name__)


class Abandonable(Engine, Protocol):
    async def abandon(self) -> None:
        """Be gone at once, also where the engine does not answer any more."""


class Supervised:
    """Answers through the engine that `make` gives, and through a new one when that one is lost.

    Lost is an engine that raises EngineDied, or that has answered nothing for `stall_s` seconds while questions wait.
    Conversations do not notice: their unanswered questions go to the new engine with the same history.
    """

    def __init__(self, make: Callable[[], Abandonable], *, stall_s: float, restarts: int):
        self.make, self.stall_s, self.restarts = make, stall_s, restarts
        self.engine = make()
        self.model = self.engine.model
        self.epoch = 0  # how many engines have been lost
        self.failed: EngineError | None = None
        self.asked: set[asyncio.Future[Answer]] = set()
        self.heard = 0.0  # when the engine last gave a sign of life
        self.ready = asyncio.Event()
        self.watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.engine.start()
        self.ready.set()
        self.watch = asyncio.create_task(self._watch())

    async def close(self) -> None:
        if self.watch is not None:
            self.watch.cancel()
        await self.engine.close()

    async def answer(
        self, subject: Subject, history: Sequence[Turn], question: str, max_tokens: int, choices: Choices | None = None
    ) -> Answer:
        while True:
            await self.ready.wait()
            if self.failed is not None:
                raise self.failed
            epoch = self.epoch
            if not self.asked:
                self.heard = time.monotonic()
            task: asyncio.Future[Answer] = asyncio.ensure_future(
                self.engine.answer(subject, history, question, max_tokens, choices)
            )
            self.asked.add(task)
            try:
                answer = await task
            except asyncio.CancelledError:
                if epoch == self.epoch:  # it is the asker who is cancelled, not the lost engine's answer
                    raise
            except EngineDied as error:
                await self._replace(epoch, str(error))
            except DialogueError:
                self.heard = time.monotonic()
                raise
            else:
                self.heard = time.monotonic()
                return answer
            finally:
                self.asked.discard(task)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(min(self.stall_s / 4, 10.0))
            silent = time.monotonic() - self.heard
            if self.asked and self.ready.is_set() and silent > self.stall_s:
                await self._replace(self.epoch, f"no answer for {silent:.0f} s while {len(self.asked)} wait")

    async def _replace(self, epoch: int, why: str) -> None:
        """Start a new engine in place of the one of this epoch; the first who finds it lost does, others wait."""
        if epoch != self.epoch:
            return
        self.epoch += 1
        self.ready.clear()
        for task in self.asked:
            task.cancel()
        try:
            await self.engine.abandon()
            if self.epoch > self.restarts:
                raise EngineError(
                    f"the engine was lost for the {_ordinal(self.epoch)} time ({why}); see its log above, then "
                    "start the same command again: finished images are kept"
                )
            log.warning("the engine is lost (%s); starting another, %d of %d", why, self.epoch, self.restarts)
            self.engine = self.make()
            await self.engine.start()
        except EngineError as error:
            self.failed = error
        finally:
            self.heard = time.monotonic()
            self.ready.set()


def _ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")
