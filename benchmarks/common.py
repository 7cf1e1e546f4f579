"""Shared by the benchmarks: a process for each arm, times, memory, and the heading of a table.

An arm is one of the compared ways of doing the same work. Each arm runs in a process of its own, so that no arm pays
for the memory or the warm caches of another. A benchmark is started like this:

    run_benchmark(main, Settings, {"ceca": measure_ceca, "NumPy": measure_numpy}, __doc__)

`main` calls `in_own_process` for each arm and prints the table. That call starts the same file again with
`--arm NAME FOLDER`, and the arm's function returns its figures.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

S = TypeVar("S")  # the settings of a benchmark, a dataclass


class ArmFailed(Exception):
    """An arm ended without figures; the message is the end of its output."""


def run_benchmark(
    main: Callable[[S], None], settings: type[S], arms: Mapping[str, Callable[[S, Path], Any]], description: str
) -> None:
    """Run `main`, or the one arm that this process was started for.

    Args:
        main: takes the settings that the command line gives.
        settings: dataclass; its fields are the options of the command line.
        arms: name -> function of the settings and the folder of `in_own_process`; it returns figures as JSON has them.
        description: shown by `--help`.
    """
    if sys.argv[1:2] != ["--arm"]:
        main(tyro.cli(settings, description=description))
        return
    arm, folder = sys.argv[2], Path(sys.argv[3])
    plain = json.loads((folder / "settings.json").read_text())
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()}
    (folder / f"{arm}.json").write_text(json.dumps(arms[arm](settings(**values), folder)))


def in_own_process(
    script: str,
    arm: str,
    settings: Any,
    folder: Path,
    *,
    environment: Mapping[str, str] | None = None,
    show: bool = False,
) -> Any:
    """Run one arm in a new process and return its figures.

    Args:
        script: file of the benchmark.
        arm: one of the names given to `run_benchmark`.
        settings: of the benchmark; `out` is not passed on.
        folder: what the arm reads, and where its figures are written.
        environment: further environment variables of the process.
        show: let the process print; otherwise its output is shown only in an error.

    Raises:
        ArmFailed: the process ended without figures.
    """
    plain = {name: value for name, value in dataclasses.asdict(settings).items() if name != "out"}
    (folder / "settings.json").write_text(json.dumps(plain))
    figures = folder / f"{arm}.json"
    figures.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, script, "--arm", arm, str(folder)],
        env={**os.environ, **(environment or {})},
        capture_output=not show,
        text=True,
        check=False,
    )
    if not figures.exists():
        raise ArmFailed("" if show else f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}".strip())
    return json.loads(figures.read_text())


def machine() -> str:
    """This machine in a few words, for the heading of a table."""
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"


def fastest(call: Callable[[], Any], times: int = 9) -> float:
    """Seconds of the fastest of several calls, after one that warms up.

    The fastest, because other work on the machine only makes a call slower.
    """
    (seconds,) = fastest_each([call], times)
    return seconds


def fastest_each(calls: Sequence[Callable[[], Any]], times: int = 9) -> list[float]:
    """The same of several calls in turns, so that what slows the machine for a while slows all of them."""
    seconds: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(times):
        for call, its in zip(calls, seconds, strict=True):
            started = time.perf_counter()
            call()
            its.append(time.perf_counter() - started)
    return [min(its) for its in seconds]


def peak_memory() -> int:
    """Most bytes that this process has held.

    `getrusage` is not used: its figure begins with the most that the parent process has held.
    """
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def own_memory() -> int:
    """Bytes that this process holds now, without the files that it maps."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])
