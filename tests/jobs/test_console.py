"""What a person reads is what was said: no word of a query, a path or an error is taken for markup."""

from __future__ import annotations

import io

import pytest

from ceca.errors import UserError
from jobs.runtime import console as module
from jobs.runtime.console import Track, entry, label, print_metrics

WORDS = "[/b] [bold]x[/] [link=a] \\[ [red :cat: :warning:"


@pytest.fixture
def shown(monkeypatch) -> io.StringIO:
    sink = io.StringIO()
    monkeypatch.setattr(module.console, "_file", sink)
    return sink


def test_errors_and_warnings_are_printed_as_they_are(shown):
    label("warning", "yellow", WORDS)

    def fail() -> None:
        raise UserError(f"no folder {WORDS}")

    with pytest.raises(SystemExit) as ended:
        entry(fail)
    assert ended.value.code == 2
    assert shown.getvalue().splitlines() == [f"warning: {WORDS}", f"error: no folder {WORDS}"]


def test_tables_and_progress_are_printed_as_they_are(shown):
    metrics = dict.fromkeys(module.METRICS, 1.0)
    print_metrics(f"title {WORDS}", {WORDS: metrics})
    with Track(WORDS, 1) as track:
        track.advance(1, WORDS)
    assert shown.getvalue().count("[bold]x[/]") == 4
