"""Every stage as a command on a real cluster: what it publishes, bad input, and being killed."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from PIL import Image

from ceca.data.store import Store
from ceca.dialogue.conversation import QUESTIONS
from ceca.dialogue.tiny import make_tiny_vlm
from ceca.errors import UserError
from jobs.reports.figures import describe, report_dialogues
from tests.conftest import finish
from tests.jobs.conftest import SMALL


def digests(store: Store, table: str) -> list[str]:
    return [part.sha256 for part in store.current(table).parts]


def test_ingest_keeps_images_as_they_came_and_every_caption(ingested, drawn):
    store = Store(str(ingested))
    records = json.loads((drawn / "reid_raw.json").read_text())
    images, captions = store.read(store.current("images")), store.read(store.current("captions"))
    assert images["source_path"].to_pylist() == [record["file_path"] for record in records]
    for path, content in zip(images["source_path"].to_pylist()[:5], images["image"].to_pylist()[:5], strict=True):
        assert content == (drawn / "imgs" / path).read_bytes()
    assert captions["text"].to_pylist() == [text for record in records for text in record["captions"]]


def test_the_same_input_gives_the_same_tables_and_is_not_done_again(do, ingested, drawn, tmp_path):
    do("ingest", *SMALL, "--source", drawn, "--data", tmp_path)
    assert digests(Store(str(tmp_path)), "images") == digests(Store(str(ingested)), "images")
    assert "published already" in do("ingest", *SMALL, "--source", drawn, "--data", tmp_path)


def test_a_dataset_with_bad_rows_runs_through_and_each_is_in_rejects_with_its_reason(do, drawn, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(drawn, source)
    records = json.loads((source / "reid_raw.json").read_text())
    paths = [record["file_path"] for record in records]
    whole = (source / "imgs" / paths[0]).read_bytes()
    (source / "imgs" / paths[0]).write_bytes(whole[: len(whole) // 2])
    (source / "imgs" / paths[1]).write_bytes(b"this is not an image")
    (source / "imgs" / paths[2]).unlink()
    records[3]["captions"][0] = "   "
    records[4]["file_pth"] = records[4].pop("file_path")
    records[7]["captions"][0] = "half \ud83d"
    records[8]["id"] = 10**22
    records.append(dict(records[5]))
    records.append({**records[6], "file_path": "../../etc/passwd"})
    (source / "reid_raw.json").write_text(json.dumps(records))

    said = do("ingest", *SMALL, "--source", source, "--data", tmp_path / "data")
    store = Store(str(tmp_path / "data"))
    rejects = {row["reason"]: row["key"] for row in store.rejects().to_pylist()}
    assert rejects["truncated_image"] == paths[0]
    assert rejects["not_an_image"] == paths[1]
    assert rejects["missing_file"] == paths[2]
    assert rejects["empty_caption"].endswith("-0")
    assert "record 4" in rejects["missing_key"]
    assert rejects["duplicated_record"] == paths[5]
    assert rejects["bad_path"] == "../../etc/passwd"
    assert rejects["bad_caption"].endswith("-0")
    assert rejects["bad_identity"] == paths[8]
    assert store.current("images").rows == len(paths) - 5
    assert "9 rejected" in said


def test_an_unreadable_annotation_file_is_one_clear_error(run, tmp_path):
    (tmp_path / "reid_raw.json").write_bytes(b'[{"id": 1, "spl')
    failed = run("ingest", "--source", tmp_path, "--data", tmp_path / "data", expect=2)
    assert failed.stdout.count("error:") == 1
    assert "reid_raw.json" in failed.stdout
    assert "not valid JSON" in failed.stdout
    assert "Traceback" not in failed.stdout


def test_a_stage_without_its_input_says_which_to_run_first(run, tmp_path):
    failed = run("dialogue", "--engine", "oracle", "--data", tmp_path, expect=2)
    assert "run the stage `ingest` first" in failed.stdout


def test_the_oracle_answers_every_question_about_every_image(told):
    store = Store(str(told))
    table = store.read(store.current("dialogues")).to_pylist()
    assert [row["image_id"] for row in table] == store.read(store.current("images"), ["image_id"])[
        "image_id"
    ].to_pylist()
    for row in table:
        assert [turn["question"] for turn in row["turns"]] == list(QUESTIONS)
        assert row["summary"]
        assert row["model"].startswith("oracle")


def test_the_report_shows_images_of_different_people_with_caption_and_summary(told, tmp_path):
    store = Store(str(told))
    cards = describe(store, count=6, seed=0)
    summaries = set(store.read(store.current("dialogues"))["summary"].to_pylist())
    captions = set(store.read(store.current("captions"))["text"].to_pylist())
    assert len({card.summary for card in cards}) == 6
    assert {card.summary for card in cards} <= summaries
    assert {card.caption for card in cards} <= captions
    report_dialogues(data=(str(told),), picture=tmp_path / "dialogues.png")
    with Image.open(tmp_path / "dialogues.png") as picture:
        assert picture.width > picture.height > 400


def test_the_oracle_refuses_a_dataset_without_attributes(do, drawn, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(drawn, source)
    (source / "attributes.json").unlink()
    said = do("ingest", *SMALL, "--source", source, "--data", tmp_path / "data")
    assert "34,054 published" in said  # without that file, it is a benchmark of another size
    with pytest.raises(UserError, match="no table of attributes"):
        do("dialogue", *SMALL, "--data", tmp_path / "data")


def test_published_dialogues_are_imported(do, ingested, tmp_path):
    store = Store(str(ingested))
    paths = store.read(store.current("images"), ["source_path"])["source_path"].to_pylist()
    turns = [{"question": "q", "answer": f"a{n}"} for n in range(5)]
    entries = [{"file_path": path, "dialogue": [*turns, {"summary": f"somebody {n}"}]} for n, path in enumerate(paths)]
    entries[1]["file_path"] = f"/elsewhere/{paths[1]}"
    (tmp_path / "dialogues.json").write_text(json.dumps([*entries[1:], {"file_path": "nobody.jpg", "dialogue": turns}]))
    shutil.copytree(ingested, tmp_path / "data")
    do("dialogue", *SMALL, "--data", tmp_path / "data", "--published", tmp_path / "dialogues.json")
    store = Store(str(tmp_path / "data"))
    assert store.read(store.current("dialogues"))["summary"].to_pylist()[:2] == ["somebody 1", "somebody 2"]
    rejected = {row["reason"] for row in store.read(store.current("rejects/dialogue")).to_pylist()}
    assert rejected == {"unknown_image", "not_in_file"}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(400)
def test_vllm_holds_all_six_turns_about_every_image(run, drawn, tmp_path):
    data, model = tmp_path / "data", make_tiny_vlm(tmp_path / "model")
    run("ingest", *SMALL, "--source", drawn, "--data", data, "--limit", 12)
    settings = ("--vllm.model", model, "--vllm.gpus", 0, "--vllm.enforce-eager", "--vllm.max-model-len", 1024)
    finished = run("dialogue", "--data", data, *settings, "--answer-tokens", 16, "--summary-tokens", 24)
    store = Store(str(data))
    table = store.read(store.current("dialogues")).to_pylist()
    assert len(table) == 12
    for row in table:
        assert [turn["question"] for turn in row["turns"]] == list(QUESTIONS)
        assert all(turn["answer"] for turn in row["turns"])
        assert row["summary"]
        assert row["completion_tokens"] == 5 * 16 + 24
        assert row["cached_tokens"] > 0  # the history came from the prefix cache
    assert json.loads(table[0]["generation_settings"])["vllm"]["model"] == str(model)
    assert "% of what could be)" in " ".join(finished.stdout.split())


# --- killed and started again -----------------------------------------------------------------------------


def kill_after_some_units(start, store: Store, stage: str, *arguments: object) -> None:
    """SIGKILL a stage once a random number of its units is done, before it has published anything."""
    enough = random.Random(stage).randint(1, 8)
    process = start(stage, *arguments)
    work = Path(store.path(".work", stage))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if len(list(work.glob("*/*.json"))) >= enough:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    finish(process, 60, expect=-signal.SIGKILL)  # else it ended before it was killed


@pytest.mark.slow
def test_ingest_killed_and_started_again_ends_with_the_same_tables(start, run, drawn, ingested, tmp_path):
    store = Store(str(tmp_path))
    arguments = (*SMALL, "--source", drawn, "--data", tmp_path)
    kill_after_some_units(start, store, "ingest", *arguments)
    assert store.manifest("images") is None
    assert "continuing" in run("ingest", *arguments).stdout
    for table in ("images", "captions", "attributes"):
        assert digests(store, table) == digests(Store(str(ingested)), table)


@pytest.mark.slow
def test_dialogue_killed_and_started_again_ends_with_the_same_table(start, run, told, tmp_path):
    shutil.copytree(told, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "dialogues")
    store = Store(str(tmp_path))
    kill_after_some_units(start, store, "dialogue", *SMALL, "--data", tmp_path)
    assert store.manifest("dialogues") is None
    assert "continuing" in run("dialogue", *SMALL, "--data", tmp_path).stdout
    assert digests(store, "dialogues") == digests(Store(str(told)), "dialogues")
