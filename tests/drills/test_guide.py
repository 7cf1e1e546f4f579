"""docs/cluster.md as a newcomer goes through it: its commands, pasted one after another into a shell."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import local
from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]


def commands(guide: Path) -> str:
    """What stands in its shell blocks before it goes on to submitting jobs in general."""
    text = guide.read_text().split("\n## ", 1)[0]
    return "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))


def test_the_commands_of_the_guide_end_in_an_answer_and_leave_nothing_behind() -> None:
    script = commands(REPOSITORY / "docs" / "cluster.md")
    for word in ("ceca cluster up", "ray job submit", "serve run", "curl", "ceca cluster down"):
        assert word in script
    if local.find("local"):
        pytest.skip("a cluster of yours runs under the guide's name")
    names = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{environment['PATH']}"}
    try:
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", script],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=800,
        )
    finally:
        left = local.down("local")
    assert done.returncode == 0, done.stdout[-6000:]
    assert left == 0
    answer = next(line for line in done.stdout.splitlines() if '"hits"' in line)
    assert answer.count('"image_id"') == 3
    assert not local.folder_of("local").exists()
