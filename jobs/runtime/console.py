"""What a command shows a person: messages, tables, progress and errors. Imports no Ray.

The console writes to standard error. C++ libraries write their messages there too, so a command that starts Ray
diverts the file descriptor to a log file, and the console keeps a copy of it.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ceca.errors import UserError
from ceca.evaluation.names import METRICS

if os.environ.get("COLUMNS") == "0":  # some terminals that are not there; every message would be cut to nothing
    del os.environ["COLUMNS"]
# Without markup and emoji: a query or a path may hold [/b] or :cat:, which is no more than that.
console = Console(stderr=True, soft_wrap=True, markup=False, emoji=False)


def label(word: str, style: str, message: object) -> None:
    """Print a message behind a coloured word, such as `warning:`."""
    console.print(Text.assemble((f"{word}:", style), f" {message}"), highlight=False)


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
            columns = (
                *(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()),
                *(TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False)),
            )
            self.bar = Progress(*columns, console=console, redirect_stderr=_stderr.log is None)
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


class _StandardError:
    """Standard error of this process, which a command may divert."""

    def __init__(self) -> None:
        self.may_divert = False  # only in a command: a test or a notebook keeps its standard error
        self.log: TextIO | None = None

    def divert(self) -> None:
        """Let the file descriptor lead to a new log file, and the console to where it led."""
        sys.stderr.flush()
        console.file = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8")
        descriptor, path = tempfile.mkstemp(prefix="ceca-", suffix=".log")
        self.log = os.fdopen(descriptor, "w", buffering=1, encoding="utf-8")
        os.dup2(descriptor, 2)
        console.print(f"messages of Ray and other libraries: {path}", highlight=False)

    def restore(self) -> None:
        """Let the file descriptor lead to the person again."""
        if self.log is not None:
            sys.stderr.flush()
            os.dup2(console.file.fileno(), 2)


_stderr = _StandardError()


def divert_stderr() -> TextIO | None:
    """Divert what libraries write to standard error to a log file, in a command that `entry` runs.

    Returns:
        The log file; None outside a command.
    """
    if _stderr.may_divert and _stderr.log is None:
        _stderr.divert()
    return _stderr.log


def restore_stderr() -> None:
    """Let standard error lead to the person again, before this process becomes another program."""
    _stderr.restore()


def entry(main: Callable[[], None]) -> None:
    """Run a command. An error that a person can mend is one line and exits with 2, an interrupt exits with 130."""
    _stderr.may_divert = True
    try:
        main()
    except UserError as error:
        label("error", "bold red", error)
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("interrupted; the same command continues")
        sys.exit(130)
    except Exception as error:
        from ceca.data.filesystems import comes_from_s3, explain_s3

        if comes_from_s3(error):
            label("error", "bold red", explain_s3(error))
            sys.exit(2)
        _stderr.restore()  # the person reads the traceback
        raise
    finally:
        _stderr.may_divert = False
