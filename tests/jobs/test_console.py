"""What a person reads is what was said: no word of a query, a path or an error is taken for markup."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

from ceca.data.filesystems import filesystem
from ceca.errors import UserError
from jobs.runtime import console as module
from jobs.runtime.console import Track, entry, label, print_metrics
from tests.conftest import REPOSITORY

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


def test_a_width_of_nothing_hides_no_error(tmp_path):
    command = [sys.executable, "-m", "jobs.cli", "remove", "--data", str(tmp_path), "--images", "a"]
    done = subprocess.run(
        command, env={**os.environ, "COLUMNS": "0"}, cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "error: no table 'images'" in done.stderr


def test_a_pipe_that_is_closed_is_no_error():
    command = f"{sys.executable} -m jobs.cli --help | head -1"
    done = subprocess.run(command, shell=True, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("usage: ceca COMMAND")
    assert done.stderr == ""


def test_a_working_folder_that_is_gone_is_one_line(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    code = f"import os; os.rmdir({str(gone)!r}); from ceca.data.store import Store; Store('data')"
    path = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], cwd=gone, env=path, capture_output=True, text=True, check=False)
    assert "StoreError: cannot use 'data': the working folder is gone; change into one that is there" in done.stderr
