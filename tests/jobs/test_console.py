"""What a person reads is what was said: no word of a query, a path or an error is taken for markup."""

from __future__ import annotations

import io

import pytest

from ceca.data.filesystems import filesystem
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


def test_an_error_of_the_s3_client_is_one_line_wherever_it_is_raised(shown, monkeypatch):
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us west")

    def fail() -> None:
        fs, path = filesystem("s3://bucket/people")
        fs.clear_instance_cache()
        filesystem("s3://bucket/people")[0].exists(path)

    with pytest.raises(SystemExit) as ended:
        entry(fail)
    assert ended.value.code == 2
    (line,) = shown.getvalue().splitlines()
    assert line.startswith("error: InvalidRegionError: Provided region_name 'us west'")


def test_tables_and_progress_are_printed_as_they_are(shown):
    metrics = dict.fromkeys(module.METRICS, 1.0)
    print_metrics(f"title {WORDS}", {WORDS: metrics})
    with Track(WORDS, 1) as track:
        track.advance(1, WORDS)
    assert shown.getvalue().count("[bold]x[/]") == 4
