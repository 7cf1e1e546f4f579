"""Published datasets without counts, each as a small set in its own form."""

from __future__ import annotations

import json
from pathlib import Path

from ceca.data.schema import NOBODY
from tests.ceca.datasets.test_sources import listed, picture, pictures


def test_ufine6926(tmp_path: Path):
    pictures(tmp_path, "images/1.jpg")
    item = {"split": "train", "id": 1, "file_path": "images/1.jpg", "captions": ["a", "b"]}
    (tmp_path / "anything.json").write_text(json.dumps([item]))
    records, _, contents = listed(tmp_path, "ufine6926")
    assert (records["images/1.jpg"].identity, records["images/1.jpg"].split) == (1, "train")
    assert contents == [picture(0)]
    (tmp_path / "anything.json").rename(tmp_path / "UFine6926.json")
    assert listed(tmp_path)[0] == records


def test_synth_pedes(tmp_path: Path):
    pictures(tmp_path, "Part1/7/1.jpg")
    item = {
        "id": 7,
        "file_path": "Part1/7/1.jpg",
        "attributes": ["man"],
        "captions": ["a", "b"],
        "prompt_caption": ["c"],
    }
    (tmp_path / "synthpedes-dataset.json").write_text(json.dumps([item]))
    (record,), _, contents = (lambda found: (found[0].values(), *found[1:]))(listed(tmp_path, share=(1, 0, 0)))
    assert (record.identity, record.split, [text for _, text in record.captions]) == (7, "train", ["a", "b"])
    assert contents == [picture(0)]


def test_mals_and_the_files_of_its_authors(tmp_path: Path):
    images = pictures(tmp_path / "images", "gene_crop/4x/0.jpg", "gene_crop/4x/1.jpg")
    annotations = tmp_path / "gene_attrs"
    annotations.mkdir()
    for number, name in enumerate(("g_4x_attrs.json", "g_c_g_a_0_attrs.json")):
        item = {"image": f"gene_crop/4x/{number}.jpg", "caption": "a boy", "image_id": f"4x_{number}", "label": [1, 0]}
        (annotations / name).write_text(json.dumps([item]))
    records, _, contents = listed(annotations, images=str(images))
    assert [(r.identity, r.split, r.captions) for r in records.values()] == [(NOBODY, "test", ((0, "a boy"),))] * 2
    assert contents == [picture(0), picture(1)]

    finetune = tmp_path / "finetune"
    finetune.mkdir()
    pictures(images, "CUHK-PEDES/imgs/a.jpg", "CUHK-PEDES/imgs/b.jpg")
    train = [{"image": "CUHK-PEDES/imgs/a.jpg", "caption": text, "image_id": "3"} for text in ("one", "two")]
    (finetune / "cuhk_train.json").write_text(json.dumps(train))
    test = {"image": "CUHK-PEDES/imgs/b.jpg", "caption": ["three", "four"], "image_id": 4}
    (finetune / "cuhk_test.json").write_text(json.dumps([test]))
    records, rejects, contents = listed(finetune, images=str(images))
    assert sorted((r.identity, r.split, len(r.captions)) for r in records.values()) == [(3, "train", 2), (4, "test", 2)]
    assert not rejects
    assert all(isinstance(content, bytes) for content in contents)


def test_luperson_mllm(tmp_path: Path):
    pictures(tmp_path / "LUPerson-MLLM", "1.jpg", "2.jpg")
    for file, text in (("Ts-qwen.json", "one"), ("Td-qwen.json", "two"), ("Ts-shikra.json", "one")):
        (tmp_path / file).write_text(json.dumps({"/data/images/1.jpg": text, "somewhere/2.jpg": text}))
    records, _, contents = listed(tmp_path)
    assert [(r.source_path, r.identity, [text for _, text in r.captions]) for r in records.values()] == [
        ("1.jpg", NOBODY, ["two", "one"]),
        ("2.jpg", NOBODY, ["two", "one"]),
    ]
    assert contents == [picture(0), picture(1)]


def test_iiitd_20k(tmp_path: Path):
    pictures(tmp_path, "IIITD-20K/42.jpeg", "IIITD-20K/43.jpg")
    said = {
        str(number): {"Image ID": str(42 + number), "Description 1": "a man", "Description 2": "a person"}
        for number in range(2)
    }
    (tmp_path / "Filtered.json").write_text(json.dumps(said))
    records, _, contents = listed(tmp_path)
    assert [(path, len(r.captions), r.identity) for path, r in records.items()] == [
        ("42", 2, NOBODY),
        ("43", 2, NOBODY),
    ]
    assert contents == [picture(0), picture(1)]
