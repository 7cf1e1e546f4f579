"""What a replica holds for each edition: made at the first request for it, dropped when newer editions come."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

KEPT = 2  # the previous edition is still requested while replicas change to the next


class Held(Generic[K, V]):
    """Makes each value once, even if many threads ask for it, and keeps the values that were requested last.

    Args:
        make: makes the value of a key.
        kept: number of values to keep.
    """

    def __init__(self, make: Callable[[K], V], kept: int = KEPT):
        self.make, self.kept = make, kept
        self.values: OrderedDict[K, V] = OrderedDict()
        self.lock = threading.Lock()
        self.making = threading.Lock()

    def get(self, key: K) -> V:
        """The value of a key. If it is not held, this makes it first, which may take minutes."""
        value = self._held(key)
        if value is not None:
            return value
        with self.making:
            value = self._held(key)
            if value is None:
                value = self.make(key)
                with self.lock:
                    self.values[key] = value
                    while len(self.values) > self.kept:
                        self.values.popitem(last=False)
            return value

    def _held(self, key: K) -> V | None:
        with self.lock:
            if key in self.values:
                self.values.move_to_end(key)
            return self.values.get(key)
