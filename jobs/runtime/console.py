"""What a command shows a person: messages, tables, progress and errors. Imports no Ray."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ceca.errors import UserError
from ceca.evaluation.names import METRICS

console = Console(stderr=True, soft_wrap=True)


def plain(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())


def text_table(title: str, *headings: str, left: str = "") -> Table:
    """An empty table: columns are aligned right, except the one named `left`."""
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == left else "right")
    return table


def print_metrics(title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Print retrieval metrics in percent, a row per name."""
    table = text_table(title, "", *METRICS.values())
    for name, metrics in rows.items():
        table.add_row(name, *(f"{metrics[key]:.2f}" for key in METRICS))
    console.print(table)


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
        """Count finished rows and show the progress, with a note behind it."""
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
    """Run a command. A UserError is printed without a traceback and exits with 2, an interrupt exits with 130."""
    try:
        main()
    except UserError as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("interrupted; the same command continues")
        sys.exit(130)
