"""An ingress replica finds what was written again within its edition. No Ray runs."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ceca.config import ServeConfig
from ceca.data.keys import spelled
from ceca.data.store import Store
from serve.following import Following
from serve.metrics import Metrics
from tests.serve.dataset import publish_gallery, publish_people, publish_tiny
from tests.serve.test_waiting import Others


def test_texts_of_a_part_that_was_written_again_are_found_again(tmp_path: Path):
    store = Store(str(tmp_path))
    publish_people(store, 6)
    publish_gallery(store, *publish_tiny(store, "tiny", seed=1), "tiny")
    others: Any = Others()
    following = Following(store, ServeConfig(), others, Metrics())
    ids = spelled(following.snapshot.catalogue.ids)
    summaries = Following(store, ServeConfig(), others, Metrics()).snapshot.catalogue.summaries(ids)
    old = store.current("dialogues")
    rows = store.read_part(old, 0)
    erased = rows["image_id"][0].as_py()
    part = store.write_part("dialogues", old.version, 0, rows.slice(1))
    store.make_current([dataclasses.replace(old, parts=(part, *old.parts[1:]))])
    store.remove("dialogues", old.parts[0].path)
    with pytest.raises(FileNotFoundError):
        following.snapshot.catalogue.summaries(ids)
    edition = following.snapshot.edition
    asyncio.run(following.reopen())
    assert following.snapshot.edition == edition
    wanted = [None if image_id == erased else text for image_id, text in zip(ids, summaries, strict=True)]
    assert following.snapshot.catalogue.summaries(ids) == wanted
