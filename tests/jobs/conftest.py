"""What tests of jobs share."""

from __future__ import annotations

from pathlib import Path

import pytest

SMALL = ("--recipe", "tests/jobs/small.yaml")


@pytest.fixture(scope="session")
def ingested(run, drawn, tmp_path_factory) -> Path:
    """A dataset on disk with images and captions, in small parts, for tests that only read it or copy it."""
    data = tmp_path_factory.mktemp("ingested")
    run("ingest", *SMALL, "--source", drawn, "--data", data)
    return data


@pytest.fixture(scope="session")
def told(run, ingested) -> Path:
    """The same dataset with dialogues."""
    run("dialogue", *SMALL, "--data", ingested)
    return ingested
