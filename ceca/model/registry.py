"""The registry of published models: find, list and describe them without loading weights.

Notable: this module imports no torch, so looking a model up is quick. A model is named within a dataset
(`ceca-vitb16`), by the URI of its folder, or on the hub (`hf://owner/name`); `locate` is the one place that tells them
apart.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ceca.config import OMEGA, ModelConfig
from ceca.data.names import MANIFEST, MODELS
from ceca.data.schema import SCHEMA_VERSION
from ceca.data.store import Store, StoreError, filesystem
from ceca.model.hub import fetch, on_hub


@dataclasses.dataclass(frozen=True)
class PublishedModel:
    """The description of a published model.

    Attributes:
        uri: the model's folder.
        digest: of its weights and settings; names the folder of its objects.
        global_dim: width D of its global embeddings.
        local_dim: width E of its local embeddings.
        config: config.json, the settings of model and training.
        training: training.json, the training record.
        made_from: names and versions of the tables that it was trained on.
        version: of the model, from settings and tables.
        protocol: how its epoch was chosen: `validation`, `released`, or `epoch on test` (programs before 0.2).
    """

    uri: str
    digest: str
    global_dim: int
    local_dim: int
    config: dict[str, Any]
    training: dict[str, Any]
    made_from: dict[str, str]
    version: str

    @property
    def protocol(self) -> str:
        protocol = self.config["train"].get("protocol", "validation") if self.config.get("train") else "validation"
        on_test = self.training.get("validation_split") == "test"
        return "epoch on test" if protocol == "validation" and on_test else protocol

    @property
    def context(self) -> int:
        """Tokens of a text that the model reads; longer texts are cut."""
        return int(self.config["model"].get("context", ModelConfig().context))

    def omega(self, given: float | None = None) -> float:
        """The ω of this model's figures: a given one, or that of its protocol."""
        return given if given is not None else OMEGA["released" if self.protocol == "released" else "validation"]

    def label(self, name: str) -> str:
        """The model's name in a table or a picture, with its protocol if the epoch was chosen on test."""
        return name if self.protocol == "validation" else f"{name} (protocol {self.protocol})"


def find_model(store: Store, name: str) -> PublishedModel | None:
    """Find a published model by its name in the dataset or by URI; None if it is not published.

    Raises:
        StoreError: it has another schema version, or its config.json is missing.
    """
    home, names = locate(store, name)
    kind = "a model's manifest"
    manifest = home.read_record(*names, MANIFEST, kind=kind, fields={"schema_version": int})
    if manifest is None:
        return None
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise StoreError(
            f"{home.place(*names)} has schema version {manifest.get('schema_version')}, "
            f"this program reads {SCHEMA_VERSION}; use the program that wrote it, or train again"
        )
    fields = {"digest": str, "global_dim": int, "local_dim": int, "made_from": dict, "version": str}
    manifest = home.read_record(*names, MANIFEST, kind=kind, fields=fields) or manifest
    digest = manifest["digest"]
    config = home.read_json(*names, digest, "config.json")
    training = home.read_json(*names, digest, "training.json") or {}
    if config is None:
        raise StoreError(f"{home.place(*names, digest)} has no config.json; train the model again with --redo")
    return PublishedModel(
        uri=name if on_hub(name) else home.place(*names),  # other machines have another cache
        digest=digest,
        global_dim=manifest["global_dim"],
        local_dim=manifest["local_dim"],
        config=config,
        training=training,
        made_from=manifest["made_from"],
        version=manifest["version"],
    )


def find_named(store: Store, source: str) -> PublishedModel | None:
    """The published model that a name or URI means; None if it is a file or anything else."""
    if Path(source).expanduser().is_file() or Path(source).suffix in (".pt", ".pth", ".safetensors", ".bin", ".ckpt"):
        return None
    return find_model(store, source)


def require_model(store: Store, name: str) -> PublishedModel:
    """Find a published model by its name in the dataset or by URI.

    Raises:
        StoreError: it is not published (the message lists the dataset's models), or `find_model` raises.
    """
    model = find_model(store, name)
    if model is None:
        names = ", ".join(list_models(store)) or "none"
        raise StoreError(f"no published model {name!r} in {store.uri} (there: {names}); run the stage `train` first")
    return model


def model_file(store: Store, name: str, file: str) -> bytes:
    """Read one object of a published model.

    Args:
        store: the dataset.
        name: the model, by name or URI.
        file: name of the object, such as `model.safetensors` or `curve.parquet`.

    Raises:
        StoreError: there is no such model, or it has no such object.
    """
    published = require_model(store, name)
    home, names = locate(store, name)
    try:
        return home.read_bytes(*names, published.digest, file)
    except FileNotFoundError:
        raise StoreError(f"{published.uri} has no {file}; train it again with --redo") from None


class Stored(NamedTuple):
    """The objects of a published model, compared with their digests.

    Attributes:
        place: where they lie, for messages.
        weights: content of model.safetensors.
        settings: of the model, as config.json has them.
    """

    place: str
    weights: bytes
    settings: dict[str, Any]


def read_stored(store: Store, name: str, digest: str) -> Stored:
    """Read the model of this digest, although another may have been published under its name since.

    Raises:
        StoreError: it is gone, or is not what was published.
    """
    home, names = locate(store, name)
    place = home.place(*names, digest)
    described = home.read_record(*names, digest, "config.json", kind="a model's settings", fields={"model": dict})
    if described is None:
        raise StoreError(f"{place} has no config.json; train the model again with --redo")
    try:
        weights = home.read_bytes(*names, digest, "model.safetensors")
    except FileNotFoundError:
        raise StoreError(f"{place} has no model.safetensors; train it again with --redo") from None
    published = home.read_json(*names, MANIFEST) or {}
    expected = published.get("weights_sha256") if published.get("digest") == digest else None
    if model_digest(weights, described["model"]) != digest or expected not in (
        None,
        hashlib.sha256(weights).hexdigest(),
    ):
        raise StoreError(f"{place} is damaged: it does not hold what was published; train it again with --redo")
    return Stored(place, weights, described["model"])


def model_digest(weights: bytes, settings: Mapping[str, Any]) -> str:
    """Digest of a model: names the folder of its objects.

    Args:
        weights: content of model.safetensors.
        settings: of the model, as config.json has them.
    """
    return hashlib.sha256(weights + json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def list_models(store: Store) -> list[str]:
    """Names of the models in a dataset, unfinished ones included."""
    folder = store.path(MODELS)
    if not store.fs.exists(folder):
        return []
    return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in store.fs.ls(folder, detail=False))


def locate(store: Store, name: str) -> tuple[Store, tuple[str, ...]]:
    """The store that holds a model and the model's place in it.

    Args:
        store: the dataset in which a plain name is looked up.
        name: the model, by name or URI.
    """
    if on_hub(name):
        return Store(fetch(name)), ()
    if _is_place(name):
        filesystem(name)  # raises a clear error for an unknown scheme
        return Store(name), ()
    return store, (MODELS, name)


def _is_place(name: str) -> bool:
    return "://" in name or "/" in name


def lies_in(store: Store, uri: str) -> bool:
    """Whether a URI or path names something below a dataset."""
    return uri.startswith(f"{store.uri.rstrip('/')}/") and ".." not in uri.split("/")


def named_model(store: Store, name: Any, by: str) -> str:
    """Return the model that a manifest names, if it belongs to the dataset.

    Args:
        store: the dataset.
        name: the model, by name or URI.
        by: the manifest's place, for the error.

    Raises:
        StoreError: the manifest names a model elsewhere. Only a person does that: whoever wrote the dataset could
            otherwise have this program read any address.
    """
    if not isinstance(name, str) or (_is_place(name) and not lies_in(store, name)):
        raise StoreError(
            f"{by} names the model {name!r}, which is not in this dataset; if you trust it, pass it as --model"
        )
    return name
