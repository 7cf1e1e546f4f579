"""The losses against values worked out by hand in scalar arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ceca.losses import (
    DistributionMatching,
    IdentityCrossEntropy,
    TripletAlignment,
    compare,
    confidence_aware_weighting_loss,
    confidence_weights,
    contrastive_loss,
    similarity_distribution_matching,
    triplet_alignment_loss,
)

# Four samples; the first and the third show one person. Rows are texts, columns are images.
SIMILARITY = [
    [0.90, 0.20, 0.70, 0.10],
    [0.30, 0.80, 0.25, 0.60],
    [0.65, 0.15, 0.75, 0.40],
    [0.05, 0.55, 0.35, 0.50],
]
IDENTITIES = [7, 3, 7, 9]


def row_by_hand(row: list[float], sample: int, temperature: float, margin: float) -> float:
    """Compute max(0, m − Σ α S + τ log Σ exp(S/τ)) of one row, term by term."""
    positive = [s for s, identity in zip(row, IDENTITIES, strict=True) if identity == IDENTITIES[sample]]
    negative = [s for s, identity in zip(row, IDENTITIES, strict=True) if identity != IDENTITIES[sample]]
    total = sum(math.exp(s / temperature) for s in positive)
    attraction = sum(math.exp(s / temperature) / total * s for s in positive)
    repulsion = temperature * math.log(sum(math.exp(s / temperature) for s in negative))
    return max(0.0, margin - attraction + repulsion)


@pytest.mark.parametrize(("temperature", "margin"), [(0.015, 0.1), (0.5, 0.1), (0.05, 0.3)])
def test_triplet_alignment_is_the_sum_of_a_samples_row_and_column(temperature, margin):
    columns = [list(column) for column in zip(*SIMILARITY, strict=True)]
    expected = [
        row_by_hand(SIMILARITY[i], i, temperature, margin) + row_by_hand(columns[i], i, temperature, margin)
        for i in range(4)
    ]
    losses = triplet_alignment_loss(
        torch.tensor(SIMILARITY), torch.tensor(IDENTITIES), temperature=temperature, margin=margin
    )
    assert losses.tolist() == pytest.approx(expected, abs=1e-5)


def test_triplet_alignment_of_two_samples_in_numbers():
    # Row 0: one positive 0.9, one negative 0.2: 0.1 − 0.9 + 0.2 < 0 → 0. Row 1: 0.1 − 0.3 + 0.4 = 0.2.
    # Column 0: positive 0.9, negative 0.4 → 0. Column 1: positive 0.3, negative 0.2: 0.1 − 0.3 + 0.2 = 0.
    similarity = torch.tensor([[0.9, 0.2], [0.4, 0.3]])
    losses = triplet_alignment_loss(similarity, torch.tensor([1, 2]), temperature=0.015, margin=0.1)
    assert losses.tolist() == pytest.approx([0.0, 0.2], abs=1e-6)


def test_no_gradient_passes_through_the_weights_of_the_positives():
    # One text, two positive images a and b, one negative: d loss / d S_a is −α_a if α is a constant.
    temperature = 0.5
    similarity = torch.tensor(SIMILARITY, requires_grad=True)
    identities = torch.tensor(IDENTITIES)
    triplet_alignment_loss(similarity, identities, temperature=temperature, margin=5.0).sum().backward()
    e = [math.exp(s / temperature) for s in SIMILARITY[0]]
    column = [math.exp(row[2] / temperature) for row in SIMILARITY]
    from_row = -e[2] / (e[0] + e[2])
    from_column = -column[0] / (column[0] + column[2])
    assert similarity.grad is not None
    assert similarity.grad[0, 2].item() == pytest.approx(from_row + from_column, abs=1e-5)


@pytest.mark.parametrize("value", [1.0, -1.0])
def test_triplet_alignment_is_finite_at_the_ends_of_the_cosine(value):
    similarity = torch.full((4, 4), value, requires_grad=True)
    loss = triplet_alignment_loss(similarity, torch.tensor(IDENTITIES), temperature=0.015, margin=0.1)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert similarity.grad is not None
    assert torch.isfinite(similarity.grad).all()


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_of_one_person_has_no_negatives_and_no_triplet_loss(batch):
    similarity = torch.rand(batch, batch, requires_grad=True)
    loss = triplet_alignment_loss(similarity, torch.zeros(batch), temperature=0.015, margin=0.1)
    loss.sum().backward()
    assert loss.tolist() == [0.0] * batch
    assert similarity.grad is not None
    assert torch.isfinite(similarity.grad).all()


def test_half_precision_is_computed_in_fp32():
    similarity = torch.tensor(SIMILARITY)
    half = triplet_alignment_loss(similarity.bfloat16(), torch.tensor(IDENTITIES), temperature=0.015, margin=0.1)
    assert half.dtype == torch.float32


def test_a_similarity_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match=r"\[B, B\]"):
        triplet_alignment_loss(torch.zeros(2, 3), torch.zeros(2), temperature=0.015, margin=0.1)


# --- CAWL -------------------------------------------------------------------------------------------------

SUMMARY = [[1.0, 0.0], [0.6, 0.8], [0.8, 0.6], [0.0, 2.0]]
TEXT = [[0.8, 0.6], [0.0, 1.0], [3.0, 4.0], [0.6, -0.8]]
IMAGE = [[0.6, 0.8], [1.0, 0.0], [0.8, 0.6], [-0.6, 0.8]]


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def cross_entropy_by_hand(rows: list, columns: list, scale: float) -> list[float]:
    entropies = []
    for i, row in enumerate(rows):
        e = [math.exp(scale * cosine(row, column)) for column in columns]
        positive = sum(value for value, identity in zip(e, IDENTITIES, strict=True) if identity == IDENTITIES[i])
        entropies.append(-math.log(positive / sum(e)))
    return entropies


@pytest.mark.parametrize(("scale", "gamma"), [(1.0, 1.0), (5.0, 1.0), (5.0, 0.5), (50.0, 1.0)])
def test_confidence_aware_weighting_by_hand(scale, gamma):
    st_, si = cross_entropy_by_hand(SUMMARY, TEXT, scale), cross_entropy_by_hand(SUMMARY, IMAGE, scale)
    it, ti = cross_entropy_by_hand(IMAGE, TEXT, scale), cross_entropy_by_hand(TEXT, IMAGE, scale)
    raw = [(math.exp(-a) * math.exp(-b)) ** gamma for a, b in zip(st_, si, strict=True)]
    weights = [min(5.0, max(0.2, w / (sum(raw) / 4))) for w in raw]
    expected = [w * (a + b) + (1 - w) * 0.5 * (c + d) for w, a, b, c, d in zip(weights, st_, si, it, ti, strict=True)]
    losses, _ = confidence_aware_weighting_loss(
        *(torch.tensor(features) for features in (SUMMARY, TEXT, IMAGE)),
        torch.tensor(IDENTITIES),
        scale=scale,
        gamma=gamma,
        weight_range=(0.2, 5.0),
    )
    assert losses.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_equal_confidence_weighs_every_sample_one_and_carries_no_gradient():
    entropies = torch.full((3,), 0.7, requires_grad=True)
    weights = confidence_weights(entropies, entropies, gamma=1.0, weight_range=(0.2, 5.0))
    assert weights.tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert not weights.requires_grad


def test_weights_are_clipped_where_probabilities_vanish_in_fp32():
    weights = confidence_weights(
        torch.tensor([300.0, 310.0]), torch.tensor([300.0, 310.0]), gamma=1.0, weight_range=(0.2, 5.0)
    )
    assert weights.tolist() == pytest.approx([2.0, 0.2], rel=1e-3)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_confidence_aware_weighting_is_finite_for_one_identity_and_for_opposite_features(sign):
    summary = torch.ones(3, 4, requires_grad=True)
    for identities in (torch.zeros(3), torch.arange(3)):
        loss, _ = confidence_aware_weighting_loss(
            summary, sign * torch.ones(3, 4), torch.ones(3, 4), identities, scale=50.0, gamma=1.0, weight_range=(0.2, 5)
        )
        loss.mean().backward()
        assert torch.isfinite(loss).all()
        assert summary.grad is not None
        assert torch.isfinite(summary.grad).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), order=st.permutations(range(5)))
def test_the_order_of_samples_never_matters(seed, order):
    source = torch.Generator().manual_seed(seed)
    summary, text, image = torch.randn(3, 5, 4, generator=source)
    identities = torch.randint(0, 3, (5,), generator=source)
    tal = {"temperature": 0.1, "margin": 0.1}
    cawl = {"scale": 5.0, "gamma": 1.0, "weight_range": (0.2, 5.0)}
    similarity = torch.nn.functional.normalize(text, dim=1) @ torch.nn.functional.normalize(image, dim=1).T
    torch.testing.assert_close(
        triplet_alignment_loss(similarity[order][:, order], identities[order], **tal),
        triplet_alignment_loss(similarity, identities, **tal)[order],
    )
    torch.testing.assert_close(
        confidence_aware_weighting_loss(summary[order], text[order], image[order], identities[order], **cawl)[0],
        confidence_aware_weighting_loss(summary, text, image, identities, **cawl)[0][order],
    )


# --- baselines --------------------------------------------------------------------------------------------


def test_infonce_is_the_cross_entropy_of_both_directions():
    similarity = torch.tensor([[0.5, 0.1, -0.2], [0.3, 0.2, 0.0], [0.1, 0.4, 0.6]])
    logits, positives = 50 * similarity, torch.arange(3)
    rows, columns = (F.cross_entropy(side, positives, reduction="none") for side in (logits, logits.T))
    expected = 0.5 * (rows + columns)
    torch.testing.assert_close(contrastive_loss(similarity, scale=50), expected)


def test_similarity_distribution_matching_by_hand():
    similarity = torch.tensor([[0.02, 0.0], [0.0, 0.02]])
    p = math.e / (math.e + 1)  # softmax of (1, 0)
    each = p * (math.log(p) - math.log(1 + 1e-8)) + (1 - p) * (math.log(1 - p) - math.log(1e-8))
    losses = similarity_distribution_matching(similarity, torch.tensor([0, 1]), scale=50)
    torch.testing.assert_close(losses, torch.full((2,), 2 * each), rtol=1e-5, atol=1e-5)
    # One identity: every match counts half, and equal similarities have the smallest loss.
    flat = similarity_distribution_matching(torch.zeros(2, 2), torch.tensor([4, 4]), scale=50)
    torch.testing.assert_close(flat, torch.zeros(2), rtol=0, atol=1e-6)


# --- a worker's own rows ----------------------------------------------------------------------------------

ROW_LOSSES = [
    TripletAlignment(temperature=0.1, margin=0.3),
    TripletAlignment(temperature=0.015, margin=0.1),
    IdentityCrossEntropy(scale=50.0),
    DistributionMatching(scale=50.0),
]


@pytest.mark.parametrize("loss", ROW_LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("people", [1, 3, 40])
@pytest.mark.parametrize("piece", [1, 50, 2**24])
def test_a_comparison_by_pieces_has_the_value_and_the_gradient_of_the_whole(loss, people, piece, monkeypatch):
    monkeypatch.setattr("ceca.losses.PIECE", piece)
    source = torch.Generator().manual_seed(people)
    a, b, c = F.normalize(torch.randn(3, 12, 6, generator=source, dtype=torch.float64), dim=2).requires_grad_()
    identities = torch.randint(0, people, (12,), generator=source)
    weight = torch.rand(2, 5, generator=source, dtype=torch.float64)
    own = slice(4, 9)
    similarity = torch.stack([a[own] @ b.T, b[own] @ c.T])
    expected = loss.value(similarity, identities[own, None] == identities)
    found = compare(loss, [a[own], b[own]], [b, c], identities[own], identities)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    gradients, wanted = (torch.autograd.grad((weight * losses).sum(), (a, b, c)) for losses in (found, expected))
    for gradient, right in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-6, atol=1e-6)
