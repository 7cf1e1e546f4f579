"""`ceca export`: TREC's files give the figures of the evaluation; tar and Parquet files are read again as they were."""

from __future__ import annotations

import json
import tarfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from ceca.config import EvaluateConfig
from ceca.data.changes import hide
from ceca.data.schema import NOBODY
from ceca.data.store import Store
from ceca.datasets.listing import Listing, read_record
from ceca.datasets.records import Record
from ceca.datasets.sources import open_source
from ceca.errors import UserError
from ceca.evaluation.evaluation import Embedded, embedded_sides
from ceca.evaluation.trec import qrel_lines
from ceca.metrics import Matches, RetrievalMetrics, rank_embeddings
from jobs.evaluations.embedding import embed_split
from jobs.export import export_huggingface, export_lance, export_trec, export_webdataset, main
from tests.serve.dataset import draw_person, publish_people, publish_tiny, summarize, taken


def figures_of(run: str, qrels: str) -> dict[str, float]:
    """Rank-1 and mean average precision in percent, as trec_eval computes them: by score, then by document."""
    right, scored = defaultdict(set), defaultdict(list)
    for line in qrels.splitlines():
        query, _, document, relevant = line.split(" ")
        assert relevant == "1"
        right[query].add(document)
    for line in run.splitlines():
        query, q0, document, rank, score, _ = line.split(" ")
        assert q0 == "Q0"
        assert int(rank) == len(scored[query]) + 1
        scored[query].append((float(score), document))
    first, precision = [], []
    for query, relevant in right.items():
        found = [document in relevant for _, document in sorted(scored[query], reverse=True)]
        first.append(found[0])
        hits = np.cumsum(found)
        precision.append(sum(hits[rank] / (rank + 1) for rank, hit in enumerate(found) if hit) / len(relevant))
    return {"rank1": 100 * float(np.mean(first)), "mean_average_precision": 100 * float(np.mean(precision))}


@pytest.mark.usefixtures("without_ray")
def test_a_run_and_its_qrels_give_the_figures_of_the_evaluation(tmp_path: Path):
    store = Store(str(tmp_path / "data"))
    publish_people(store, 17)
    publish_tiny(store, "tiny", seed=0)
    main(["trec", "--data", store.uri, "--model", "tiny", "--out", str(tmp_path / "trec")])
    run, qrels = ((tmp_path / "trec" / name).read_text() for name in ("tiny-test.run", "test.qrels"))
    config = EvaluateConfig(model="tiny")
    texts, images = embedded_sides(config, *embed_split(store, config))
    matches = Matches(texts.identities, images.identities)
    expected = RetrievalMetrics.of(rank_embeddings(texts.pair, images.pair, matches, [0.3])[0.3]).as_dict()
    for name, figure in figures_of(run, qrels).items():
        assert figure == pytest.approx(expected[name], abs=1e-4), name
    asked = dict(line.split("\t") for line in (tmp_path / "trec" / "test.queries.tsv").read_text().splitlines())
    assert len(asked) == 16
    assert all(text.startswith("A person in a ") for text in asked.values())
    export_trec(store.uri, str(tmp_path / "few"), model="tiny", top_k=3)
    assert (tmp_path / "few" / "tiny-test.run").read_text().count("\n") == 16 * 3
    with pytest.raises(UserError, match="--top-k must be at least 1"):
        export_trec(store.uri, str(tmp_path / "few"), top_k=0)


def test_nobody_is_relevant_to_nobody():
    none = (None, None)
    texts, images = Embedded(none, np.array([5, 6])), Embedded(none, np.array([NOBODY, 5, NOBODY, 5]))
    assert list(qrel_lines(texts, images, ["a-0", "b-0"], ["w", "x", "y", "z"])) == ["a-0 0 x 1\n", "a-0 0 z 1\n"]


def read_again(folder: Path) -> list[Record]:
    """The records of nine people without the third, as ingest reads them; their pictures are those that were drawn."""
    source = open_source(str(folder))
    with Listing(source.records()) as listing:
        records = [read_record(line) for unit in listing.cut(100) for line in unit]
        assert not listing.rejects
    numbers = [number for number in range(9) if number != 2]
    assert [(r.identity, r.split, r.camera, r.tracklet) for r in records] == [
        (number // 2, "train" if number == 8 else "test", f"c{number % 3}", f"walk {number // 2}") for number in numbers
    ]
    assert source.read(records) == [draw_person(number) for number in numbers]
    return records


def test_tar_files_hold_what_is_known_and_are_read_again(tmp_path: Path):
    store = Store(str(tmp_path / "data"))
    publish_people(store, 9)
    removed = store.read(store.current("images"), ["image_id"])["image_id"][2].as_py()
    hide(store, [removed])
    main(["webdataset", "--data", store.uri, "--out", str(tmp_path / "out"), "--images-per-file", "3"])
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == [f"people-{number:06}.tar" for number in range(3)]
    with tarfile.open(files[0]) as archive:
        names = archive.getnames()
        known = json.load(archive.extractfile(names[1]))
    assert [name.partition(".")[2] for name in names] == ["jpg", "json", "txt"] * 3
    assert (known["identity"], known["camera"], known["source_path"]) == (0, "c0", "0000.jpg")
    assert known["summary"] == known["captions"][0]

    records = read_again(tmp_path / "out")
    assert all(len(record.captions) == 1 for record in records)

    before = [file.read_bytes() for file in files]
    export_webdataset(store.uri, str(tmp_path / "out"), images_per_file=3)
    assert [file.read_bytes() for file in files] == before
    export_webdataset(store.uri, str(tmp_path / "train"), split="train")
    with tarfile.open(tmp_path / "train" / "people-000000.tar") as archive:
        assert len(archive.getnames()) == 3


def test_parquet_files_for_hugging_face_hold_what_is_known_and_are_read_again(tmp_path: Path):
    store = Store(str(tmp_path / "data"))
    publish_people(store, 9)
    removed = store.read(store.current("images"), ["image_id"])["image_id"][2].as_py()
    hide(store, [removed])
    out = tmp_path / "out"
    main(["huggingface", "--data", store.uri, "--out", str(out), "--images-per-file", "5"])
    assert sorted(path.name for path in (out / "data").iterdir()) == [
        "test-000000.parquet",
        "test-000001.parquet",
        "train-000000.parquet",
    ]
    card = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert card["configs"][0]["data_files"] == [
        {"split": name, "path": f"data/{name}-*.parquet"} for name in ("test", "train")
    ]
    file = pq.ParquetFile(out / "data" / "test-000000.parquet")
    rows = file.read().to_pylist()
    first = dict(rows[0])
    assert first.pop("image") == {"bytes": draw_person(0), "path": f"{first.pop('image_id')}.jpg"}
    texts = {"captions": [summarize(0)], "summary": summarize(0), "tracklet": "walk 0"}
    assert first == {"identity": 0, "camera": "c0", "time": taken(0), "source_path": "0000.jpg", **texts}
    features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == file.schema_arrow.names
    assert features["image"] == {"_type": "Image"}

    read_again(out)

    with pytest.raises(UserError, match="--images-per-file must be at least 1"):
        export_huggingface(store.uri, str(out), images_per_file=0)


def test_a_lance_dataset_holds_what_is_known_and_is_read_again(tmp_path: Path):
    import lance

    store = Store(str(tmp_path / "data"))
    publish_people(store, 9)
    removed = store.read(store.current("images"), ["image_id"])["image_id"][2].as_py()
    hide(store, [removed])
    out = tmp_path / "out.lance"
    main(["lance", "--data", store.uri, "--out", str(out), "--images-per-file", "5"])
    dataset = lance.dataset(out)
    assert [fragment.count_rows() for fragment in dataset.get_fragments()] == [5, 3]
    first = dataset.take([0]).to_pylist()[0]
    assert len(first.pop("image_id")) == 16
    texts = {"captions": [summarize(0)], "summary": summarize(0)}
    known = {
        "identity": 0,
        "split": "test",
        "camera": "c0",
        "time": taken(0),
        "source_path": "0000.jpg",
        "tracklet": "walk 0",
    }
    assert first == {"image": draw_person(0), **known, **texts}

    read_again(out)

    export_lance(store.uri, str(out), split="train")
    assert (lance.dataset(out).count_rows(), lance.dataset(out, version=1).count_rows()) == (1, 8)
