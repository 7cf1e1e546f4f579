"""Exact top-k against fp32 over all rows, whatever precision is fastest."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ceca.search import topk
from ceca.search.topk import Rows, top_k


def by_hand(rows: torch.Tensor, queries: torch.Tensor, k: int, allowed: torch.Tensor | None = None):
    """fp32 over all rows; of equal similarities the lower row first."""
    similarity = queries @ rows.float().T
    if allowed is not None:
        similarity = similarity.masked_fill(~allowed, -torch.inf)
    order = torch.sort(similarity, dim=1, descending=True, stable=True).indices[:, :k]
    return similarity.gather(1, order), order


def make_rows(rows: int, queries: int, width: int, seed: int, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    centre = torch.randn(1, width, generator=source)
    drawn = [centre + spread * torch.randn(count, width, generator=source) for count in (rows, queries)]
    rows_, queries_ = (torch.nn.functional.normalize(part, dim=1) for part in drawn)
    return rows_.half(), queries_


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def matrix_precision(request, monkeypatch):
    monkeypatch.setattr(topk, "_matrix_precision", lambda: request.param)


@pytest.mark.usefixtures("matrix_precision")
@pytest.mark.parametrize("queries", [1, 3, 4, 70])
@pytest.mark.parametrize("spread", [1.0, 0.02])  # rows far apart, and so alike that rounding would reorder them
def test_the_best_rows_are_those_of_fp32(queries: int, spread: float):
    rows, vectors = make_rows(3000, queries, 48, seed=queries, spread=spread)
    best = top_k(Rows([rows[:1000], rows[1000:1001], rows[1001:]]), vectors, 10)
    similarity, order = by_hand(rows, vectors, 10)
    torch.testing.assert_close(best.similarity, similarity, rtol=0, atol=1e-6)
    differs = best.row != order  # only where fp32 itself, summed in another order, does not tell two rows apart
    assert (best.similarity[differs] - similarity[differs]).abs().max() < 1e-6 if differs.any() else True
    assert differs.float().mean() < 0.05


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 60), queries=st.integers(1, 6), k=st.integers(1, 70))
def test_ties_come_in_the_order_of_rows_and_filters_before_the_top_k(seed: int, rows: int, queries: int, k: int):
    source = torch.Generator().manual_seed(seed)
    # Multiples of a quarter: every sum is exact, and many are equal.
    matrix = torch.randint(-2, 3, (rows, 8), generator=source) / 4
    vectors = torch.randint(-2, 3, (queries, 8), generator=source) / 4
    allowed = torch.rand(rows, generator=source) < 0.5
    best = top_k(Rows([matrix.half()]), vectors, k, allowed)
    similarity, order = by_hand(matrix, vectors, min(k, rows), allowed)
    assert torch.equal(best.similarity, similarity)
    assert torch.equal(best.row, torch.where(similarity == -torch.inf, -1, order))


def test_rows_that_are_all_alike_are_all_compared_again():
    rows = torch.full((40_000, 4), 0.5).half()
    rows[39_999] = torch.tensor([0.5, 0.5, 0.5, 0.50048828125])
    best = top_k(Rows([rows]), torch.full((5, 4), 0.5), 2)
    assert best.row.tolist() == [[39_999, 0]] * 5


def hard_rows(count: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that round badly, and queries between them.

    A third have one large number, a third are a near tie of another row, and the rest are random; some are zero.
    """
    rows, queries = make_rows(count, 20, width, seed)
    source = torch.Generator().manual_seed(seed)
    third = count // 3
    rows[torch.arange(third), torch.randint(0, width, (third,), generator=source)] = 1.0
    rows[third : 2 * third] = rows[2 * third : 3 * third]
    places = torch.randint(0, width, (third,), generator=source)
    rows[third + torch.arange(third), places] *= 1 + 2.0**-10  # the next fp16 number, or the one after it
    rows[-2:] = 0
    queries[:5] = rows[third : third + 5].float()
    queries[5:10] = rows[:5].float()
    queries[10] = 0
    return rows, queries


@pytest.mark.usefixtures("matrix_precision")
@pytest.mark.parametrize("seed", range(20))
def test_rows_that_round_badly_hide_nothing(seed: int):
    rows, queries = hard_rows(1500, 96, seed)
    held = Rows(rows.split(400))
    for some in (queries[:1], queries[9:12], queries):
        best = top_k(held, some, 7)
        similarity, _ = by_hand(rows, some, 7)
        torch.testing.assert_close(best.similarity, similarity, rtol=0, atol=1e-6)
        itself = (some * rows.float()[best.row[:, 0]]).sum(dim=1)
        torch.testing.assert_close(itself, similarity[:, 0], rtol=0, atol=1e-6)


def test_the_threads_of_a_search_leave_torchs_own_number_alone():
    before = torch.get_num_threads()
    rows, vectors = make_rows(2000, 8, 16, seed=1)
    top_k(Rows([rows]), vectors, 3)
    with ThreadPoolExecutor(1) as other:
        assert other.submit(torch.get_num_threads).result() == before
    assert torch.get_num_threads() == before


def test_queries_beside_rows_have_the_hits_of_fp32():
    rows, near = hard_rows(3000, 64, seed=7)
    source = torch.Generator().manual_seed(8)
    chosen = torch.randint(0, len(rows), (600,), generator=source)
    spread = 10.0 ** torch.randint(-7, 0, (600, 1), generator=source)  # at once a row, a near tie, or anything
    beside = rows[chosen].float() + spread * torch.randn(600, 64, generator=source)
    queries = torch.cat([near, beside, torch.randn(380, 64, generator=source)])
    held = Rows(rows.split(700))
    batches = [*queries[:60].split(1), *queries[60:].split(235)]
    similarity = torch.cat([top_k(held, some, 10).similarity for some in batches])
    wanted, _ = by_hand(rows, queries, 10)
    assert ((similarity - wanted).abs() <= 1e-6 * queries.norm(dim=1, keepdim=True)).all()


@pytest.fixture
def as_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.Tensor], Rows]:
    """Rows that are searched as on a GPU: what it does with fp16 does not depend on the device."""

    def hold(rows: torch.Tensor) -> Rows:
        held = Rows(rows.split(400))
        held.on_cpu, held.norm = False, float(rows.float().norm(dim=1).max())
        return held

    return hold


@pytest.mark.parametrize("queries", [1, 24])
@pytest.mark.parametrize("looked_at", [0, 64, 4000])
def test_the_first_pass_of_a_gpu_hides_nothing_either(
    queries: int, looked_at: int, as_gpu: Callable[[torch.Tensor], Rows], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(topk, "LOOKED_AT", looked_at)
    rows, vectors = hard_rows(1500, 96, seed=5)
    allowed = torch.arange(1500) % 3 > 0
    best = top_k(as_gpu(rows), vectors[:queries], 7, allowed)
    similarity, _ = by_hand(rows, vectors[:queries], 7, allowed)
    torch.testing.assert_close(best.similarity, similarity, rtol=0, atol=1e-6)
    assert allowed[best.row].all()


def test_where_a_gpu_looks_at_too_few_rows_it_looks_again(
    as_gpu: Callable[[torch.Tensor], Rows], monkeypatch: pytest.MonkeyPatch
):
    again: list[int] = []
    one_by_one = topk._best_one_by_one
    monkeypatch.setattr(topk, "_best_one_by_one", lambda *given: again.append(len(given[1])) or one_by_one(*given))
    rows, vectors = make_rows(1500, 4, 16, seed=2)
    rows[100:900] = rows[100]  # 800 equal rows, more than are looked at
    vectors[1] = rows[100].float()
    best = top_k(as_gpu(rows), vectors, 5)
    assert again == [1]  # that query alone
    assert best.row[1].tolist() == [100, 101, 102, 103, 104]
    similarity, order = by_hand(rows, vectors, 5)
    assert best.row[[0, 2, 3]].tolist() == order[[0, 2, 3]].tolist()
    torch.testing.assert_close(best.similarity, similarity, rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1000), rows=st.integers(1, 600), queries=st.integers(1, 6), k=st.integers(1, 70))
def test_a_gpu_too_keeps_ties_in_the_order_of_rows_and_fills_up(
    seed: int, rows: int, queries: int, k: int, as_gpu: Callable[[torch.Tensor], Rows]
):
    source = torch.Generator().manual_seed(seed)
    matrix = torch.randint(-2, 3, (rows, 8), generator=source) / 4
    vectors = torch.randint(-2, 3, (queries, 8), generator=source) / 4
    allowed = torch.rand(rows, generator=source) < 0.5
    best = top_k(as_gpu(matrix.half()), vectors, k, allowed)
    similarity, order = by_hand(matrix, vectors, min(k, rows), allowed)
    assert torch.equal(best.similarity, similarity)
    assert torch.equal(best.row, order.masked_fill(similarity == -torch.inf, -1))


def test_products_of_fp16_are_added_up_in_fp32():
    program = "import ceca.search.topk, torch; print(torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
