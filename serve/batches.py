"""Batches of what waits: while one is at work the next one fills.

Ray Serve's own (`@serve.batch`) closes a batch after a fixed time also while another is at work, so that requests which
come one by one wait in many batches of one; with a model that takes longer than that time nothing is batched
(benchmarks/README.md, The service).
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import defaultdict
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")
Kind = TypeVar("Kind", bound=Hashable)


def by_kind(
    asked: Sequence[Asked], kind: Callable[[Asked], Kind], work: Callable[[Kind, list[Asked]], Iterable[Answer]]
) -> list[Answer]:
    """The answers to a batch, in its order, where only what is of one kind can be worked on in one pass."""
    places = defaultdict(list)
    for place, one in enumerate(asked):
        places[kind(one)].append(place)
    found: dict[int, Answer] = {}
    for own, at in places.items():
        found.update(zip(at, work(own, [asked[place] for place in at]), strict=True))
    return [found[place] for place in range(len(asked))]


class Batches(Generic[Asked, Answer]):
    """Calls `work` with what is asked at the same time, at most `size`, and not more than so many times at once.

    Args:
        wait_s: how long the first request waits for others where nothing else waits.
    """

    def __init__(
        self,
        work: Callable[[list[Asked]], Awaitable[Sequence[Answer]]],
        size: int,
        wait_s: float = 0.0,
        *,
        at_once: int = 1,
    ):
        self.work, self.size, self.wait_s = work, size, wait_s
        self.free = asyncio.Semaphore(at_once)
        self.waiting: list[tuple[Asked, asyncio.Future[Answer]]] = []
        self.forming: asyncio.Task[None] | None = None
        self.working: set[asyncio.Task[None]] = set()

    async def ask(self, asked: Asked) -> Answer:
        """The answer to one request; raises what `work` raised for its batch."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.waiting.append((asked, future))
        if self.forming is None or self.forming.done():
            # Not in the first asker's context: when that one hangs up, Ray cancels what was called in it.
            self.forming = asyncio.create_task(self._form(), context=contextvars.Context())
        return await future

    async def _form(self) -> None:
        """Hand out what waits until nothing does."""
        await asyncio.sleep(self.wait_s)
        while self.waiting:
            await self.free.acquire()
            self.waiting = [(asked, future) for asked, future in self.waiting if not future.done()]  # else nobody waits
            batch, self.waiting = self.waiting[: self.size], self.waiting[self.size :]
            task = asyncio.create_task(self._answer(batch))
            self.working.add(task)
            task.add_done_callback(self.working.discard)

    async def _answer(self, batch: list[tuple[Asked, asyncio.Future[Answer]]]) -> None:
        try:
            answers = await self.work([asked for asked, _ in batch]) if batch else []
        except (Exception, asyncio.CancelledError) as error:
            wrong = error if isinstance(error, Exception) else RuntimeError("the call was cancelled")
            for _, future in batch:
                if not future.done():
                    future.set_exception(wrong)
        else:
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
        finally:
            self.free.release()
