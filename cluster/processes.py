"""Processes of a local cluster: how they are found, and how they are ended."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

import psutil

# Environment variable of every process of a cluster; its value is the cluster's folder. `down` finds processes by it.
MARK = "CECA_LOCAL_CLUSTER"
# Longest wait for processes to end after SIGTERM, and again after SIGKILL, in seconds.
ENDING_S = 4.0


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes of a cluster, without this one and its parents.

    A process belongs to it if its command line or its environment names the folder, or if its parent belongs to it.
    The last is for Ray's workers, which rename themselves.
    """
    members: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            named = any(word == str(folder) or f"{folder}/" in word for word in process.cmdline())
            if (named or process.environ().get(MARK) == str(folder)) and process.pid != os.getpid():
                for member in (process, *process.children(recursive=True)):
                    members[member.pid] = member
        except psutil.Error:
            continue  # it has ended, or it is another user's
    callers = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    return [process for pid, process in members.items() if pid not in callers and process.is_running()]


def end_processes(processes: Iterable[psutil.Process]) -> None:
    """End processes with SIGTERM, and with SIGKILL if they remain."""
    processes = list(processes)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, left = psutil.wait_procs(processes, timeout=ENDING_S)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=ENDING_S)
