"""Pictures of nobody known that are described alike are no negatives of each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ceca.config import LossConfig
from ceca.losses import DistributionMatching, IdentityCrossEntropy, RowLoss, TripletAlignment, compare
from ceca.model.backbone import tokenize
from ceca.model.ceca import Features
from ceca.training import soft_labels as module
from ceca.training.soft_labels import NEVER, negative_weights, soft_labels
from ceca.training.step import branch_losses, loss_terms
from ceca.training.workers import batch_slice

CAPTIONS = [
    "a man wears a red coat and blue jeans",  # a, man, wears, red, coat, and, blue, jeans: 8 words
    "a man wears blue jeans and a red coat",  # the same words
    "a man wears a red coat and black jeans",  # 7 of 9
    "green skirt",  # none of 10
]
IDENTITIES = torch.tensor([0, 1, 2, 3])


def batch_of(nobody: list[bool], rows: slice = slice(None)) -> dict[str, np.ndarray]:
    return {"caption": tokenize(CAPTIONS).numpy()[rows], "nobody": np.array(nobody)[rows]}


def test_a_column_counts_by_the_words_that_both_captions_have():
    ids = tokenize(CAPTIONS)
    found = negative_weights(ids[:1], ids, torch.tensor([[False, True, True, True]]), enough=0.8)
    expected = [0.0, NEVER, math.log(1 - 7 / 9 / 0.8), 0.0]
    torch.testing.assert_close(found, torch.tensor([expected]))
    assert negative_weights(ids, ids, torch.zeros(4, 4, dtype=torch.bool), enough=0.8).eq(0).all()


def test_only_rows_of_nobody_have_soft_labels_and_their_own_pictures_stay_whole():
    config = LossConfig(soft_labels=0.8)
    found = soft_labels(batch_of([True, False, True, True]), torch.tensor([0, 0, 2, 3]), config)
    assert found is not None
    assert found[0, :2].tolist() == [0, 0]  # one picture with two captions
    assert found[1].tolist() == [0, 0, 0, 0]
    assert found[2].tolist() == pytest.approx([math.log(1 - 7 / 9 / 0.8)] * 2 + [0, 0], abs=1e-5)
    assert soft_labels(batch_of([True] * 4), IDENTITIES, LossConfig()) is None


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_have_the_rows_of_one(workers: int, monkeypatch: pytest.MonkeyPatch):
    config, nobody = LossConfig(soft_labels=0.8), [True, True, False, True]
    whole = soft_labels(batch_of(nobody), IDENTITIES, config)
    everyone = tokenize(CAPTIONS)
    rows = []
    for rank in range(workers):
        monkeypatch.setattr(module, "world", lambda rank=rank: (rank, workers))
        monkeypatch.setattr(module, "gather_rows", lambda own, batch: everyone)
        rows.append(soft_labels(batch_of(nobody, batch_slice(rank, workers, 4)), IDENTITIES, config))
    assert torch.equal(torch.cat([row for row in rows if row is not None]), whole)


def one_row(loss: RowLoss) -> tuple[float, list[float]]:
    """The loss of one text and its slope by the similarities to its own image, 0.6, and to two others, 0.7 and 0.5.

    The first of the others is described like the text and counts nothing, the second counts half. Unit columns make the
    similarities the row's components.
    """
    row = torch.tensor([[0.6, 0.7, 0.5]], dtype=torch.float64, requires_grad=True)
    columns, people = torch.eye(3, dtype=torch.float64), torch.tensor([7, 8, 9])
    log_weights = torch.tensor([[0.0, NEVER, math.log(0.5)]], dtype=torch.float64)
    value = compare(loss, [row], [columns], people[:1], people, log_weights)
    value.sum().backward()
    assert row.grad is not None
    return value.item(), row.grad[0].tolist()


def test_triplet_alignment_with_soft_labels_by_hand():
    # One negative is left, with half its weight: 1 − 0.6 + 0.1·log(0.5·exp(0.5 / 0.1)) = 0.9 − 0.1·log 2.
    value, slope = one_row(TripletAlignment(temperature=0.1, margin=1.0))
    assert value == pytest.approx(0.9 - 0.1 * math.log(2))
    assert slope == pytest.approx([-1, 0, 1])


def test_cross_entropy_and_distribution_matching_with_soft_labels_by_hand():
    own, half = math.exp(2 * 0.6), 0.5 * math.exp(2 * 0.5)
    p = own / (own + half)
    value, slope = one_row(IdentityCrossEntropy(scale=2.0))
    assert value == pytest.approx(-math.log(p))
    assert slope == pytest.approx([2 * (p - 1), 0, 2 * (1 - p)])
    value, slope = one_row(DistributionMatching(scale=2.0))
    assert value == pytest.approx(p * math.log(p) + (1 - p) * (math.log(1 - p) - math.log(1e-8)), rel=1e-6)
    assert slope[1] == 0
    assert sum(slope) == pytest.approx(0, abs=1e-9)


def test_every_term_of_similarities_takes_them():
    """A batch whose samples are all described alike has no negatives, so nothing is pushed away."""
    source = torch.Generator().manual_seed(0)
    sides = [F.normalize(torch.randn(4, 8, generator=source), dim=1) for _ in range(6)]
    none_left = torch.full((4, 4), NEVER).fill_diagonal_(0.0)
    config = LossConfig(terms=("tal_global", "tal_local", "cawl", "infonce"))
    found = loss_terms(Features(*sides), IDENTITIES, config, log_weights=none_left).values()
    assert list(map(float, found)) == pytest.approx([0.0] * 4, abs=1e-6)
    assert branch_losses(Features(*sides), IDENTITIES, config, none_left).eq(0).all()
    assert all(float(value) > 0.1 for value in loss_terms(Features(*sides), IDENTITIES, config).values())
