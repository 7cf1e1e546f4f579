"""The order of an epoch, and the pairs that lend their captions and summaries."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ceca.training.order import (
    Batches,
    Portion,
    epoch_order,
    epoch_pairs,
    epoch_partners,
    published_noise,
    shuffled_captions,
)


@settings(deadline=None)
@given(pairs=st.integers(1, 500), seed=st.integers(0, 100), epoch=st.integers(0, 100))
def test_an_epoch_visits_every_pair_once_in_an_order_of_its_own(pairs: int, seed: int, epoch: int):
    people = np.arange(pairs) // 3
    order = epoch_order(people, seed, epoch)
    assert sorted(order) == list(range(pairs))
    assert np.array_equal(order, epoch_order(people, seed, epoch))
    if pairs > 20:
        assert not np.array_equal(order, epoch_order(people, seed, epoch + 1))
        assert not np.array_equal(order, epoch_order(people, seed + 1, epoch))


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=3), seed=st.integers(0, 50), epochs=st.integers(1, 6),
    data=st.data(),
)  # fmt: skip
def test_an_epoch_takes_each_sets_portion_and_every_pair_of_it_equally_often(sizes, seed: int, epochs: int, data):
    portions = [Portion.of(size, data.draw(st.sampled_from([0.1, 0.5, 0.8, 1.0, 1.5, 3.0]))) for size in sizes]
    visits = np.zeros(sum(sizes), int)
    for epoch in range(epochs):
        pairs = epoch_pairs(portions, seed, epoch)
        assert np.array_equal(pairs, epoch_pairs(portions, seed, epoch))
        np.add.at(visits, pairs, 1)
    for portion, of_set in zip(portions, np.split(visits, np.cumsum(sizes)[:-1]), strict=True):
        assert of_set.sum() == epochs * portion.taken
        assert np.ptp(of_set) <= 1


def test_a_weight_is_how_often_a_pair_is_visited():
    assert Portion.of(10, 0.5) == Portion(10, 5)
    assert Portion.of(10, 2.0) == Portion(10, 20)
    assert Portion.of(3, 0.01) == Portion(3, 1)  # at least one
    halves = [epoch_pairs([Portion(4, 4), Portion(6, 3)], 0, epoch) for epoch in range(2)]
    assert all(pairs[:4].tolist() == [0, 1, 2, 3] for pairs in halves)  # as if it were the only set
    assert sorted([*halves[0][4:], *halves[1][4:]]) == [4, 5, 6, 7, 8, 9]


identities = st.lists(st.integers(0, 8), min_size=1, max_size=60).map(np.array)


@settings(deadline=None)
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


@settings(deadline=None)
@given(people=identities, seed=st.integers(0, 50))
def test_a_swapped_summary_is_of_another_image_of_the_same_identity_where_there_is_one(people, seed: int):
    images = np.arange(len(people)) // 2 * 10  # two captions each, if both describe one person
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


@settings(deadline=None)
@given(pairs=st.integers(1, 300), seed=st.integers(0, 20), noise=st.sampled_from([0.0, 0.2, 0.5, 0.8]))
def test_noisy_correspondence_exchanges_captions_among_a_seeded_share_of_the_pairs(pairs: int, seed: int, noise: float):
    source = shuffled_captions(pairs, seed, noise)
    assert sorted(source) == list(range(pairs))
    assert np.sum(source != np.arange(pairs)) <= round(noise * pairs)
    assert np.array_equal(source, shuffled_captions(pairs, seed, noise))


def as_file(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, value, **options)
    return file.getvalue()


def test_a_published_index_file_says_whose_caption_a_pair_gets():
    assert published_noise(as_file(np.array([0, 2, 1, 3], np.int32)), 4).tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not a NumPy file"),
        (b"0,2,1,3", "not a NumPy file"),
        (as_file(np.array([{}, print], object), allow_pickle=True), "not a NumPy file"),
        (as_file(np.array([0.0, 2.5, 1.0, 3.0])), "one whole number per pair"),
        (as_file(np.zeros((4, 4), int)), "one whole number per pair"),
        (as_file(np.arange(5)), "5 numbers and this split 4 pairs"),
        (as_file(np.array([0, 1, 2, 4])), "from 0 to 3, found 0 to 4"),
        (as_file(np.array([0, 1, 2, -1])), "from 0 to 3, found -1 to 2"),
    ],
    ids=["empty", "text", "objects", "fractions", "matrix", "another benchmark", "too large", "negative"],
)
def test_another_file_is_refused_and_runs_no_code(content: bytes, problem: str):
    with pytest.raises(ValueError, match=problem):
        published_noise(content, 4)


@settings(max_examples=40)
@given(pairs=st.integers(1, 200), batch=st.integers(1, 30), workers=st.integers(1, 9), keep=st.booleans())
def test_workers_share_every_batch_of_an_epoch_and_the_last_one_is_kept_or_dropped(
    pairs: int, batch: int, workers: int, keep: bool
):
    batches = Batches(pairs, batch, keep)
    steps = [[p for rank in range(workers) for p in batches.places(s, rank, workers)] for s in range(len(batches))]
    assert [place for step in steps for place in step] == list(range(batches.samples))
    assert [len(step) for step in steps] == [batches.size(step) for step in range(len(batches))]
    full, rest = divmod(pairs, batch)
    assert [len(step) for step in steps] == [batch] * full + ([rest] if keep and rest else [])
