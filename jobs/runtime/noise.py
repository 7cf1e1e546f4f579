"""Lines of the cluster's processes: a stage's own lines go to the person, those of Ray and libraries to a log file.

A worker marks its lines with `tell`. Ray forwards every line that a worker, its controllers or the raylets write to
the command, which looks for the mark. This module imports no Ray.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TextIO

from jobs.runtime.console import console

MARK = "ceca» "  # begins a line that a worker writes for a person


class Lines(NamedTuple):
    """The lines of one process: for the person, without the mark, and for the log, with the name of the process."""

    person: list[str]
    log: list[str]


def tell(message: str) -> None:
    """Print a line on a worker for the person who runs the command."""
    print(MARK + message, flush=True)


def tell_warnings() -> None:
    """On a worker, let the person read the warnings of this project's modules."""
    logger = logging.getLogger("ceca")
    if not any(isinstance(handler, _Teller) for handler in logger.handlers):
        logger.addHandler(_Teller(logging.WARNING))
        logger.propagate = False


class _Teller(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tell(f"{record.levelname.lower()}: {' '.join(self.format(record).split())}")


def sort_lines(batch: Mapping[str, Any]) -> Lines:
    """Sort the lines that Ray forwards from one process.

    Args:
        batch: `lines`, `pid`, and if known `ip`, `actor_name` and `task_name`.
    """
    name = batch.get("actor_name") or batch.get("task_name") or ""
    address = f"ip={batch['ip']}" if batch.get("ip") else ""
    source = ", ".join(filter(None, (f"{name} pid={batch.get('pid')}".strip(), address)))
    lines = Lines([], [])
    for line in batch["lines"]:
        if line.startswith(MARK):
            lines.person.append(line.removeprefix(MARK))
        else:
            lines.log.append(f"({source}) {line}")
    return lines


def forward(log: TextIO, otherwise: Callable[..., None]) -> Callable[..., None]:
    """A replacement for Ray's function that prints forwarded lines.

    Args:
        log: the log file.
        otherwise: Ray's function, which still prints the events of the autoscaler.
    """

    told: deque[tuple[Any, str]] = deque(maxlen=1000)  # nodes of one machine each forward the lines of all

    def print_lines(batch: Mapping[str, Any], *args: Any, **options: Any) -> None:
        if batch.get("pid") == "autoscaler":
            otherwise(batch, *args, **options)
            return
        lines = sort_lines(batch)
        for line in lines.person:
            if (key := (batch.get("pid"), line)) not in told:
                told.append(key)
                console.print(line, markup=False, highlight=False)
        log.write("".join(f"{line}\n" for line in lines.log))

    return print_lines
