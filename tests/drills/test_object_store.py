"""Every stage while the object store refuses one in ten requests, is slow, or cuts every read once: the tables and
figures are those of an undisturbed run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ceca.data.store import Store
from cluster.object_store import S3Server
from tests.conftest import Command
from tests.drills.conftest import RECIPE, assert_same, result
from tests.drills.faults import EXPIRED, SKEWED, Faults, before

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def proxy(s3: S3Server, s3_environment: None) -> Iterator[tuple[dict[str, str], Faults]]:
    """The environment of commands that reach the S3 server through it, and its faults."""
    with before(s3.endpoint) as (endpoint, faults):
        yield {**s3.environment(), "AWS_ENDPOINT_URL": endpoint}, faults


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param({"refuse": 0.1}, marks=pytest.mark.long, id="refused"),
        pytest.param({"delay_s": 0.05}, marks=pytest.mark.long, id="slow"),
        pytest.param({"cut": True}, marks=pytest.mark.long, id="cut"),
    ],
)
def test_a_pipeline_over_a_bad_object_store_ends_with_the_same_result(
    run: Command, drawn: Path, undisturbed: Store, proxy: tuple[dict[str, str], Faults], fault: dict[str, Any], request
) -> None:
    environment, faults = proxy
    data = f"s3://bucket/{request.node.callspec.id}"
    faults.happened.clear()
    for name, value in fault.items():
        setattr(faults, name, value)
    try:
        begun = time.monotonic()
        run("pipeline", "--recipe", RECIPE, "--source", drawn, "--data", data, environment=environment)
        print(f"{fault}: {time.monotonic() - begun:.0f} s, {dict(faults.happened)}")
    finally:
        faults.refuse, faults.delay_s, faults.cut = 0.0, 0.0, False
    assert faults.happened[{"refuse": "refused", "cut": "cut"}.get(next(iter(fault)), "requests")] > 20
    assert_same(result(Store(data)), result(undisturbed))


@pytest.mark.parametrize(
    ("denied", "advice"),
    [(EXPIRED, "AWS_ACCESS_KEY_ID"), (SKEWED, "clock")],
    ids=["expired", "skewed"],
)
def test_a_key_that_has_expired_or_a_wrong_clock_is_an_error_that_says_so(
    run: Command, drawn: Path, proxy: tuple[dict[str, str], Faults], denied: str, advice: str
) -> None:
    environment, faults = proxy
    faults.deny = denied
    try:
        arguments = ("--recipe", RECIPE, "--source", drawn, "--data", "s3://bucket/denied")
        output = run("ingest", *arguments, expect=2, environment=environment).stdout
    finally:
        faults.deny = ""
    assert advice in " ".join(output.split())
    assert "Traceback" not in output
