"""The demo, with fewer people: what `make demo` prints and leaves behind."""

from __future__ import annotations

import re

import pytest

from tests.drills.conftest import Demo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_the_demo_ends_in_a_table_and_answered_searches(demo: Demo) -> None:
    table = demo.said.partition("People never seen in training")[2]
    rows = re.findall(r"^│ (chance|without summaries|CECA)[^│]*│ +[\d.]+ │", table, re.MULTILINE)
    assert rows == ["chance", "without summaries", "CECA", "CECA", "CECA"]
    assert len(re.findall(r"^search: “.+” → right at rank ", demo.said, re.MULTILINE)) == 3
    assert {"pedestrians.png", "searches.png", "data", "drawn"} <= {path.name for path in demo.folder.iterdir()}
