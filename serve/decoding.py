"""Images in requests are decoded in a thread of their own, so that nothing else waits for them."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from ceca.datasets.images import Size, check_image
from serve.refusals import Overloaded

# One image at a time: 16 million pixels take about 200 MB while they are decoded, and a second at most.
THREADS, WAITING = 1, 16
DEADLINE_S = 5.0  # from the arrival of an image


class Decoding:
    """Checks images by decoding them.

    Args:
        pixels_limit: largest accepted number of pixels.
        deadline_s: seconds that an image may wait and be decoded.
    """

    def __init__(self, pixels_limit: int, deadline_s: float = DEADLINE_S):
        self.pixels_limit, self.deadline_s = pixels_limit, deadline_s
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="decode")
        self.waiting = 0

    async def check(self, content: bytes) -> Size:
        """The size of an image that decodes. If the client leaves, an image that waits is not decoded any more.

        Raises:
            ImageError: it does not decode.
            Overloaded: too many images wait, or it is not decoded in time.
        """
        if self.waiting >= WAITING:
            raise Overloaded("too many images wait to be decoded")
        self.waiting += 1
        try:
            async with asyncio.timeout(self.deadline_s):
                running = asyncio.get_running_loop().run_in_executor(
                    self.threads, check_image, content, self.pixels_limit
                )
                return await running
        except TimeoutError:
            raise Overloaded(f"the image was not decoded within {self.deadline_s:g} s") from None
        finally:
            self.waiting -= 1
