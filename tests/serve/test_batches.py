"""Batches: who waits together is answered together, in order, and an error is that of its own batch."""

from __future__ import annotations

import asyncio
import contextvars

import pytest

from serve.batches import Batches


def test_what_comes_while_one_is_at_work_is_the_next_batch() -> None:
    sizes: list[int] = []
    at_work = asyncio.Lock()

    async def work(asked: list[int]) -> list[int]:
        assert not at_work.locked()  # one call at a time
        async with at_work:
            sizes.append(len(asked))
            await asyncio.sleep(0.2)
        return [10 * number for number in asked]

    async def ask_all() -> list[int]:
        batches = Batches(work, size=8)

        async def one(number: int) -> int:
            await asyncio.sleep(0.005 * number)  # one by one, each within the first one's work
            return await batches.ask(number)

        return await asyncio.gather(*(one(number) for number in range(12)))

    assert asyncio.run(ask_all()) == [10 * number for number in range(12)]
    assert sizes == [1, 8, 3]


def test_an_error_is_that_of_its_batch_and_the_next_one_is_answered() -> None:
    async def work(asked: list[int]) -> list[int]:
        return [1 // number for number in asked]

    async def ask_all() -> None:
        batches = Batches(work, size=4, wait_s=0.001)
        with pytest.raises(ZeroDivisionError):
            await batches.ask(0)
        assert await batches.ask(1) == 1

    asyncio.run(ask_all())


def test_who_has_gone_is_not_worked_for() -> None:
    worked: list[int] = []

    async def work(asked: list[int]) -> list[int]:
        worked.extend(asked)
        await asyncio.sleep(0.05)
        return asked

    async def ask_all() -> None:
        batches = Batches(work, size=1)
        tasks = [asyncio.create_task(batches.ask(number)) for number in range(3)]
        await asyncio.sleep(0.02)
        tasks[1].cancel()
        assert await tasks[0] == 0
        assert await tasks[2] == 2

    asyncio.run(ask_all())
    assert worked == [0, 2]


def test_where_many_may_be_at_work_only_what_comes_together_goes_together() -> None:
    sizes: list[int] = []

    async def work(asked: list[int]) -> list[int]:
        sizes.append(len(asked))
        await asyncio.sleep(0.1)
        return asked

    async def ask_all() -> list[int]:
        batches = Batches(work, size=4, wait_s=0.001, at_once=8)
        first = [asyncio.create_task(batches.ask(number)) for number in range(6)]
        await asyncio.sleep(0.05)  # those are at work
        return await asyncio.gather(*first, batches.ask(6))

    assert asyncio.run(ask_all()) == list(range(7))
    assert sizes == [4, 2, 1]


def test_a_call_that_is_cancelled_leaves_nobody_waiting_and_is_not_the_first_askers() -> None:
    asker: contextvars.ContextVar[str] = contextvars.ContextVar("asker", default="nobody")
    seen: list[str] = []

    async def work(asked: list[int]) -> list[int]:
        seen.append(asker.get())
        raise asyncio.CancelledError

    async def ask_all() -> None:
        asker.set("the first")
        batches = Batches(work, size=4)
        answers = await asyncio.gather(batches.ask(1), batches.ask(2), return_exceptions=True)
        assert [str(answer) for answer in answers] == ["the call was cancelled"] * 2
        with pytest.raises(RuntimeError):  # the next one is called too
            await batches.ask(3)

    asyncio.run(ask_all())
    assert seen == ["nobody", "nobody"]
