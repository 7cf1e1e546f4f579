"""Images that clients send are decoded beside other work, not in front of it."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from ceca.datasets.images import ImageError, Size
from serve import decoding
from serve.decoding import WAITING, Decoding
from serve.refusals import Overloaded
from tests.serve.dataset import draw_person


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Makes every image take until the event is set. `asked` counts the images that were begun."""
    event = threading.Event()

    def wait(content: bytes, pixels: int) -> Size:
        begun.append(content)
        event.wait(10)
        return Size(1, 1)

    begun: list[bytes] = []
    event.begun = begun  # type: ignore[attr-defined]
    monkeypatch.setattr(decoding, "check_image", wait)
    return event


def test_an_image_is_checked() -> None:
    images = Decoding(16_000_000)
    assert asyncio.run(images.check(draw_person(1))) == (64, 160)
    with pytest.raises(ImageError):
        asyncio.run(images.check(b"GIF89a"))
    with pytest.raises(ImageError, match="at most 100"):
        asyncio.run(Decoding(100).check(draw_person(1)))
    assert images.waiting == 0


def test_other_work_does_not_wait_for_images(busy: threading.Event) -> None:
    async def work() -> float:
        images = Decoding(1, deadline_s=0.3)
        checks = [asyncio.create_task(images.check(b"slow")) for _ in range(WAITING)]
        await asyncio.sleep(0.05)
        started = time.perf_counter()
        await asyncio.gather(*(asyncio.to_thread(time.sleep, 0.001) for _ in range(50)))  # deletes, pictures, following
        took = time.perf_counter() - started
        with pytest.raises(Overloaded, match="too many"):
            await images.check(b"one more")
        late = await asyncio.gather(*checks, return_exceptions=True)
        assert all(isinstance(error, Overloaded) and "within 0.3 s" in str(error) for error in late)
        assert images.waiting == 0
        return took

    try:
        assert asyncio.run(work()) < 1
    finally:
        busy.set()


def test_an_image_whose_client_left_is_not_decoded_any_more(busy: threading.Event) -> None:
    async def work() -> None:
        images = Decoding(1)
        checks = [asyncio.create_task(images.check(content)) for content in (b"first", b"second", b"third")]
        await asyncio.sleep(0.05)
        checks[1].cancel()
        await asyncio.sleep(0)
        busy.set()
        assert await checks[2] == (1, 1)
        assert busy.begun == [b"first", b"third"]  # type: ignore[attr-defined]

    asyncio.run(work())
