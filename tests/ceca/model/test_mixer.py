"""The local branch: it selects the most important tokens, ignores padding, and starts with a nearly closed gate."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ceca.model.backbone import Tokens
from ceca.model.mixer import Attention, GlobalBatchNorm, MixerBlock, TokenEmbedding, select_tokens

WIDTH = 16


def side(lengths: list[int], seed: int = 0, longest: int | None = None) -> Tokens:
    """Tokens of samples with these lengths, padded with random values that must not matter."""
    source = torch.Generator().manual_seed(seed)
    longest = longest or max(lengths)
    tokens = torch.randn(len(lengths), longest, WIDTH, generator=source)
    importance = torch.rand(len(lengths), longest, generator=source)
    present = torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]
    return Tokens(tokens, importance, present, tokens[:, 0], longest)


def garbled(samples: Tokens) -> Tokens:
    """The same samples with other values in the padding."""
    noise = torch.randn(samples.tokens.shape, generator=torch.Generator().manual_seed(99)) * 100
    absent = ~samples.present
    return Tokens(
        torch.where(absent[..., None], noise, samples.tokens),
        torch.where(absent, torch.full_like(samples.importance, 9.0), samples.importance),
        samples.present,
        samples.summit,
        samples.places,
    )


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    ratio=st.floats(0.05, 1.0),
    seed=st.integers(0, 1000),
)
@example(lengths=[50, 90], ratio=0.3, seed=0)
def test_the_most_important_share_of_each_sample_is_chosen(lengths: list[int], ratio: float, seed: int):
    samples = side(lengths, seed)
    tokens, present = select_tokens(garbled(samples), ratio)
    for row, length in enumerate(lengths):
        kept = length if ratio == 1 else min(length, max(1, math.floor(ratio * max(lengths))))
        order = samples.importance[row, :length].argsort(descending=True)[:kept]
        expected = samples.tokens[row, order] if ratio < 1 else None
        assert int(present[row].sum()) == kept
        if expected is not None:
            torch.testing.assert_close(tokens[row, present[row]], expected)


@pytest.mark.parametrize(
    ("places", "words", "ratio", "kept"),
    [(192, 192, 0.3, 57), (75, 75, 0.3, 22), (75, 30, 0.3, 22), (75, 14, 0.3, 14), (75, 1, 0.3, 1), (75, 40, 0.01, 1)],
)
def test_a_share_is_of_the_towers_places_and_at_most_the_present_tokens(places, words, ratio, kept):
    samples = dataclasses.replace(side([words], longest=max(words, 30)), places=places)
    assert int(select_tokens(samples, ratio)[1].sum()) == kept


def test_a_mixer_starts_near_its_input():
    torch.manual_seed(0)
    block = MixerBlock(WIDTH, 4, gate_start=-3.0)
    own = torch.randn(2, 5, WIDTH)
    present = torch.ones(2, 5, dtype=torch.bool)
    closed = MixerBlock(WIDTH, 4, gate_start=-40.0)
    closed.load_state_dict(block.state_dict() | {"gate": torch.tensor([-40.0])})
    torch.testing.assert_close(closed(own, present, own, present), own)
    opened = MixerBlock(WIDTH, 4, gate_start=0.0)
    opened.load_state_dict(block.state_dict() | {"gate": torch.tensor([40.0])})
    whole = opened(own, present, own, present) - own
    share = 1 / (1 + math.exp(3))
    torch.testing.assert_close(block(own, present, own, present), own + share * whole, rtol=1e-4, atol=1e-5)


def test_padding_of_either_side_changes_nothing():
    torch.manual_seed(0)
    block, embedding = MixerBlock(WIDTH, 4, 0.0), TokenEmbedding(WIDTH, 8).train()
    own, other = side([5, 2, 3]), side([1, 6, 4], seed=1)
    results = []
    for mine, theirs in ((own, other), (garbled(own), garbled(other))):
        mixed = block(mine.tokens, mine.present, theirs.tokens, theirs.present)
        results.append((mixed[own.present], embedding(mixed, mine.present)))
    torch.testing.assert_close(results[0], results[1])


def test_a_longer_padding_changes_nothing():
    torch.manual_seed(0)
    embedding = TokenEmbedding(WIDTH, 8).train()
    tokens = side([5, 2]).tokens
    padded = torch.cat([tokens, torch.full((2, 7, WIDTH), 1e3)], dim=1)
    present = torch.arange(5)[None, :] < torch.tensor([[5], [2]])
    longer = F.pad(present, (0, 7))
    torch.testing.assert_close(embedding(padded, longer), embedding(tokens, present))


def test_without_a_condition_there_is_no_cross_attention():
    torch.manual_seed(0)
    block = MixerBlock(WIDTH, 4, 0.0)
    own = side([4, 4])
    before = block(own.tokens, own.present)
    torch.nn.init.normal_(block.cross_attention.out.weight)
    torch.testing.assert_close(block(own.tokens, own.present), before)


def test_attention_is_pytorchs_multi_head_attention():
    torch.manual_seed(0)
    ours, theirs = Attention(WIDTH, 4), torch.nn.MultiheadAttention(WIDTH, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    query, source = side([6, 6]), side([3, 5], seed=1)
    expected, _ = theirs(query.tokens, source.tokens, source.tokens, key_padding_mask=~source.present)
    torch.testing.assert_close(ours(query.tokens, source.tokens, source.present), expected)


def test_a_width_that_is_not_a_multiple_of_the_heads_is_refused():
    with pytest.raises(ValueError, match="mixer width 16 must be a multiple of its heads 5"):
        Attention(WIDTH, 5)


def test_batch_normalisation_is_pytorchs_over_the_present_tokens():
    ours, theirs = GlobalBatchNorm(WIDTH), torch.nn.BatchNorm1d(WIDTH)
    for seed in range(3):
        samples = garbled(side([5, 1, 3], seed))
        normalised = ours(samples.tokens, samples.present)[samples.present]
        torch.testing.assert_close(normalised, theirs(samples.tokens[samples.present]))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    samples = side([4, 2], 7)
    normalised = ours(samples.tokens, samples.present)[samples.present]
    torch.testing.assert_close(normalised, theirs(samples.tokens[samples.present]))


def test_pooling_is_the_maximum_over_the_present_tokens():
    torch.manual_seed(0)
    embedding = TokenEmbedding(WIDTH, 8).eval()
    samples = side([5, 2])
    pooled = embedding(samples.tokens, samples.present)
    for row, length in enumerate([5, 2]):
        own = samples.tokens[row : row + 1, :length]
        present = torch.ones(1, length, dtype=torch.bool)
        per_token = torch.cat([embedding(own[:, i : i + 1], present[:, i : i + 1]) for i in range(length)])
        torch.testing.assert_close(pooled[row], per_token.amax(dim=0))
