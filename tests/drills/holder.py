"""A process that holds a name, makes a table and publishes it, and stops itself (SIGSTOP) at a write.

    python -m tests.drills.holder DATA WHO WRITE

WRITE counts the writes that reach the store, without beats: 3 stops before the third, 3.5 after it, 0 never.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from ceca.data.names import LEASES
from ceca.data.store import Receipt, Store
from jobs.runtime.alone import alone
from jobs.runtime.console import entry

NAME, UNITS, ROWS = "make-v", 3, 50


def make(data: str, who: str, at_write: float = 0.0) -> None:
    """Publish version v of the table `things`, whose rows say who made them."""
    store = Store(data)
    with alone(store, NAME) as lease:
        stop_at(store, at_write)
        receipts = []
        for unit in range(UNITS):
            rows = pa.table({"who": [who] * ROWS, "number": list(range(ROWS * unit, ROWS * (unit + 1)))})
            receipts.append(Receipt({"things": store.write_part("things", "v", unit, rows)}))
            store.write_receipt("make", "v", unit, receipts[-1])
        made = {"made_from": {}, "config": {"who": who}}
        store.publish("make", "v", ("things",), receipts, check=lease.check, **made)


def stop_at(store: Store, at_write: float) -> None:
    """Let this process stop at a write."""
    place, name = (os, "replace") if isinstance(store.fs, LocalFileSystem) else (store.fs, "pipe_file")
    write: Callable[..., Any] = getattr(place, name)
    count = itertools.count(1)

    def call(*arguments: Any, **named: Any) -> Any:
        number = 0 if f"/{LEASES}/" in str(arguments[0]) else next(count)
        if number and number == at_write:
            os.kill(os.getpid(), signal.SIGSTOP)
        result = write(*arguments, **named)
        if number and number + 0.5 == at_write:
            os.kill(os.getpid(), signal.SIGSTOP)
        return result

    if at_write:
        setattr(place, name, call)


if __name__ == "__main__":
    entry(lambda: make(sys.argv[1], sys.argv[2], float(sys.argv[3])))
