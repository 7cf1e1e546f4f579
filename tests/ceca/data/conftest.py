"""Fixtures for the tests of shared data."""

from __future__ import annotations

from collections.abc import Iterator

import fsspec
import pytest

from tests.ceca.data.dataset import contents, fill, filled_with


@pytest.fixture(scope="session")
def filled() -> dict[str, bytes]:
    """Objects of a dataset that has rows of its images everywhere; copied by `filled_with`."""
    store = filled_with()
    fill(store)
    return contents(store)


@pytest.fixture(autouse=True)
def _memory_is_empty_after_each_test() -> Iterator[None]:
    yield
    fsspec.filesystem("memory").store.clear()
