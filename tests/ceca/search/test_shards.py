"""Shards are files on this machine: only shards are removed, and only digests name them."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pytest

from ceca.data.files import CACHED_DAYS, sweep
from ceca.data.store import Manifest, Part, Store, StoreError
from ceca.search.shards import open_shards
from ceca.search.sources import StoredPart


def test_sweeping_follows_no_link(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "shards" / "own", tmp_path / "elsewhere"
    old = 1.0 + CACHED_DAYS
    for place in (folder, folder.with_name("other"), elsewhere):
        place.mkdir(parents=True)
        (place / "abc.npy").touch()
        os.utime(place / "abc.npy", (old, old))
    folder.with_name("evil").symlink_to(elsewhere)
    (folder / "def.npy").symlink_to(elsewhere / "abc.npy")
    sweep(folder, set())
    assert (elsewhere / "abc.npy").exists()
    assert not list(folder.iterdir())
    assert not list(folder.with_name("other").iterdir())


@pytest.mark.parametrize("digest", ["../../escaped", "/tmp/escaped", "", "..", "a b"])
def test_a_manifest_names_no_file_of_this_machine(tmp_path: Path, digest: str) -> None:
    store = Store(str(tmp_path / "data"))
    rows = pa.table({"global": pa.array([[1.0]]), "local": pa.array([[1.0]])})
    part = store.write_part("gallery", "v", 0, rows)
    manifest = Manifest("gallery", "v", 1, (Part(part.path, 1, part.bytes, digest),), {}, {}, {}, "")
    with pytest.raises(StoreError, match="which is no digest"):
        open_shards([StoredPart(store, manifest, 0)], tmp_path / "cache" / "shards")
    assert not (tmp_path / "cache").exists()
