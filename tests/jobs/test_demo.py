"""The demo, with fewer people and one epoch: what `make demo` prints and leaves behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = "draw: {identities: 24, images_per_identity: 3, split_identities: [14, 4, 6], workers: 1}\ntrain: {epochs: 1}\n"


def test_the_demo_ends_in_a_table_and_answered_searches(tmp_path: Path) -> None:
    recipe, folder = tmp_path / "few.yaml", tmp_path / "demo"
    recipe.write_text(SMALL)
    command = [sys.executable, "-m", "jobs.cli", "demo", "--folder", str(folder)]
    done = subprocess.run(
        [*command, "--recipe", f"tests/drills/oracle.yaml+{recipe}"],
        cwd=REPOSITORY,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    rows = re.findall(r"^│ (chance|without summaries|CECA)[^│]*│ +([\d.]+) │", done.stderr, re.MULTILINE)
    assert [name for name, _ in rows] == ["chance", "without summaries", "CECA", "CECA", "CECA"]
    assert len(re.findall(r"^search: “.+” → right at rank ", done.stderr, re.MULTILINE)) == 3
    assert {"pedestrians.png", "searches.png", "data", "drawn"} <= {path.name for path in folder.iterdir()}
