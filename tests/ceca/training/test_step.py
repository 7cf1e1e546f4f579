"""The terms of the loss over a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ceca.config import LossConfig
from ceca.losses import cosine_similarity, triplet_alignment_loss
from ceca.model.ceca import Features
from ceca.training.step import branch_losses, cawl, loss_terms

IDENTITIES = torch.tensor([0, 1, 0, 2])


def features(summary: bool = True) -> Features:
    source = torch.Generator().manual_seed(0)
    values = [torch.randn(4, 8, generator=source) for _ in range(6)]
    return Features(values[0], values[1], values[2] if summary else None, *values[3:])


def test_each_term_is_its_loss_over_the_embeddings_it_names():
    batch = features()
    terms = loss_terms(batch, IDENTITIES, LossConfig(terms=("tal_local", "tal_global")))
    assert list(terms) == ["tal_local", "tal_global"]
    for name, text, visual in (
        ("tal_global", batch.text, batch.visual),
        ("tal_local", batch.local_text, batch.local_visual),
    ):
        similarity = cosine_similarity(text, visual)
        expected = triplet_alignment_loss(similarity, IDENTITIES, temperature=0.015, margin=0.1).sum()
        assert float(terms[name]) == pytest.approx(float(expected))


ALL: tuple[Any, ...] = ("tal_global", "tal_local", "cawl", "infonce", "sdm", "identity", "words")


def test_noisy_samples_are_compared_with_and_not_learned_from():
    batch, clean = features(), torch.tensor([True, False, True, True])
    source = torch.Generator().manual_seed(1)
    batch = batch._replace(identity_loss=torch.rand(4, 1, generator=source), word_loss=torch.rand(4, 2) + 1)
    config = LossConfig(terms=ALL)
    found = loss_terms(batch, IDENTITIES, config, clean)
    assert found.keys() == set(ALL)
    by_branch = branch_losses(batch, IDENTITIES, config)
    assert by_branch.shape == (2, 4)
    expected = {
        "tal_global": by_branch[0, clean].sum(),
        "tal_local": by_branch[1, clean].sum(),
        "cawl": cawl(batch, IDENTITIES, config)[0][clean].mean(),
        "identity": 0.5 * batch.identity_loss[clean].mean(),
        "words": batch.word_loss[clean, 0].sum() / batch.word_loss[clean, 1].sum(),
    }
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value)), name
    everything = loss_terms(batch, IDENTITIES, config)
    for name, value in loss_terms(batch, IDENTITIES, config, torch.ones(4, dtype=torch.bool)).items():
        assert float(value) == pytest.approx(float(everything[name])), name
    none = loss_terms(batch, IDENTITIES, config, torch.zeros(4, dtype=torch.bool))
    assert set(map(float, none.values())) == {0.0}


def test_terms_are_computed_in_fp32_whatever_the_features_are():
    halves = Features(*(value.bfloat16() for value in features()[:6] if value is not None))
    assert {value.dtype for value in loss_terms(halves, IDENTITIES, LossConfig()).values()} == {torch.float32}


def test_the_weighting_loss_without_summaries_says_what_to_set():
    with pytest.raises(ValueError, match="the loss cawl needs summary"):
        loss_terms(features(summary=False), IDENTITIES, LossConfig())
