"""The bounds of 8-bit rows hold for every row and query, whatever the order of sums in fp32."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ceca.search.rounding import kernels, query_bounds, round_rows

fp16 = arrays.arrays(
    np.float16, arrays.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.floats(-2, 2, width=16)
)


def bounds_of(rows: np.ndarray, queries: torch.Tensor, precision: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds of the similarities, [Q, n] each, as a search computes them."""
    rounded = round_rows(torch.from_numpy(rows))
    as_multiplied = queries.to(precision)
    if precision is torch.float32:
        products = np.empty((len(queries), len(rows)), np.float32)
        for query, out in zip(as_multiplied.numpy(), products, strict=True):
            kernels().multiply(rounded.codes, query, out)
    else:
        products = (torch.from_numpy(rounded.codes).to(precision) @ as_multiplied.T).T.float().numpy()
    factors = query_bounds(queries, as_multiplied, 2.0**-8 if precision is torch.bfloat16 else 0.0)
    upper = np.ascontiguousarray(products[..., None])
    highest, lower = np.empty((2, len(queries), len(rows)), np.float32)
    allowed = np.ones((len(rows), 1), np.bool_)
    groups = np.ascontiguousarray(rounded.bounds.T[..., None])  # a group for each row
    kernels().bound(upper, groups, allowed, factors, highest, lower, 0, len(rows))
    assert np.array_equal(upper[..., 0], highest)
    return lower, highest


@settings(max_examples=150, deadline=None)
@given(rows=fp16, seed=st.integers(0, 1000), size=st.sampled_from([1e-6, 1.0, 50.0]), low=st.booleans())
def test_fp32_in_any_order_lies_between_the_bounds(rows: np.ndarray, seed: int, size: float, low: bool):
    source = torch.Generator().manual_seed(seed)
    queries = size * torch.randn(3, rows.shape[1], generator=source)
    queries[1] = size * torch.from_numpy(rows[0].astype(np.float32))
    lower, upper = bounds_of(rows, queries, torch.bfloat16 if low else torch.float32)
    numbers = rows.astype(np.float32)
    for q, query in enumerate(queries.numpy()):
        exact = numbers.astype(np.float64) @ query.astype(np.float64)
        forwards, backwards = np.zeros(len(rows), np.float32), np.zeros(len(rows), np.float32)
        for column in range(rows.shape[1]):
            forwards += numbers[:, column] * query[column]
            backwards += numbers[:, -1 - column] * query[-1 - column]
        for similarity in (exact, forwards, backwards, numbers @ query):
            assert (lower[q] <= similarity).all()
            assert (similarity <= upper[q]).all()


def test_a_row_with_one_large_number_has_a_wide_interval_and_its_neighbours_have_not():
    rows = np.full((3, 64), 0.004, np.float16)
    rows[1, 7] = 1.0
    bounds = round_rows(torch.from_numpy(rows)).bounds
    assert bounds[1, 1] > 50 * bounds[0, 1]
    assert bounds[0, 1] == bounds[2, 1]
    assert (bounds[:, 1] < bounds[:, 2]).all()


def test_whole_numbers_of_steps_lose_nothing_but_fp32():
    rows = torch.arange(-127, 128, dtype=torch.float16)[None]
    rounded = round_rows(rows)
    assert np.array_equal(rounded.codes[0], np.arange(-127, 128))
    assert rounded.bounds[0, 0] == 1
    assert 0 < rounded.bounds[0, 1] < 1e-4 * rounded.bounds[0, 2]


def test_rows_of_zeros_are_zeros():
    rounded = round_rows(torch.zeros(2, 8, dtype=torch.float16))
    assert not rounded.codes.any()
    assert not rounded.bounds.any()
