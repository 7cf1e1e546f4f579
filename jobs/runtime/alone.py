"""One process at a time under one name."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

from ceca.data.erase import COLLECTING, DOING, ERASING
from ceca.data.lease import Holders, Lease, holding, this_process
from ceca.data.store import Store
from jobs.runtime.console import label


@contextlib.contextmanager
def alone(store: Store, name: str) -> Iterator[Lease]:
    """Hold a name: no other process works under it (ceca/data/lease.py), and nothing is erased meanwhile.

    Raises:
        LeaseError: another process holds the name.
    """

    def say(message: str) -> None:
        label("waiting", "yellow", message)

    holders, announced = Holders(store), False
    with holding(store, name, this_process(), on_lost=interrupt, say=say) as lease:
        while others := holders.of([ERASING, COLLECTING]):
            if not announced:
                say("; ".join(f"{DOING[other]} by {who}" for other, who in others.items()))
                announced = True
            time.sleep(1)
        yield lease


def interrupt() -> None:
    """Interrupt the main thread as Ctrl-C does, wherever it waits."""
    main = threading.main_thread().ident
    if main is not None:
        signal.pthread_kill(main, signal.SIGINT)
