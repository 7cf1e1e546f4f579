"""Images that are added and removed while the service runs, and galleries and models that follow each other."""

from __future__ import annotations

import io

import httpx
import pytest
import ray
from PIL import Image
from ray import serve as ray_serve

from ceca.config import DialogueConfig, ServeConfig
from ceca.data import schema
from ceca.data.changes import hide
from ceca.data.erase import finish
from ceca.data.lease import holding
from ceca.data.store import Store
from ceca.search.edition import find_edition
from ceca.search.searcher import Searcher
from ceca.settings import to_mapping
from serve.app import QUIET, application
from tests.serve.conftest import COUNT, Changing, Running, wait_until_ready
from tests.serve.dataset import QUERY, draw_person, publish_gallery, publish_people, publish_tiny


def picture(colour: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (64, 160), colour).save(content, "JPEG")
    return content.getvalue()


def found(changing: Changing, content: bytes) -> str:
    """The first image that is found by an image."""
    answer = changing.client.post("/v1/search/image", content=content, params={"top_k": 1})
    return answer.json()["hits"][0]["image_id"]


def test_an_added_image_is_asked_about_and_found_and_lasts(changing: Changing) -> None:
    content = picture("turquoise")
    job = changing.add(content, camera="c1")
    image_id = job.removeprefix("add-")
    assert changing.finished(job)["status"] == "done"
    assert found(changing, content) == image_id
    hit = next(hit for hit in changing.search(query=QUERY, top_k=COUNT)["hits"] if hit["image_id"] == image_id)
    assert hit["summary"] == "Answer 6: a person in a turquoise shirt."  # after five questions
    assert hit["identity"] is None
    assert changing.client.get(hit["image"]).content == content
    told = changing.client.post("/v1/explain", json={"query": QUERY, "image_id": image_id}).json()
    assert len(told["sentences"]) == 1 + 5  # the summary and five answers
    only = changing.search(query=QUERY, where={"split": ["added"]})["hits"]
    assert [hit["image_id"] for hit in only] == [image_id]
    assert image_id in {hit.image_id for hit in Searcher(changing.store).search(QUERY, omega=0.3, top_k=COUNT)}
    asked = changing.describer.asked
    assert changing.finished(changing.add(content))["status"] == "done"  # the same image is the same image
    assert changing.describer.asked == asked
    assert len(changing.search(query=QUERY, where={"split": ["added"]})["hits"]) == 1


def test_who_has_described_an_image_is_not_asked_a_model(changing: Changing) -> None:
    asked = changing.describer.asked
    job = changing.add(picture("navy"), summary="A person in\n navy.", identity=77)
    assert changing.finished(job)["status"] == "done"
    hits = changing.search(query=QUERY, top_k=20)["hits"]
    hit = next(hit for hit in hits if hit["image_id"] == job.removeprefix("add-"))
    assert (hit["summary"], hit["identity"]) == ("A person in navy.", 77)
    assert changing.describer.asked == asked


def test_an_image_that_no_model_can_describe_fails_with_words_and_can_be_tried_again(changing: Changing) -> None:
    content = picture("olive")
    changing.describer.broken = True
    try:
        failed = changing.finished(changing.add(content))
    finally:
        changing.describer.broken = False
    assert failed["status"] == "failed"
    assert "answered nothing" in failed["detail"]
    assert changing.finished(changing.add(content))["status"] == "done"


def test_a_crash_in_the_middle_of_an_add_loses_nothing_that_was_acknowledged(changing: Changing) -> None:
    contents = [picture(colour) for colour in ("salmon", "khaki", "plum", "peru")]
    changing.describer.seconds = 0.3
    try:
        jobs = [changing.add(content) for content in contents]
        before = changing.describer.asked
        changing.until(lambda: changing.describer.asked > before)
        for actor in ray.util.list_named_actors(all_namespaces=True):
            if "closed#Intake" in actor["name"]:
                ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]), no_restart=True)
                break
        else:
            pytest.fail("no replica of the intake")
        assert all(changing.finished(job, seconds=60)["status"] == "done" for job in jobs)
    finally:
        changing.describer.seconds = 0.0
    assert [f"add-{found(changing, content)}" for content in contents] == jobs


def test_a_deleted_image_is_found_by_nobody_and_then_nowhere(changing: Changing) -> None:
    added = changing.add(picture("tan"), summary="A person in tan.")
    changing.finished(added)
    for image_id, content in (
        (schema.image_id("0003.jpg"), draw_person(3)),
        (added.removeprefix("add-"), picture("tan")),
    ):
        answer = changing.client.delete(f"/v1/images/{image_id}")
        assert answer.status_code == 202
        hits = changing.search(query=QUERY, top_k=30)["hits"]  # at once
        assert len(hits) > 10
        assert image_id not in {hit["image_id"] for hit in hits}
        assert changing.client.get(f"/v1/images/{image_id}").status_code == 404
        assert changing.client.delete(f"/v1/images/{image_id}").json()["job"] == answer.json()["job"]  # the same again
        assert changing.finished(answer.json()["job"])["status"] == "done"
        held = [changing.store.fs.cat_file(path) for path in changing.store.fs.find(changing.store.root)]
        assert not any(content in bytes_held for bytes_held in held)
    again = changing.client.post("/v1/images", params={"summary": "x"}, content=picture("tan"))
    assert again.status_code == 422
    assert "deleted" in again.json()["detail"][0]["msg"]
    pictures = [changing.client.get(hit["image"]) for hit in changing.search(query=QUERY, top_k=30)["hits"]]
    assert {answer.status_code for answer in pictures} == {200}


def test_nothing_is_left_of_an_image_that_is_deleted_while_it_is_asked_about(changing: Changing) -> None:
    content = picture("sienna")
    changing.describer.seconds = 0.5  # an answer
    before = changing.describer.asked
    try:
        job = changing.add(content)
        changing.until(lambda: changing.describer.asked > before)
        finish(changing.store, hide(changing.store, [job.removeprefix("add-")], erase=True))  # as `ceca remove` does
        changing.until(lambda: changing.describer.asked >= before + 6)
    finally:
        changing.describer.seconds = 0.0
    changing.until(lambda: changing.client.get("/v1/status").json()["arrivals"] == 0)
    held = [changing.store.fs.cat_file(path) for path in changing.store.fs.find(changing.store.root)]
    assert not any(content in bytes_held for bytes_held in held)


def test_an_image_is_not_erased_while_a_stage_works(changing: Changing) -> None:
    added = changing.add(picture("orchid"), summary="A person in orchid.")
    changing.finished(added)
    with holding(changing.store, "index-7", "somebody", on_lost=pytest.fail):
        job = changing.client.delete(f"/v1/images/{added.removeprefix('add-')}").json()["job"]
        waits = "erasing waits until index-7 ends, which is held by somebody since"
        changing.until(lambda: waits in changing.client.get(f"/v1/jobs/{job}").json()["detail"])
        assert changing.client.get(f"/v1/images/{added.removeprefix('add-')}").status_code == 404  # out of search
    assert changing.finished(job)["status"] == "done"


@pytest.mark.slow
def test_an_engine_without_its_gpus_holds_nothing_up_but_what_needs_it(
    running: Running, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = Store(str(tmp_path_factory.mktemp("vllm")))
    asked = to_mapping(DialogueConfig(engine="vllm"), results_only=True)
    publish_people(store, COUNT, asked)
    model, published = publish_tiny(store, "tiny", seed=1)
    publish_gallery(store, model, published, "tiny")
    app = application(find_edition(store), ServeConfig(follow_s=0.3))
    ray_serve.run(app, name="vllm", route_prefix="/vllm", logging_config=QUIET)
    try:
        with httpx.Client(base_url=f"{running.url}/vllm", timeout=30) as client:
            wait_until_ready(client)
            changing = Changing(store, client, running.describer)
            waiting = changing.add(picture("beige"))
            changing.until(lambda: "room for its GPUs (1)" in client.get(f"/v1/jobs/{waiting}").json()["detail"])
            described = changing.add(picture("azure"), summary="A person in azure.")
            assert changing.finished(described)["status"] == "done"
            erased = client.delete(f"/v1/images/{described.removeprefix('add-')}").json()["job"]
            assert changing.finished(erased)["status"] == "done"
            again = changing.add(picture("beige"), summary="A person in beige.")
            assert again == waiting
            assert changing.finished(again)["status"] == "done"
            changing.until(lambda: client.get("/v1/status").json()["intake"] == "")  # no machine is asked for any more
    finally:
        ray_serve.delete("vllm")


@pytest.mark.slow
def test_images_can_be_deleted_one_right_after_another(changing: Changing) -> None:
    """While the first is erased, which writes the object of all of them anew."""
    colours = ("coral", "crimson", "gold", "indigo", "ivory", "lime")
    jobs = [changing.add(picture(colour), summary=f"A person in {colour}.") for colour in colours]
    assert {changing.finished(job)["status"] for job in jobs} == {"done"}
    ids = [job.removeprefix("add-") for job in jobs]
    answers = [changing.client.delete(f"/v1/images/{image_id}") for image_id in ids]
    assert [answer.status_code for answer in answers] == [202] * len(ids), [answer.text for answer in answers]
    assert {changing.finished(answer.json()["job"])["status"] for answer in answers} == {"done"}
    hits = changing.search(query=QUERY, top_k=100)["hits"]
    assert not {hit["image_id"] for hit in hits} & set(ids)


def test_galleries_and_models_follow_each_other_under_questions_and_no_answer_mixes_them(changing: Changing) -> None:
    """Every answer equals one by a search in a single process with the versions that the answer names."""
    expected: dict[tuple[str, str], list[float]] = {}

    def remember() -> tuple[str, str]:
        searcher = Searcher(changing.store)
        name = searcher.edition.model_name, searcher.edition.gallery_name
        expected[name] = [hit.similarity for hit in searcher.search(QUERY, omega=0.3, top_k=30)]
        return name

    seen: list[tuple[tuple[str, str], list[float]]] = []

    def ask() -> tuple[str, str]:
        answer = changing.search(query=QUERY, top_k=30)
        name = answer["model"], answer["gallery"]
        seen.append((name, [hit["similarity"] for hit in answer["hits"]]))
        return name

    names = [remember()]
    changing.until(lambda: ask() == names[-1])
    del seen[:-1]  # the others are of what the tests before have left to follow
    model, published = publish_tiny(changing.store, "tiny", seed=1)
    publish_gallery(changing.store, model, published, "tiny", number=2, leave_out=4)  # another gallery
    names.append(remember())
    changing.until(lambda: ask() == names[-1])
    model, published = publish_tiny(changing.store, "second", seed=2)
    publish_gallery(changing.store, model, published, "second", number=3)  # another model, with its gallery
    added = {path.rsplit("/", 1)[-1] for path in changing.store.fs.ls(changing.store.path("added"), detail=False)}
    changing.until(lambda: ask()[0] == f"second@{published.digest}")
    names.append(remember())  # with what was added, now embedded by the second model
    assert len(expected[names[-1]]) > COUNT - 2
    changing.until(lambda: ask() == names[-1])
    assert added != set(changing.store.names("added"))
    assert {name for name, _ in seen} == set(names)
    for name, similarity in seen:
        assert similarity == pytest.approx(expected[name], abs=1e-5)


def test_a_gallery_that_cannot_be_served_leaves_the_one_before(changing: Changing) -> None:
    before = changing.search(query=QUERY)["gallery"]
    manifest = changing.store.read_json("gallery", "manifest.json")
    changing.store.write_json(
        {**manifest, "made_from": {**manifest["made_from"], "model": "x"}}, "gallery", "manifest.json"
    )
    try:
        changing.until(lambda: "made by model x" in changing.client.get("/v1/status").json()["following"])
        assert changing.search(query=QUERY)["gallery"] == before
        image_id = changing.search(query=QUERY)["hits"][0]["image_id"]
        assert changing.client.delete(f"/v1/images/{image_id}").status_code == 202  # and is obeyed all the same
        assert image_id not in {hit["image_id"] for hit in changing.search(query=QUERY, top_k=100)["hits"]}
        assert changing.client.get(f"/v1/images/{image_id}").status_code == 404
    finally:
        changing.store.write_json(manifest, "gallery", "manifest.json")
    changing.until(lambda: not changing.client.get("/v1/status").json()["following"])
