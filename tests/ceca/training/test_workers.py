"""The slices of a batch that workers take."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ceca.training.workers import batch_slice


@settings(deadline=None)
@given(batch=st.integers(1, 200), size=st.integers(1, 16))
def test_slices_of_a_batch_cover_it_and_differ_by_one_at_most(batch: int, size: int):
    rows = [batch_slice(rank, size, batch) for rank in range(size)]
    assert [n for part in rows for n in range(batch)[part]] == list(range(batch))
    lengths = {part.stop - part.start for part in rows}
    assert max(lengths) - min(lengths) <= 1
