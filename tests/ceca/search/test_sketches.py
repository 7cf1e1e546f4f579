"""Approximate search: chosen by sketches, compared exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ceca.errors import UserError
from ceca.search.gallery import Gallery
from ceca.search.sketches import PER_HIT, find_directions, find_near, largest, sketch, sketch_all
from ceca.search.topk import Rows, top_k

PARTS = (64, 128)
VALUES = (2, 8, 8, 5, 4, 3)  # of the attributes of a person


def drawn_people(count: int, queries: int) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Four images of each person, whose embeddings are attributes, the person's own and the view's, and queries."""
    source = torch.Generator().manual_seed(0)
    people = count // 4
    attributes = [torch.randint(0, values, (people,), generator=source) for values in VALUES]
    asked = torch.randint(0, people, (queries,), generator=source)
    rows, texts = [], []
    for width in PARTS:
        spread = (1 + torch.arange(width) / 8) ** -0.5
        person = 0.5 * spread * torch.randn(people, width, generator=source)
        for values, codes in zip(VALUES, attributes, strict=True):
            person += torch.randn(values, width, generator=source)[codes] / len(VALUES) ** 0.5
        views = person.repeat(4, 1) + 0.5 * spread * torch.randn(4 * people, width, generator=source)
        rows.append(F.normalize(views, dim=1))
        texts.append(F.normalize(person[asked] + 0.5 * torch.randn(queries, width, generator=source), dim=1))
    return torch.cat(rows, dim=1).half(), (texts[0], texts[1])


def scale(queries: tuple[torch.Tensor, torch.Tensor], omega: float) -> torch.Tensor:
    return torch.cat([(1 - omega) * queries[0], omega * queries[1]], dim=1)


@pytest.fixture(scope="module")
def people() -> tuple[Rows, tuple[torch.Tensor, torch.Tensor]]:
    rows, queries = drawn_people(20_000, 32)
    return Rows(rows.split(3000)), queries


@pytest.mark.parametrize("omega", [0.0, 0.3, 1.0])
def test_one_row_in_fifty_holds_nearly_all_of_the_ten_best(people, omega: float):
    rows, queries = people
    scaled, sketches = scale(queries, omega), sketch_all(rows)
    exact, near = top_k(rows, scaled, 10), find_near(rows, sketches, scaled, 10, 0.02)
    recall = (exact.row[:, :, None] == near.row[:, None]).any(dim=2).float().mean()
    assert recall >= 0.99
    found = exact.row == near.row
    torch.testing.assert_close(near.similarity[found], exact.similarity[found], rtol=0, atol=1e-6)
    alone = find_near(rows, sketches, scaled[:1], 10, 0.02)
    assert torch.equal(alone.row, near.row[:1])  # the same, however many are asked together, and every time


def test_a_share_of_one_is_exact(people):
    rows, queries = people
    scaled = scale(queries, 0.3)[:5]
    exact, near = top_k(rows, scaled, 10), find_near(rows, sketch_all(rows), scaled, 10, 1.0)
    assert torch.equal(near.row, exact.row)
    torch.testing.assert_close(near.similarity, exact.similarity, rtol=0, atol=1e-6)


def test_a_condition_that_few_images_fulfil_is_answered_exactly(people):
    rows, queries = people
    scaled, sketches = scale(queries, 0.3)[:5], sketch_all(rows)
    for step in (200, 5000):  # of the 100 rows all are compared, although they are hardly the nearest; 4 are too few
        allowed = torch.arange(len(rows)) % step == 7
        exact, near = top_k(rows, scaled, 10, allowed), find_near(rows, sketches, scaled, 10, 0.0, allowed)
        assert torch.equal(near.row, exact.row)
    assert near.row[:, 4:].eq(-1).all()
    nobody = find_near(rows, sketches, scaled, 10, 0.5, torch.zeros(len(rows), dtype=torch.bool))
    assert nobody.row.eq(-1).all()
    assert nobody.similarity.eq(-torch.inf).all()


def test_among_many_allowed_rows_only_those_are_found(people):
    rows, queries = people
    allowed = torch.arange(len(rows)) % 2 == 0
    scaled = scale(queries, 0.3)
    near = find_near(rows, sketch_all(rows), scaled, 10, 0.02, allowed)
    assert near.row.remainder(2).eq(0).all()
    exact = top_k(rows, scaled, 10, allowed)
    assert (exact.row[:, :, None] == near.row[:, None]).any(dim=2).float().mean() >= 0.99


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 5000),
    share=st.floats(0, 1),
    kinds=st.integers(1, 40),  # few values: many are equal
    margin=st.sampled_from([0.0, 1.0, 7.5]),
    refused=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    ordered=st.booleans(),  # then the largest number is at all places of the sample
)
def test_the_largest_numbers_are_found_with_those_within_the_margin(
    seed: int, rows: int, share: float, kinds: int, margin: float, refused: float, ordered: bool
):
    source = np.random.default_rng(seed)
    estimates = source.integers(0, kinds, rows).astype(np.float32)
    estimates[source.random(rows) < refused] = -np.inf
    if ordered:
        estimates = np.sort(estimates)
        estimates[::64] = estimates[-1]
    count = max(1, round(share * rows))
    least = np.sort(estimates)[-count] - margin
    expected = np.flatnonzero((estimates >= least) & np.isfinite(estimates))
    assert np.array_equal(largest(estimates, count, margin), expected)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 400), queries=st.integers(1, 6))
def test_rows_that_are_equal_come_in_their_order(seed: int, count: int, queries: int):
    source = torch.Generator().manual_seed(seed)
    kinds = torch.randint(-2, 3, (5, 8), generator=source) / 4  # every sum is exact, and most rows are equal
    matrix = kinds[torch.randint(0, 5, (count,), generator=source)]
    vectors = torch.randint(-2, 3, (queries, 8), generator=source) / 4
    rows = Rows(matrix.half().split(37))
    near = find_near(rows, sketch_all(rows), vectors, 2, 0.0)
    for similarity, found in zip((vectors @ matrix.T), near.row, strict=True):
        held = (matrix == matrix[found[0]]).all(dim=1)
        assert found[0] == held.nonzero()[0]
        assert near.similarity.isfinite().all()
        assert similarity[found[0]] >= similarity[found[1:]].max() if len(found) > 1 else True


def test_a_query_far_from_everything_has_hits_and_a_query_of_zeros_too(people):
    rows, _ = people
    away = torch.stack([-rows.shards[0].float().mean(dim=0), torch.zeros(sum(PARTS))])
    near = find_near(rows, sketch_all(rows), away, 10, 0.02)
    assert near.row.ge(0).all()
    assert near.similarity[0].max() < 0
    assert near.row[1].tolist() == list(range(10))  # all alike, so all are compared: the first ones


def test_at_least_sixteen_rows_are_compared_for_each_hit():
    rows, queries = drawn_people(400, 4)
    held = Rows([rows])
    scaled = scale(queries, 0.3)
    many = find_near(held, sketch_all(held), scaled, 400 // PER_HIT, 0.0)
    assert torch.equal(many.row, top_k(held, scaled, 400 // PER_HIT).row)


def test_images_added_later_are_sketched_by_the_same_directions(people):
    rows, _ = people
    directions = find_directions(rows, 15_000)
    whole = sketch(rows, directions, 0, len(rows))
    for first in (15_000, 14_999, len(rows)):
        assert np.array_equal(sketch(rows, directions, first, len(rows)), whole[first:])


def test_what_was_removed_is_not_found_and_ranks_are_merged_as_in_an_exact_search():
    rows, queries = drawn_people(2000, 3)
    ids, present = np.arange(2000, dtype=np.uint64), torch.arange(2000) % 3 > 0
    exact = Gallery(ids, np.arange(2000), rows.split(700), PARTS[0], present)
    near = Gallery(ids, np.arange(2000), rows.split(700), PARTS[0], present, approximate=0.25)
    for again in (0, 20):
        wanted = exact.search(*queries, omega=[0.0, 0.3, 1.0], top_k=10, rerank_first=again)
        found = near.search(*queries, omega=[0.0, 0.3, 1.0], top_k=10, rerank_first=again)
        assert [[hit.image_id for hit in hits] for hits in found] == [[hit.image_id for hit in hits] for hits in wanted]


def test_a_gallery_on_a_gpu_is_not_searched_approximately():
    with pytest.raises(UserError, match="made for CPUs"):
        Gallery(np.zeros(1, np.uint64), np.zeros(1), [torch.zeros(1, 8, device="meta").half()], 4, approximate=0.1)
