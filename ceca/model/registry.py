"""Published models: what is known of one without loading it. Imports no torch, so that looking one up is quick."""

from __future__ import annotations

import dataclasses
from typing import Any

from ceca.data.names import MANIFEST, MODELS
from ceca.data.schema import SCHEMA_VERSION
from ceca.data.store import Store, StoreError, filesystem


@dataclasses.dataclass(frozen=True)
class PublishedModel:
    """A model as published: where it is, its digest, its embeddings' widths, settings and training record."""

    uri: str
    digest: str
    global_dim: int
    local_dim: int
    config: dict[str, Any]
    training: dict[str, Any]
    made_from: dict[str, str]
    version: str


def find_model(store: Store, name: str) -> PublishedModel | None:
    """A published model's description by name below the dataset, or by URI; None where there is none."""
    home, names = locate(store, name)
    manifest = home.read_json(*names, MANIFEST)
    if manifest is None:
        return None
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise StoreError(
            f"{home.place(*names)} has schema version {manifest.get('schema_version')}, "
            f"this program reads {SCHEMA_VERSION}; use the program that wrote it, or train again"
        )
    digest = manifest["digest"]
    config = home.read_json(*names, digest, "config.json")
    training = home.read_json(*names, digest, "training.json") or {}
    if config is None:
        raise StoreError(f"{home.place(*names, digest)} has no config.json; train the model again with --redo")
    return PublishedModel(
        uri=home.place(*names),
        digest=digest,
        global_dim=manifest["global_dim"],
        local_dim=manifest["local_dim"],
        config=config,
        training=training,
        made_from=manifest["made_from"],
        version=manifest["version"],
    )


def require_model(store: Store, name: str) -> PublishedModel:
    """`find_model`, and a StoreError that names those there are where it is not published."""
    model = find_model(store, name)
    if model is None:
        there = ", ".join(list_models(store)) or "none"
        raise StoreError(f"no published model {name!r} in {store.uri} (there: {there}); run the stage `train` first")
    return model


def model_file(store: Store, name: str, file: str) -> bytes:
    """One of the objects of a published model: its weights, `curve.parquet` and so on.

    Raises:
        StoreError: there is no such model, or it has no such object.
    """
    published = require_model(store, name)
    home, names = locate(store, name)
    try:
        return home.read_bytes(*names, published.digest, file)
    except FileNotFoundError:
        raise StoreError(f"{published.uri} has no {file}; train it again with --redo") from None


def list_models(store: Store) -> list[str]:
    """Names of the models below a dataset, published or not yet."""
    folder = store.path(MODELS)
    if not store.fs.exists(folder):
        return []
    return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in store.fs.ls(folder, detail=False))


def locate(store: Store, name: str) -> tuple[Store, tuple[str, ...]]:
    """The store that a model is in and its place there, by name below a dataset or by URI."""
    if "://" in name or "/" in name:
        filesystem(name)  # a clear error for an unknown scheme
        return Store(name), ()
    return store, (MODELS, name)
