"""Batching of requests: while one batch is being answered, the next one fills.

Ray Serve's own batching (`@serve.batch`) closes a batch after a fixed time, even while another is being answered. So
requests that arrive one by one end up in many batches of one, and if the model takes longer than that time nothing is
batched at all (benchmarks/README.md, The service).
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
from collections import defaultdict
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

from opentelemetry.context import Context, get_current

from serve.tracing import continue_trace

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Kind = TypeVar("Kind", bound=Hashable)


def by_kind(
    requests: Sequence[Request],
    kind_of: Callable[[Request], Kind],
    answer: Callable[[Kind, list[Request]], Iterable[Answer]],
) -> list[Answer]:
    """Answer a batch whose requests are of several kinds, when one pass can answer only one kind.

    Args:
        requests: the batch.
        kind_of: the kind of a request.
        answer: answers all requests of one kind, in their order.

    Returns:
        One answer per request, in the order of the batch.
    """
    places = defaultdict(list)
    for place, request in enumerate(requests):
        places[kind_of(request)].append(place)
    answers: dict[int, Answer] = {}
    for kind, of_kind in places.items():
        answers.update(zip(of_kind, answer(kind, [requests[place] for place in of_kind]), strict=True))
    return [answers[place] for place in range(len(requests))]


@dataclasses.dataclass(frozen=True)
class Waiting(Generic[Request, Answer]):
    """A request that waits for its batch, and the trace that it belongs to."""

    request: Request
    future: asyncio.Future[Answer]
    trace: Context


class Batches(Generic[Request, Answer]):
    """Collects requests that arrive at the same time, and answers each batch with one call of `work`.

    Args:
        work: answers a batch, in its order.
        size: most requests per batch.
        wait_s: how long the first request waits for others if nothing else is waiting.
        at_once: most calls of `work` in progress.
    """

    def __init__(
        self,
        work: Callable[[list[Request]], Awaitable[Sequence[Answer]]],
        size: int,
        wait_s: float = 0.0,
        *,
        at_once: int = 1,
    ):
        self.work, self.size, self.wait_s = work, size, wait_s
        self.free = asyncio.Semaphore(at_once)
        self.waiting: list[Waiting[Request, Answer]] = []
        self.forming: asyncio.Task[None] | None = None
        self.working: set[asyncio.Task[None]] = set()

    async def ask(self, request: Request) -> Answer:
        """The answer to one request.

        Raises:
            Exception: what `work` raised for the request's batch.
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.waiting.append(Waiting(request, future, get_current()))
        if self.forming is None or self.forming.done():
            # In a context of its own: if the first client disconnects, Ray cancels the calls made in its context.
            self.forming = asyncio.create_task(self._form(), context=contextvars.Context())
        return await future

    async def _form(self) -> None:
        """Start batches until no request is waiting."""
        await asyncio.sleep(self.wait_s)
        while self.waiting:
            await self.free.acquire()
            self.waiting = [each for each in self.waiting if not each.future.done()]  # not cancelled
            batch, self.waiting = self.waiting[: self.size], self.waiting[self.size :]
            task = asyncio.create_task(self._answer(batch))
            self.working.add(task)
            task.add_done_callback(self.working.discard)

    async def _answer(self, batch: list[Waiting[Request, Answer]]) -> None:
        continue_trace(each.trace for each in batch)
        try:
            answers = await self.work([each.request for each in batch]) if batch else []
        except (Exception, asyncio.CancelledError) as error:
            problem = error if isinstance(error, Exception) else RuntimeError("the call was cancelled")
            for each in batch:
                if not each.future.done():
                    each.future.set_exception(problem)
        else:
            for each, answer in zip(batch, answers, strict=True):
                if not each.future.done():
                    each.future.set_result(answer)
        finally:
            self.free.release()
