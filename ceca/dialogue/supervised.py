"""Supervision of an engine: if it dies or stops answering, a new engine takes over its open questions."""

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
    """Engine that can be ended by force; `at_once` conversations keep it busy."""

    at_once: int

    async def abandon(self) -> None:
        """End the engine at once, even if it no longer responds."""


class Supervised:
    """Engine that replaces its inner engine when that one is lost.

    An engine is lost if it raises EngineDied, or if it gives no answer for `stall_s` seconds while questions wait.
    Conversations do not notice: the new engine gets their unanswered questions with the same history.

    Args:
        make: makes an inner engine.
        stall_s: longest silence of an engine with open questions, in seconds.
        restarts: number of engines that may be replaced.
    """

    def __init__(self, make: Callable[[], Abandonable], *, stall_s: float, restarts: int):
        self.make, self.stall_s, self.restarts = make, stall_s, restarts
        self.engine = make()
        self.model = self.engine.model
        self.lost = 0  # number of lost engines
        self.failure: EngineError | None = None  # reason why no engine answers any more
        self.pending: set[asyncio.Future[Answer]] = set()
        self.silent_since = 0.0  # monotonic time from which the silence counts
        self.ready = asyncio.Event()
        self.watch: asyncio.Task[None] | None = None

    @property
    def at_once(self) -> int:
        """Conversations that keep the engine busy."""
        return self.engine.at_once

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
            if self.failure is not None:
                raise self.failure
            lost = self.lost
            if not self.pending:
                self.silent_since = time.monotonic()
            task: asyncio.Future[Answer] = asyncio.ensure_future(
                self.engine.answer(subject, history, question, max_tokens, choices)
            )
            self.pending.add(task)
            try:
                answer = await task
            except asyncio.CancelledError:
                if lost == self.lost:  # the caller was cancelled, not the answer of a lost engine
                    raise
            except EngineDied as error:
                await self._replace(lost, str(error))
            except DialogueError:
                self.silent_since = time.monotonic()
                raise
            else:
                self.silent_since = time.monotonic()
                return answer
            finally:
                self.pending.discard(task)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(min(self.stall_s / 4, 10.0))
            silent = time.monotonic() - self.silent_since
            if self.pending and self.ready.is_set() and silent > self.stall_s:
                await self._replace(self.lost, f"no answer for {silent:.0f} s while {len(self.pending)} questions wait")

    async def _replace(self, lost: int, why: str) -> None:
        """Replace the engine by a new one. Only the first caller does so; the others wait for the new engine.

        Args:
            lost: number of engines lost before this one.
            why: reason, for the log.
        """
        if lost != self.lost:
            return
        self.lost += 1
        self.ready.clear()
        for task in self.pending:
            task.cancel()
        try:
            await self.engine.abandon()
            if self.lost > self.restarts:
                raise EngineError(
                    f"the engine was lost for the {_ordinal(self.lost)} time ({why}); its messages are in "
                    "the log file named at the start. To go on, start the same command again: finished images are kept"
                )
            log.warning("the engine is lost (%s); starting a new one, %d of %d", why, self.lost, self.restarts)
            self.engine = self.make()
            await self.engine.start()
        except EngineError as error:
            self.failure = error
        finally:
            self.silent_since = time.monotonic()
            self.ready.set()


def _ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")
