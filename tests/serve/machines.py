"""Machines with addresses of their own: network namespaces of this one behind a bridge. A machine can be lost whole."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class Machine:
    """One machine: an address, and a folder for temporary files whose path is short enough for sockets.

    Args:
        bridge: what its link is plugged into.
        number: last part of its address, from 2.
        name: of its namespace and link, which no machine before it has had: the kernel removes those a little later.
    """

    def __init__(self, bridge: str, subnet: str, number: int, name: str):
        self.name, self.address = name, f"{subnet}.{number}"
        self.folder = Path(tempfile.mkdtemp(prefix="ceca-", dir="/tmp"))
        self.processes: list[subprocess.Popen[bytes]] = []
        _ip("netns", "add", self.name)
        _ip("link", "add", self.name, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        _ip("link", "set", self.name, "master", bridge, "up")
        _ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            _ip("-n", self.name, "link", "set", link, "up")

    def start(self, command: Sequence[str | Path], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a program on it; its output goes to `log` in its folder."""
        with (self.folder / "log").open("ab") as log:
            inside = ["ip", "netns", "exec", self.name, *map(str, command)]
            process = subprocess.Popen(inside, env=dict(environment), stdout=log, stderr=subprocess.STDOUT)
        self.processes.append(process)
        return process

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-6000:]

    def running(self) -> dict[int, str]:
        """Command lines of its processes by their numbers."""
        found = {}
        for pid in map(int, _ip("netns", "pids", self.name).split()):
            with contextlib.suppress(psutil.Error):
                found[pid] = " ".join(psutil.Process(pid).cmdline())
        return found

    def lose(self) -> None:
        """As when its power fails: others hear nothing more from it, not even that a connection has ended."""
        _ip("link", "set", self.name, "down")
        while running := self.running():
            for pid in running:
                with contextlib.suppress(psutil.Error):
                    psutil.Process(pid).kill()
            for process in self.processes:
                process.poll()
        _ip("netns", "del", self.name)
        shutil.rmtree(self.folder, ignore_errors=True)


class Network:
    """Starts machines, whose addresses begin with 10.219; the first one of each is reached from this process.

    They are test hosts of this process's own: the bridge is connected to nothing else.
    """

    def __init__(self) -> None:
        self.bridge, self.subnet = f"ceca{os.getpid() % 10**6}", f"10.219.{os.getpid() % 250}"
        self.machines: list[Machine] = []
        self.numbers = itertools.count()
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("addr", "add", f"{self.subnet}.1/24", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")

    def add(self, number: int) -> Machine:
        """A new machine; the number may be that of one that is lost, as an address goes to its successor."""
        machine = Machine(self.bridge, self.subnet, number, f"{self.bridge}-{next(self.numbers)}")
        self.machines.append(machine)
        return machine

    def lose(self, machine: Machine) -> None:
        self.machines.remove(machine)
        machine.lose()


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """A network; without the right to make one, the test is skipped."""
    try:
        made = Network()
    except OSError as error:
        pytest.skip(f"no network of its own can be made here: {error}")
    try:
        yield made
    finally:
        for machine in list(made.machines):
            made.lose(machine)
        _ip("link", "del", made.bridge)
