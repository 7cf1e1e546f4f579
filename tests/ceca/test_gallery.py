"""A gallery whose images take part of their neighbours' embeddings."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ceca.gallery import agree_with_neighbours


def unit(*rows: list[float]) -> torch.Tensor:
    return F.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)


def test_an_image_takes_half_of_its_nearest_by_the_fused_similarity():
    whole = unit([1, 0], [1, 0.1], [0, 1], [0.1, 1])
    local = unit([1, 0, 0], [1, 0, 0.1], [0, 1, 0], [0, 1, 0.1])
    found = agree_with_neighbours((whole, local), 1, 0.3)
    for part, new in zip((whole, local), found, strict=True):
        expected = F.normalize(part + 0.5 * part[[1, 0, 3, 2]], dim=1)
        torch.testing.assert_close(new, expected)


def test_the_local_similarity_decides_as_much_as_omega_says():
    whole, local = unit([1, 0], [1, 0.2], [1, 0.4]), unit([1, 0], [0, 1], [1, 0.1])
    near_whole, near_local = (agree_with_neighbours((whole, local), 1, omega)[0][0] for omega in (0.0, 1.0))
    torch.testing.assert_close(near_whole, F.normalize(whole[0] + 0.5 * whole[1], dim=0))
    torch.testing.assert_close(near_local, F.normalize(whole[0] + 0.5 * whole[2], dim=0))


def test_nearer_neighbours_give_more_by_the_softmax_of_their_similarity():
    whole = unit([1, 0], [3, 4], [4, 3])  # cosines 0.6 and 0.8 to the first
    found, _ = agree_with_neighbours((whole, whole), 2, 0.3, weight=0.5, temperature=0.1)
    near = 1 / (1 + math.exp(-2))  # exp(8) / (exp(8) + exp(6))
    torch.testing.assert_close(found[0], F.normalize(whole[0] + 0.5 * (near * whole[2] + (1 - near) * whole[1]), dim=0))


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_change_nothing_and_embeddings_stay_normalised(chunk: int):
    source = torch.Generator().manual_seed(0)
    gallery = tuple(F.normalize(torch.randn(10, width, generator=source), dim=1) for width in (4, 6))
    found = agree_with_neighbours(gallery, 3, 0.3, chunk=chunk)
    for new, whole in zip(found, agree_with_neighbours(gallery, 3, 0.3), strict=True):
        torch.testing.assert_close(new, whole)
        torch.testing.assert_close(new.norm(dim=1), torch.ones(10))


def test_a_gallery_of_one_image_has_nobody_to_ask():
    alone = (unit([1, 2]), unit([3, 4]))
    for new, old in zip(agree_with_neighbours(alone, 3, 0.3), alone, strict=True):
        assert torch.equal(new, old)
