"""What a person reads of a cluster's processes, and what goes to the log file."""

from __future__ import annotations

import inspect
import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.runtime import noise
from jobs.runtime.noise import MARK, forward, sort_lines
from tests.conftest import REPOSITORY

CONTROLLER = {
    "pid": 4711,
    "ip": "10.0.0.2",
    "actor_name": "TrainController",
    "lines": ["Requesting resources: {'CPU': 1.0} * 2", f"{MARK}ceca: resuming after epoch 1 of 3", "ceca: not ours"],
}


def test_marked_lines_are_for_the_person_and_all_others_for_the_log_with_their_source():
    lines = sort_lines(CONTROLLER)
    assert lines.person == ["ceca: resuming after epoch 1 of 3"]
    assert lines.log == [
        "(TrainController pid=4711, ip=10.0.0.2) Requesting resources: {'CPU': 1.0} * 2",
        "(TrainController pid=4711, ip=10.0.0.2) ceca: not ours",
    ]


@pytest.mark.parametrize(
    ("batch", "logged"),
    [
        ({"pid": "raylet", "lines": ["WARNING: 8 processes"]}, "(pid=raylet) WARNING: 8 processes"),
        ({"pid": 7, "task_name": "_load_part", "ip": "", "lines": ["x"]}, "(_load_part pid=7) x"),
        ({"pid": 7, "actor_name": None, "task_name": None, "lines": [""]}, "(pid=7) "),
    ],
)
def test_a_process_without_a_name_or_an_address_is_named_by_its_number(batch, logged):
    assert sort_lines(batch) == ([], [logged])


def test_lines_are_printed_without_markup_and_the_autoscaler_is_left_to_ray(monkeypatch):
    log, printed, left = io.StringIO(), [], []
    monkeypatch.setattr(noise.console, "print", lambda line, **options: printed.append((line, options["markup"])))
    show = forward(log, lambda batch, ignore_prefix: left.append(batch["lines"]))
    show({"pid": 1, "lines": [f"{MARK}loss [0.5]", "noise"]}, ignore_prefix=False)
    show({"pid": "autoscaler", "lines": ["Adding 1 node"]}, ignore_prefix=False)
    assert printed == [("loss [0.5]", False)]
    assert log.getvalue() == "(pid=1) noise\n"
    assert left == [["Adding 1 node"]]


def test_a_line_that_two_nodes_of_one_machine_forward_is_printed_once(monkeypatch):
    printed = []
    monkeypatch.setattr(noise.console, "print", lambda line, **options: printed.append(line))
    show = forward(io.StringIO(), lambda batch: None)
    show({"pid": 1, "lines": [f"{MARK}epoch 1", f"{MARK}epoch 2"]})
    show({"pid": 1, "lines": [f"{MARK}epoch 1"]})
    show({"pid": 2, "lines": [f"{MARK}epoch 1"]})
    show({"pid": 1, "lines": [f"{MARK}epoch 2", f"{MARK}epoch 3"]})
    assert printed == ["epoch 1", "epoch 2", "epoch 1", "epoch 3"]


def test_ray_still_prints_forwarded_lines_with_the_function_that_is_replaced():
    from ray._private import worker

    assert list(inspect.signature(worker.print_to_stdstream).parameters) == ["data", "ignore_prefix"]
    for printing in (worker.listen_error_messages, worker.connect):
        assert "print_to_stdstream" in inspect.getsource(getattr(printing, "__wrapped__", printing))


def test_a_workers_warning_is_told_on_one_line(capsys):
    noise.tell_warnings()
    noise.tell_warnings()
    logger = logging.getLogger("ceca")
    try:
        logging.getLogger("ceca.dialogue.supervised").warning("the engine\nis lost")
        logging.getLogger("ceca.dialogue.supervised").info("unimportant")
    finally:
        logger.handlers.clear()
        logger.propagate = True
    assert capsys.readouterr().out == f"{MARK}warning: the engine is lost\n"


COMMAND = """
import os, sys
from jobs.runtime.console import console, divert_stderr, entry
def main():
    console.print("before")
    log = divert_stderr()
    assert divert_stderr() is log
    os.write(2, b"[E] core_worker.cc\\n")
    print("a library's warning", file=sys.stderr)
    log.write("(pid=1) forwarded\\n")
    console.print("after")
    if "fail" in sys.argv:
        raise RuntimeError("a defect")
if "outside" in sys.argv:
    assert divert_stderr() is None
else:
    entry(main)
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", COMMAND, *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "TMPDIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run_command


def test_a_command_sends_what_libraries_write_to_a_log_that_is_named_once(run):
    finished = run()
    before, named, after = finished.stderr.splitlines()
    assert (before, after, finished.returncode) == ("before", "after", 0)
    with open(named.removeprefix("messages of Ray and other libraries: ")) as log:
        assert sorted(log.read().splitlines()) == ["(pid=1) forwarded", "[E] core_worker.cc", "a library's warning"]


def test_a_defects_traceback_is_shown_to_the_person(run):
    finished = run("fail")
    assert finished.stderr.splitlines()[-1] == "RuntimeError: a defect"
    assert "core_worker.cc" not in finished.stderr


def test_standard_error_is_not_diverted_outside_a_command(run):
    assert run("outside").returncode == 0
