"""Processes of a local cluster: how they are found, and how they are ended."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

import psutil

# Environment variable of every process of a cluster. Its value is drawn when the cluster starts and is in a file of its
# folder, so a process with this value was started by the cluster, whatever words its command line has.
MARK = "CECA_LOCAL_CLUSTER"
MARK_FILE = "mark"
# Longest wait for processes to end after SIGTERM, and again after SIGKILL, in seconds.
ENDING_S = 4.0


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes of a cluster, without this one and its parents.

    A process belongs to it if its environment has the cluster's mark, or if its parent belongs to it. The latter is for
    Ray's workers, which overwrite their environment when they rename themselves.
    """
    try:
        mark = (folder / MARK_FILE).read_text()
    except FileNotFoundError:
        return []
    members: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended, or it is another user's
            if process.environ().get(MARK) == mark:
                for member in (process, *process.children(recursive=True)):
                    members[member.pid] = member
    callers = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    return [process for pid, process in members.items() if pid not in callers and process.is_running()]


def end_processes(processes: Iterable[psutil.Process]) -> None:
    """End processes with SIGTERM, and with SIGKILL if they remain.

    psutil compares the start time first: a process that has got the number of one that ended is left alone.
    """
    processes = list(processes)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(processes, timeout=ENDING_S)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=ENDING_S)
