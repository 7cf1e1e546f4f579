"""The terms of the loss over a batch."""

from __future__ import annotations

import pytest
import torch

from ceca.config import LossConfig
from ceca.losses import cosine_similarity, triplet_alignment_loss
from ceca.model.ceca import Features
from ceca.training.step import loss_terms


def features(summary: bool = True) -> Features:
    source = torch.Generator().manual_seed(0)
    made = [torch.randn(4, 8, generator=source) for _ in range(6)]
    return Features(made[0], made[1], made[2] if summary else None, *made[3:])


IDENTITIES = torch.tensor([0, 1, 0, 2])


def test_each_term_is_its_loss_over_the_embeddings_it_names():
    made = features()
    terms = loss_terms(made, IDENTITIES, LossConfig(terms=("tal_local", "tal_global")))
    assert list(terms) == ["tal_local", "tal_global"]
    for name, text, visual in (
        ("tal_global", made.text, made.visual),
        ("tal_local", made.local_text, made.local_visual),
    ):
        expected = triplet_alignment_loss(
            cosine_similarity(text, visual), IDENTITIES, temperature=0.015, margin=0.1
        ).sum()
        assert float(terms[name]) == pytest.approx(float(expected))


def test_terms_are_computed_in_fp32_whatever_the_features_are():
    halves = Features(*(value.bfloat16() for value in features()[:6] if value is not None))
    assert {value.dtype for value in loss_terms(halves, IDENTITIES, LossConfig()).values()} == {torch.float32}


def test_the_weighting_loss_without_summaries_says_what_to_set():
    with pytest.raises(ValueError, match="the loss cawl needs summary"):
        loss_terms(features(summary=False), IDENTITIES, LossConfig())
