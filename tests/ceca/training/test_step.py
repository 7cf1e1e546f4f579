"""What a training step is made of, whatever runs it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from ceca.config import LossConfig, ModelConfig, OptimiserConfig
from ceca.losses import triplet_alignment_loss
from ceca.model.backbone import tokenize
from ceca.model.ceca import CECA, Features
from ceca.training.flops import step_flops
from ceca.training.optimiser import parameter_groups, rate_factor
from ceca.training.order import epoch_order, epoch_partners, shuffled_captions
from ceca.training.step import better, cosine, loss_terms
from ceca.training.workers import batch_slice

SMALL = ModelConfig(backbone="ceca-tiny", image_height=32, image_width=32, mixer_heads=4, local_dim=32)


@given(pairs=st.integers(1, 500), seed=st.integers(0, 100), epoch=st.integers(0, 100))
def test_an_epoch_visits_every_pair_once_in_an_order_of_its_own(pairs: int, seed: int, epoch: int):
    people = np.arange(pairs) // 3
    order = epoch_order(people, seed, epoch)
    assert sorted(order) == list(range(pairs))
    assert np.array_equal(order, epoch_order(people, seed, epoch))
    if pairs > 20:
        assert not np.array_equal(order, epoch_order(people, seed, epoch + 1))
        assert not np.array_equal(order, epoch_order(people, seed + 1, epoch))


identities = st.lists(st.integers(0, 8), min_size=1, max_size=60).map(np.array)


@given(people=identities, group=st.integers(2, 4), seed=st.integers(0, 50))
def test_a_balanced_order_visits_every_pair_once_those_of_an_identity_a_group_at_a_time(people, group: int, seed: int):
    order = epoch_order(people, seed, 0, group)
    assert sorted(order) == list(range(len(people)))
    place = 0
    left = {person: int((people == person).sum()) for person in set(people.tolist())}
    while place < len(order):
        person = int(people[order[place]])
        taken = min(group, left[person])
        assert (people[order[place : place + taken]] == person).all()
        left[person] -= taken
        place += taken


@given(people=identities, seed=st.integers(0, 50))
def test_a_swapped_summary_is_of_another_image_of_the_same_identity_where_there_is_one(people, seed: int):
    images = np.arange(len(people)) // 2 * 10  # of two captions each, where both are of one person
    partners = epoch_partners(people, images, seed, 0, 1.0, "summaries")
    for pair, partner in enumerate(partners):
        others = (people == people[pair]) & (images != images[pair])
        assert others[partner] if others.any() else partner == pair
    assert np.array_equal(epoch_partners(people, images, seed, 0, 0.0, "captions"), np.arange(len(people)))


def test_about_the_wanted_share_of_summaries_is_swapped_and_differently_every_epoch():
    people, images = np.arange(4000) // 8, np.arange(4000) // 2
    partners = [epoch_partners(people, images, 3, epoch, 0.3, "captions") for epoch in (0, 1)]
    assert np.mean(partners[0] != np.arange(4000)) == pytest.approx(0.3, abs=0.03)
    assert not np.array_equal(*partners)


@given(pairs=st.integers(1, 300), seed=st.integers(0, 20), noise=st.sampled_from([0.0, 0.2, 0.5, 0.8]))
def test_noisy_correspondence_exchanges_captions_among_a_seeded_share_of_the_pairs(pairs: int, seed: int, noise: float):
    source = shuffled_captions(pairs, seed, noise)
    assert sorted(source) == list(range(pairs))
    assert np.sum(source != np.arange(pairs)) <= round(noise * pairs)
    assert np.array_equal(source, shuffled_captions(pairs, seed, noise))


@given(batch=st.integers(1, 200), size=st.integers(1, 16))
def test_slices_of_a_batch_cover_it_and_differ_by_one_at_most(batch: int, size: int):
    rows = [batch_slice(rank, size, batch) for rank in range(size)]
    assert [n for part in rows for n in range(batch)[part]] == list(range(batch))
    lengths = {part.stop - part.start for part in rows}
    assert max(lengths) - min(lengths) <= 1


def test_rates_warm_up_linearly_then_fall_as_a_cosine():
    def factor(step: int) -> float:
        return rate_factor(step, warmup=10, total=110, start=0.1)

    assert factor(0) == pytest.approx(0.1)
    assert factor(5) == pytest.approx(0.55)
    assert factor(10) == pytest.approx(1.0)
    assert factor(60) == pytest.approx(0.5)
    assert factor(35) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert factor(110) == pytest.approx(0.0)
    assert rate_factor(0, warmup=0, total=10, start=0.1) == 1.0


def test_clip_and_new_modules_their_biases_apart_have_the_published_rates():
    model = CECA(SMALL)
    config = OptimiserConfig(learning_rate=1e-5, new_learning_rate=1e-3, weight_decay=4e-5)
    groups = parameter_groups(model, config)
    of = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(of) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    named = dict(model.named_parameters())
    assert of[id(named["backbone.clip.visual.proj"])] == (1e-5, 4e-5)
    assert of[id(named["backbone.clip.visual.ln_post.bias"])] == (2e-5, 0.0)
    assert of[id(named["visual_mixer.gate"])] == (1e-3, 4e-5)
    assert of[id(named["textual_embedding.linear.bias"])] == (1e-3, 0.0)


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
        expected = triplet_alignment_loss(cosine(text, visual), IDENTITIES, temperature=0.015, margin=0.1).sum()
        assert float(terms[name]) == pytest.approx(float(expected))


def test_terms_are_computed_in_fp32_whatever_the_features_are():
    halves = Features(*(value.bfloat16() for value in features()[:6] if value is not None))
    assert {value.dtype for value in loss_terms(halves, IDENTITIES, LossConfig()).values()} == {torch.float32}


def test_the_weighting_loss_without_summaries_says_what_to_set():
    with pytest.raises(ValueError, match="the loss cawl needs summary"):
        loss_terms(features(summary=False), IDENTITIES, LossConfig())


def test_a_better_epoch_has_a_higher_rank_1_or_the_same_and_a_higher_map():
    keys = ("rank1", "map")
    best = {"rank1": 50.0, "map": 40.0}
    assert better(best, None, keys)
    assert not better(best, best, keys)
    assert better({"rank1": 50.1, "map": 1.0}, best, keys)
    assert better({"rank1": 50.0, "map": 40.1}, best, keys)
    assert not better({"rank1": 49.9, "map": 99.0}, best, keys)


def test_the_operations_of_a_step_are_those_that_torch_counts():
    config = dataclasses.replace(SMALL, image_height=64, image_width=32)
    model = CECA(config).train()
    captions, summaries = (
        tokenize(["a man in a red coat", "a woman"]),
        tokenize(["a tall man in a coat", "a woman, alone"]),
    )
    tokens = int(sum((ids.argmax(dim=1) + 1).sum() for ids in (captions, summaries)))
    with FlopCounterMode(display=False) as counter:
        features = model(torch.randn(2, 3, 64, 32), captions, summaries)
        sum(value.sum() for value in features if value is not None).backward()
    assert step_flops(config, 2, tokens) == pytest.approx(counter.get_total_flops(), rel=0.1)
