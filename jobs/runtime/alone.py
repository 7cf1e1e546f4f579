"""One process at a time under one name."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

from ceca.data.erase import ERASING
from ceca.data.lease import Holders, Lease, holding, this_process
from ceca.data.store import Store
from jobs.runtime.console import console


@contextlib.contextmanager
def alone(store: Store, name: str) -> Iterator[Lease]:
    """While it lasts no other process works on this name (ceca/data/lease.py), and nothing is erased.

    Raises:
        LeaseError: another one does.
    """

    def say(words: str) -> None:
        console.print(f"[yellow]waiting:[/] {words}", highlight=False)

    holders, told = Holders(store), False
    with holding(store, name, this_process(), on_lost=interrupt, say=say) as lease:
        while erasing := holders.of([ERASING]):
            if not told:
                say(f"images are erased by {erasing[ERASING]}")
                told = True
            time.sleep(1)
        yield lease


def interrupt() -> None:
    """As by Ctrl-C, and wherever the main thread waits."""
    main = threading.main_thread().ident
    if main is not None:
        signal.pthread_kill(main, signal.SIGINT)
