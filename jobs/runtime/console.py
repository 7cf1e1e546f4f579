"""What a command says to a person: messages, progress and errors. Imports no Ray."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ceca.errors import UserError

console = Console(stderr=True, soft_wrap=True)


def plain(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())


class Track:
    """Progress for a person: a live bar in a terminal, a line every ten seconds in a log file."""

    def __init__(self, title: str, total: int, finished: int = 0, unit: str = "rows"):
        self.title, self.total, self.finished, self.unit = title, total, finished, unit
        self.begun, self.first, self.last_line = time.monotonic(), finished, time.monotonic()
        self.bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self.bar = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console)
            self.task = self.bar.add_task(title, total=total, completed=finished, note="")

    def __enter__(self) -> Track:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, amount: int, note: str = "") -> None:
        self.finished += amount
        if self.bar is not None:
            self.bar.update(self.task, advance=amount, note=note)
            return
        now = time.monotonic()
        if now - self.last_line >= 10 or self.finished >= self.total:
            self.last_line = now
            rate = (self.finished - self.first) / max(now - self.begun, 1e-9)
            left = (self.total - self.finished) / rate if rate else float("inf")
            end = f", {left:.0f} s left" if self.finished < self.total else ""
            console.print(f"{self.title}: {self.finished}/{self.total} {self.unit}, {rate:.1f}/s{end} {note}".rstrip())


def entry(main: Callable[[], None]) -> None:
    """Run a command: a UserError is printed alone and exits with 2, an interrupt with 130."""
    try:
        main()
    except UserError as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("interrupted; the same command continues")
        sys.exit(130)
