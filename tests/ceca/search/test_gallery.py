"""Searching a gallery in memory, and averaging embeddings with those of the nearest images."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from ceca.data import schema
from ceca.data.keys import spelled
from ceca.data.store import Part, Receipt, Store
from ceca.metrics import PER_QUERY, Matches, rank_embeddings
from ceca.search.agreement import agree_with_neighbours
from ceca.search.edition import Edition
from ceca.search.gallery import Gallery, open_gallery
from ceca.search.sketches import sketch_all


def unit(*rows: list[float]) -> torch.Tensor:
    return F.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)


def test_an_image_takes_half_of_its_nearest_by_the_fused_similarity():
    whole = unit([1, 0], [1, 0.1], [0, 1], [0.1, 1])
    local = unit([1, 0, 0], [1, 0, 0.1], [0, 1, 0], [0, 1, 0.1])
    averaged = agree_with_neighbours((whole, local), 1, 0.3)
    for part, new in zip((whole, local), averaged, strict=True):
        expected = F.normalize(part + 0.5 * part[[1, 0, 3, 2]], dim=1)
        torch.testing.assert_close(new, expected)


def test_the_local_similarity_decides_as_much_as_omega_says():
    whole, local = unit([1, 0], [1, 0.2], [1, 0.4]), unit([1, 0], [0, 1], [1, 0.1])
    near_whole, near_local = (agree_with_neighbours((whole, local), 1, omega)[0][0] for omega in (0.0, 1.0))
    torch.testing.assert_close(near_whole, F.normalize(whole[0] + 0.5 * whole[1], dim=0))
    torch.testing.assert_close(near_local, F.normalize(whole[0] + 0.5 * whole[2], dim=0))


def test_nearer_neighbours_give_more_by_the_softmax_of_their_similarity():
    whole = unit([1, 0], [3, 4], [4, 3])  # cosines 0.6 and 0.8 to the first
    averaged, _ = agree_with_neighbours((whole, whole), 2, 0.3, weight=0.5, temperature=0.1)
    near = 1 / (1 + math.exp(-2))  # exp(8) / (exp(8) + exp(6))
    torch.testing.assert_close(
        averaged[0], F.normalize(whole[0] + 0.5 * (near * whole[2] + (1 - near) * whole[1]), dim=0)
    )


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_change_nothing_and_embeddings_stay_normalised(chunk: int):
    source = torch.Generator().manual_seed(0)
    gallery = tuple(F.normalize(torch.randn(10, width, generator=source), dim=1) for width in (4, 6))
    averaged = agree_with_neighbours(gallery, 3, 0.3, chunk=chunk)
    for new, whole in zip(averaged, agree_with_neighbours(gallery, 3, 0.3), strict=True):
        torch.testing.assert_close(new, whole)
        torch.testing.assert_close(new.norm(dim=1), torch.ones(10))


def test_a_gallery_of_one_image_has_nobody_to_ask():
    alone = (unit([1, 2]), unit([3, 4]))
    for new, old in zip(agree_with_neighbours(alone, 3, 0.3), alone, strict=True):
        assert torch.equal(new, old)


# --- search -----------------------------------------------------------------------------------------------


def random_pairs(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return tuple(F.normalize(torch.randn(count, width, generator=source), dim=1) for width in (8, 16))


def test_every_query_of_a_batch_has_its_own_omega_and_its_parts_make_its_similarity():
    whole, local = random_pairs(50, 0)
    rows = torch.cat([whole, local], dim=1).half()
    gallery = Gallery(np.arange(50, dtype=np.uint64), np.arange(50), rows.split(20), 8)
    queries, omegas = random_pairs(3, 1), [0.0, 0.3, 1.0]
    for q, hits in enumerate(gallery.search(*queries, omega=omegas, top_k=5)):
        parts = [rows[:, :8].float() @ queries[0][q], rows[:, 8:].float() @ queries[1][q]]
        fused = (1 - omegas[q]) * parts[0] + omegas[q] * parts[1]
        best = fused.argsort(descending=True)[:5].tolist()
        assert [hit.identity for hit in hits] == best
        for hit, row in zip(hits, best, strict=True):
            similarities = (hit.similarity, hit.global_similarity, hit.local_similarity)
            assert similarities == pytest.approx(
                (float(fused[row]), float(parts[0][row]), float(parts[1][row])), abs=1e-5
            )


def test_a_filter_applies_before_the_best_are_taken():
    whole, local = random_pairs(50, 0)
    gallery = Gallery(np.arange(50, dtype=np.uint64), np.arange(50), [torch.cat([whole, local], dim=1).half()], 8)
    allowed = torch.arange(50) % 10 == 3
    (hits,) = gallery.search(*random_pairs(1, 1), omega=0.3, top_k=10, allowed=allowed)
    assert sorted(hit.identity for hit in hits) == [3, 13, 23, 33, 43]  # all that may be found, though 10 were wanted


def test_a_search_ranks_again_as_an_evaluation_does():
    gallery_pair, queries = random_pairs(60, 0), random_pairs(4, 1)
    rows = torch.cat(gallery_pair, dim=1).half()
    halves = tuple(part.float() for part in rows.split([8, 16], dim=1))
    gallery = Gallery(np.arange(60, dtype=np.uint64), np.arange(60), rows.split(20), 8)
    matches = Matches(np.arange(4), np.arange(60))
    firsts = rank_embeddings(queries, halves, matches, [0.3], rerank_first=20)[0.3][:, PER_QUERY.index("first")]
    answers = gallery.search(*queries, omega=0.3, top_k=60, rerank_first=20)
    for q, hits in enumerate(answers):
        assert [hit.identity for hit in hits].index(q) + 1 == firsts[q]
    plain = gallery.search(*queries, omega=0.3, top_k=60)
    assert {hit.image_id for hit in answers[0][:20]} == {hit.image_id for hit in plain[0][:20]}
    assert [hit.image_id for hit in answers[0][20:]] == [hit.image_id for hit in plain[0][20:]]
    assert [hit.image_id for hit in answers[0][:20]] != [hit.image_id for hit in plain[0][:20]]
    few = gallery.search(*queries, omega=0.3, top_k=3, rerank_first=20)
    assert few == [hits[:3] for hits in answers]


def published(place: Path, pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[Store, list[Part]]:
    """A dataset with a gallery of two parts."""
    count = len(pair[0])
    columns = {
        "image_id": spelled(np.arange(count, dtype=np.uint64)),
        "identity": list(range(count)),
        "split": ["test"] * count,
        "global": list(pair[0].numpy().astype(np.float16)),
        "local": list(pair[1].numpy().astype(np.float16)),
        "model_digest": ["made-up"] * count,
    }
    table = pa.table(columns, schema=schema.gallery(8, 16))
    store = Store(str(place))
    parts = [store.write_part("gallery", "v1", n, table.slice(start, 20)) for n, start in enumerate((0, 20))]
    receipts = [Receipt({"gallery": part}) for part in parts]
    store.publish("index", "v1", ("gallery",), receipts, made_from={"model": "made-up"}, config={}, notes={})
    edition = Edition(store.uri, "made-up", "made-up", 8, "v1", images="", dialogues=None, added=(), removed=())
    return edition, parts


def test_a_gallery_opens_from_its_table_and_the_next_time_from_files_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("CECA_CACHE", str(tmp_path / "cache"))
    pair = random_pairs(30, 0)
    edition, parts = published(tmp_path / "data", pair)
    for _ in range(2):
        gallery = open_gallery(edition)
        assert [len(shard) for shard in gallery.rows.shards] == [20, 10]
        assert torch.equal(torch.cat(gallery.rows.shards), torch.cat(pair, dim=1).half())
        assert gallery.global_dim == 8
        files = sorted((tmp_path / "cache" / "shards").glob("*/*"))
        assert [file.name for file in files] == sorted(
            f"{part.sha256}{kind}.npy" for part in parts for kind in ("", ".bounds", ".codes", ".named")
        )


def test_shards_that_are_old_or_that_nobody_opened_for_a_month_leave_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("CECA_CACHE", str(tmp_path))
    edition, parts = published(tmp_path / "data", random_pairs(30, 0))
    open_gallery(edition)
    (folder,) = (tmp_path / "shards").iterdir()
    other = tmp_path / "shards" / "another-dataset"
    other.mkdir()
    for kind in ("", ".codes", ".bounds", ".named"):
        (folder / f"of-a-part-written-anew{kind}.npy").touch()  # it may hold images that were erased
    for path in (other / "forgotten.npy", folder / f"{parts[0].sha256}.npy"):
        path.touch()
        os.utime(path, (0, 0))
    (other / "used.npy").touch()
    gallery = open_gallery(edition)
    assert {path.name.partition(".")[0] for path in folder.iterdir()} == {part.sha256 for part in parts}
    assert [path.name for path in other.iterdir()] == ["used.npy"]
    assert len(gallery) == 30


def test_views_agree_in_a_gallery_that_is_opened_so(tmp_path, monkeypatch):
    monkeypatch.setenv("CECA_CACHE", str(tmp_path / "cache"))
    pair = random_pairs(30, 0)
    edition, _ = published(tmp_path / "data", pair)
    (rows,) = open_gallery(edition, neighbours=3).rows.shards
    torch.testing.assert_close(rows.float(), torch.cat(agree_with_neighbours(pair, 3, 0.3), dim=1), rtol=0, atol=2e-3)
    assert not torch.equal(rows, torch.cat(open_gallery(edition).rows.shards))


def test_sketches_are_a_file_of_this_machine_made_anew_when_the_parts_change(tmp_path, monkeypatch):
    monkeypatch.setenv("CECA_CACHE", str(tmp_path / "cache"))
    edition, parts = published(tmp_path / "data", random_pairs(30, 0))
    queries = random_pairs(2, 1)
    exact = open_gallery(edition).search(*queries, omega=0.3, top_k=5)
    (folder,) = (tmp_path / "cache" / "shards").iterdir()
    (folder / f"{parts[0].sha256}.of-other-parts.sketches.npy").touch()
    made = []
    for _ in range(2):
        gallery = open_gallery(edition, approximate=1.0)
        assert gallery.search(*queries, omega=0.3, top_k=5) == exact
        (file,) = folder.glob("*.sketches.npy")
        made.append(file.stat().st_ino)
        rows = gallery.rows
        again = sketch_all(rows)
        assert np.array_equal(gallery.sketches.directions, again.directions)
        assert np.array_equal(np.concatenate(gallery.sketches.codes), np.concatenate(again.codes))
    assert made[0] == made[1]  # the second time it was read
    open_gallery(edition)
    assert file.exists()  # an exact search leaves it for the next approximate one
    for number in (0, 1):  # each shard has its own
        assert len(open_gallery(edition, shard=(number, 2), approximate=1.0).sketches.codes[0]) == (20, 10)[number]
    assert open_gallery(edition, shard=(2, 3), approximate=1.0).search(*queries, omega=0.3, top_k=5) == [[], []]


def test_an_approximate_search_looks_at_averaged_rows_where_views_agree(tmp_path, monkeypatch):
    monkeypatch.setenv("CECA_CACHE", str(tmp_path / "cache"))
    edition, _ = published(tmp_path / "data", random_pairs(30, 0))
    queries = random_pairs(2, 1)
    near = open_gallery(edition, neighbours=3, approximate=1.0)
    exact = open_gallery(edition, neighbours=3)
    assert near.search(*queries, omega=0.3, top_k=5) == exact.search(*queries, omega=0.3, top_k=5)
    assert np.array_equal(near.sketches.codes[0], sketch_all(exact.rows).codes[0])
    assert not list((tmp_path / "cache").rglob("*.sketches.npy"))
