"""What a replica holds of each edition that it is asked for, made at the first need and let go when others come."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

KEPT = 2  # the one before is still asked for while replicas change to the next


class Held(Generic[K, V]):
    """Makes each value once, although many threads ask; keeps the last few that were asked for."""

    def __init__(self, make: Callable[[K], V], kept: int = KEPT):
        self.make, self.kept = make, kept
        self.values: OrderedDict[K, V] = OrderedDict()
        self.lock = threading.Lock()
        self.making = threading.Lock()

    def get(self, key: K) -> V:
        found = self._find(key)
        if found is not None:
            return found
        with self.making:
            found = self._find(key)
            if found is None:
                found = self.make(key)
                with self.lock:
                    self.values[key] = found
                    while len(self.values) > self.kept:
                        self.values.popitem(last=False)
            return found

    def _find(self, key: K) -> V | None:
        with self.lock:
            if key in self.values:
                self.values.move_to_end(key)
            return self.values.get(key)
