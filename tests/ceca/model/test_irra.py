"""IRRA's heads against a plain restatement of its description (method: The IRRA baseline), sample by sample."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ceca.config import LossConfig, OptimiserConfig
from ceca.model.backbone import Tokens
from ceca.model.ceca import Features
from ceca.model.irra import IRRAHeads, WordTask
from ceca.training.augment import Draws, draw, generator, hide_words
from ceca.training.optimiser import parameter_groups
from ceca.training.step import loss_terms

WIDTH, HEADS, PEOPLE, VOCABULARY = 16, 4, 5, 60
END, MASK = 59, 58


def attend(query: Tensor, source: Tensor, q: nn.Linear, k: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor]) -> Tensor:
    """Multi-head attention of [N, D] to [M, D], a head and a query at a time, before the output layer."""
    queries = q(query).view(len(query), HEADS, -1)
    keys, values = (F.linear(source, *part).view(len(source), HEADS, -1) for part in (k, v))
    rows = []
    for n in range(len(query)):
        parts = []
        for h in range(HEADS):
            weights = torch.softmax(keys[:, h] @ queries[n, h] / math.sqrt(WIDTH / HEADS), dim=0)
            parts.append(weights @ values[:, h])
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def restated_word_losses(heads: IRRAHeads, text: Tensor, image: Tensor, hidden: dict[int, int]) -> list[Tensor]:
    """Cross-entropies of one sample: text [N, D] from start to end, image [1 + P, D] with its class token."""
    x, seen = heads.text_norm(text), heads.image_norm(image)
    cross = heads.cross_attention
    weights, biases = cross.key_value.weight.chunk(2), cross.key_value.bias.chunk(2)
    x = cross.out(attend(x, seen, cross.query, (weights[0], biases[0]), (weights[1], biases[1])))
    for layer in heads.layers.layers:
        normed, own = layer.norm1(x), layer.self_attn
        w, b = own.in_proj_weight.chunk(3), own.in_proj_bias.chunk(3)
        q = nn.Linear(WIDTH, WIDTH)
        q.weight, q.bias = nn.Parameter(w[0]), nn.Parameter(b[0])
        x = x + own.out_proj(attend(normed, normed, q, (w[1], b[1]), (w[2], b[2])))
        x = x + layer.linear2(quick_gelu(layer.linear1(layer.norm2(x))))
    x = heads.layers.norm(x)
    first, _, norm, last = heads.decoder
    logits = last(norm(quick_gelu(first(x))))
    return [F.cross_entropy(logits[place][None], torch.tensor([token])) for place, token in hidden.items()]


@pytest.mark.parametrize("seed", range(3))
def test_masked_words_are_predicted_as_described(seed):
    torch.manual_seed(seed)
    heads = IRRAHeads(WIDTH, HEADS, PEOPLE, VOCABULARY)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.3)
    lengths = [7, 4, 3]  # with start and end
    longest, patches = max(lengths), 6
    positions = torch.arange(longest)
    inside = positions[None] < torch.tensor(lengths)[:, None]
    present = inside & (positions > 0) & (positions[None] < torch.tensor(lengths)[:, None] - 1)
    tokens, image = torch.randn(3, longest, WIDTH), torch.randn(3, 1 + patches, WIDTH)
    text = Tokens(tokens, torch.rand(3, longest), present, tokens[:, 0], 75, inside)
    whole = torch.ones(3, patches, dtype=torch.bool)
    picture = Tokens(image[:, 1:], torch.rand(3, patches), whole, image[:, 0], patches)
    hidden = [{1: 7, 3: 9}, {2: 4}, {1: 30}]
    places = torch.tensor([row * longest + place for row, own in enumerate(hidden) for place in own])
    task = WordTask(torch.zeros(3, longest, dtype=torch.long), places, torch.tensor([7, 9, 4, 30]))
    sums = heads.word_loss(text, picture, task)
    for row, own in enumerate(hidden):
        expected = restated_word_losses(heads, tokens[row, : lengths[row]], image[row], own)
        assert sums[row, 0].item() == pytest.approx(sum(expected).item(), rel=1e-4)
        assert sums[row, 1] == len(own)


def test_the_identity_loss_is_the_mean_of_both_cross_entropies():
    torch.manual_seed(0)
    heads = IRRAHeads(WIDTH, HEADS, PEOPLE, VOCABULARY)
    nn.init.normal_(heads.classifier.weight)
    image, text, labels = torch.randn(4, WIDTH), torch.randn(4, WIDTH), torch.tensor([0, 4, 4, 2])
    features = Features(image, text, None, image, identity_loss=heads.identity_loss(image, text, labels))
    term = loss_terms(features, labels, LossConfig(terms=("identity",)))["identity"]
    both = [F.cross_entropy(heads.classifier(side), labels) for side in (image, text)]
    assert term.item() == pytest.approx(0.5 * sum(both).item(), rel=1e-5)


def test_the_classifier_starts_as_good_as_nothing():
    heads = IRRAHeads(512, 8, 1000, 10)
    assert heads.classifier.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert not heads.classifier.bias.any()


def untouched(batch: int, length: int) -> Draws:
    """Draws that hide no word."""
    import dataclasses

    made = draw(batch, length, generator(0))
    return dataclasses.replace(made, touch=torch.ones(batch, length), change=torch.zeros(batch, length))


def test_every_text_with_a_word_has_one_hidden():
    ids = torch.tensor([[49406, 5, 6, 49407, 0], [49406, 49407, 0, 0, 0], [49406, 8, 49407, 0, 0]])
    task = hide_words(ids, untouched(3, 5))
    assert task.places.tolist() == [1, 11]  # the first words; the second text has none
    assert task.targets.tolist() == [5, 8]


def test_rates_of_the_heads():
    """5 times the base rate, but 2 times for biases of the cross layers, and LayerNorms around them as CLIP's."""
    heads = nn.ModuleDict({"heads": IRRAHeads(WIDTH, HEADS, PEOPLE, VOCABULARY)})
    config = OptimiserConfig(learning_rate=1e-5, new_learning_rate=5e-5)
    names = {id(parameter): name for name, parameter in heads.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in parameter_groups(heads, config) for p in group["params"]}
    assert rates["heads.classifier.weight"] == rates["heads.classifier.bias"] == 5e-5
    assert rates["heads.decoder.0.weight"] == rates["heads.decoder.3.bias"] == 5e-5
    assert rates["heads.cross_attention.query.weight"] == rates["heads.layers.layers.0.linear1.weight"] == 5e-5
    assert rates["heads.cross_attention.out.bias"] == rates["heads.layers.layers.3.self_attn.in_proj_bias"] == 2e-5
    for norm in ("text_norm", "image_norm", "layers.norm"):
        assert (rates[f"heads.{norm}.weight"], rates[f"heads.{norm}.bias"]) == (1e-5, 2e-5)
