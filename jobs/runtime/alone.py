"""One process at a time under one name."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

from ceca.data.erase import ERASING
from ceca.data.lease import Holders, Lease, holding
from ceca.data.store import Store
from jobs.runtime.console import console
from jobs.runtime.ray_session import JOB_CONFIG


@contextlib.contextmanager
def alone(store: Store, name: str) -> Iterator[Lease]:
    """While it lasts no other process works on this name (ceca/data/lease.py), and nothing is erased.

    Raises:
        LeaseError: another one does.
    """

    def say(words: str) -> None:
        console.print(f"[yellow]waiting:[/] {words}", highlight=False)

    holders, told = Holders(store), False
    with holding(store, name, who(), on_lost=interrupt, say=say) as lease:
        while erasing := holders.of([ERASING]):
            if not told:
                say(f"images are erased by {erasing[ERASING]}")
                told = True
            time.sleep(1)
        yield lease


def who() -> str:
    """This process, for others who want what it holds."""
    job = json.loads(os.environ.get(JOB_CONFIG, "{}")).get("metadata", {}).get("job_submission_id", "")
    return f"{job or 'a command'} (process {os.getpid()} on {socket.gethostname()})"


def interrupt() -> None:
    """As by Ctrl-C, and wherever the main thread waits."""
    main = threading.main_thread().ident
    if main is not None:
        signal.pthread_kill(main, signal.SIGINT)
