"""Deleting an image that waits to be added, or that another ingress replica has just begun to serve. No Ray runs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ceca.config import ServeConfig
from ceca.data.changes import pending_erasures, removed_images, unadded_images, write_arrival
from ceca.data.names import ARRIVALS, FAILED
from ceca.data.store import Store
from ceca.search.edition import find_edition
from serve.changes import Changes
from serve.following import Following
from serve.intake import Intake
from serve.metrics import Metrics
from tests.serve.dataset import TINY, draw_person, publish_gallery, publish_people, publish_tiny

SAID = {"identity": None, "camera": None, "source_path": "", "summary": "A person in tan."}


class Others:
    """The other deployments, without their processes."""

    async def prepare(self, edition: object) -> None: ...

    async def wake_intake(self) -> None: ...

    async def intake_status(self) -> str:
        return ""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(str(tmp_path_factory.mktemp("waiting")))
    publish_people(store, 6)
    model, published = publish_tiny(store, "tiny", seed=1)
    publish_gallery(store, model, published, "tiny")
    return store


def replica(store: Store) -> Changes:
    """An ingress replica, as far as changes go."""
    others: Any = Others()
    return Changes(store, ServeConfig(), Following(store, ServeConfig(), others, Metrics()), others)


class Encoder:
    """Embeds as slowly as the test likes."""

    def __init__(self, meanwhile: Callable[[], Awaitable[object]]):
        self.meanwhile = meanwhile
        self.images = SimpleNamespace(remote=self.embed)

    async def embed(self, edition: object, images: list[bytes], summaries: list[str]) -> tuple[np.ndarray, ...]:
        await self.meanwhile()
        width = edition.global_dim  # type: ignore[attr-defined]
        return np.ones((len(images), width), np.float32), np.ones((len(images), TINY.local_dim), np.float32)


async def nothing() -> None: ...


async def work(store: Store, meanwhile: Callable[[], Awaitable[object]] = nothing) -> None:
    """A turn of the intake."""
    intake = Intake.__new__(Intake)
    encoder: Any = Encoder(meanwhile)
    await intake.__init__(store.uri, ServeConfig(), "no engine", encoder)  # type: ignore[misc]
    intake.work.cancel()
    await intake._turn()
    await intake._turn()


def arrive(store: Store, number: int) -> str:
    return write_arrival(store, draw_person(number), (64, 160), SAID)


def is_left(store: Store, number: int) -> bool:
    """Whether anything below the dataset still has the picture."""
    return any(draw_person(number) in store.read_bytes(name) for name in store.walk() if "images/" not in name)


def test_a_waiting_image_is_deleted_by_any_replica_and_never_added(store: Store) -> None:
    async def run() -> None:
        replicas = replica(store), replica(store)
        image_id = arrive(store, 20)
        job = await replicas[1].remove(image_id)
        assert job is not None
        assert image_id in removed_images(store)
        await work(store)
        assert image_id not in unadded_images(store)
        assert pending_erasures(store) == []
        for one in replicas:
            await one.following.follow()
            assert image_id not in one.following.snapshot.catalogue
            added = await one.job(f"add-{image_id}")
            assert added is not None
            assert (added.status, added.detail) == ("failed", "the image was deleted")
            erased = await one.job(job.job)
            assert erased is not None
            assert erased.status == "done"
            assert await one.remove(image_id) == job  # the first response was lost

    asyncio.run(run())
    assert not is_left(store, 20)


def test_an_image_that_is_deleted_while_it_is_embedded_is_not_added(store: Store) -> None:
    async def run() -> None:
        ingress = replica(store)
        image_id = arrive(store, 21)
        await work(store, lambda: ingress.remove(image_id))
        await ingress.following.follow()
        assert image_id not in ingress.following.snapshot.catalogue
        assert find_edition(store).read_added(["image_id"]) == [] or not is_left(store, 21)

    asyncio.run(run())
    assert not is_left(store, 21)


def test_right_after_done_every_replica_can_delete_the_image(store: Store) -> None:
    async def run() -> None:
        replicas = replica(store), replica(store)
        image_id = arrive(store, 22)
        await work(store)
        done = await replicas[0].job(f"add-{image_id}")
        assert done is not None
        assert done.status == "done"
        assert image_id not in replicas[1].following.snapshot.catalogue  # it has not followed yet
        assert await replicas[1].remove(image_id) is not None
        await replicas[0].following.leave_out()
        for one in replicas:
            assert image_id not in one.following.snapshot.catalogue
        await work(store)

    asyncio.run(run())
    assert not is_left(store, 22)


def test_an_image_that_could_not_be_added_can_be_deleted_and_an_unknown_one_not(store: Store) -> None:
    async def run() -> None:
        ingress = replica(store)
        store.write_json({"image_id": "f" * 16, "reason": "empty_answer", "detail": "x"}, FAILED, f"{'f' * 16}.json")
        assert await ingress.remove("f" * 16) is not None
        await work(store)
        assert store.names(FAILED) == []
        assert await ingress.remove("e" * 16) is None
        assert await ingress.job(f"add-{'e' * 16}") is None

    asyncio.run(run())


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"image_id": "x"}',
        json.dumps({**SAID, "image_id": "e" * 16, "image": "?", "width": 1, "height": 1}),
    ],
    ids=range(4),
)
def test_an_object_that_is_no_image_keeps_no_other_from_being_added(store: Store, content: str) -> None:
    async def run() -> None:
        one = replica(store)
        name = f"{'e' * 16}-{'0' * 32}.json"
        store.write_bytes(content.encode(), ARRIVALS, name)
        image_id = arrive(store, 30 + len(content) % 10)
        await work(store)
        await one.following.follow()
        assert image_id in one.following.snapshot.catalogue
        assert store.names(ARRIVALS) == []
        failed = await one.job(f"add-{'e' * 16}")
        assert failed is not None
        assert failed.status == "failed"
        store.remove(FAILED)

    asyncio.run(run())
