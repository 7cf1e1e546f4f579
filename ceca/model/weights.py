"""Models to train, from random weights or a checkpoint; published models as safetensors beside their config.

A published model is three objects and a manifest written last:
    models/<name>/<digest>/{model.safetensors, config.json, training.json}    models/<name>/manifest.json
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from ceca.config import ModelConfig
from ceca.data.names import MANIFEST, MODELS
from ceca.data.objects import as_json
from ceca.data.replacing import Check, unchecked
from ceca.data.schema import SCHEMA_VERSION
from ceca.data.store import Store, StoreError
from ceca.model.ceca import CECA
from ceca.model.foreign import fitting_weights, interpolate_positions, read_checkpoint
from ceca.model.registry import PublishedModel, model_digest, read_stored, require_model
from ceca.settings import from_mapping, to_mapping

__all__ = [
    "Start",
    "build_model",
    "interpolate_positions",
    "load_model",
    "load_weights",
    "publish_model",
    "serialize",
    "start_model",
]


class Start(NamedTuple):
    """A model to train, and where its weights come from.

    Attributes:
        model: the model.
        kind: what its weights were read from, e.g. `RDE`; empty for random ones.
        not_used: names in the file that the model does not take.
        at_random: modules of the model that the file does not have.
        otherwise: settings that a published model was trained with, where they differ.
    """

    model: CECA
    kind: str = ""
    not_used: tuple[str, ...] = ()
    at_random: tuple[str, ...] = ()
    otherwise: tuple[str, ...] = ()


def start_model(config: ModelConfig, store: Store | None = None) -> Start:
    """Make a model to train: weights of `config.pretrained` where it has them, random ones elsewhere.

    Args:
        config: settings of the model.
        store: the dataset, in which `config.pretrained` may name a published model.

    Raises:
        WeightsError: the weights are not found, or are those of another backbone.
    """
    model = CECA(config)
    if config.pretrained is None:
        return Start(model)
    checkpoint = read_checkpoint(config.pretrained, config, store)
    taken, not_used, at_random = fitting_weights(checkpoint, model)
    model.load_state_dict(taken, strict=False)
    otherwise = []
    if checkpoint.config is not None:
        theirs, ours = to_mapping(checkpoint.config), to_mapping(config)
        otherwise = [f"{key} {theirs[key]}" for key in ours if key != "pretrained" and theirs[key] != ours[key]]
    return Start(model, checkpoint.kind, tuple(not_used), tuple(at_random), tuple(otherwise))


def build_model(config: ModelConfig, store: Store | None = None) -> CECA:
    """The model of `start_model`."""
    return start_model(config, store).model


# --- published models -------------------------------------------------------------------------------------


def serialize(state: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in state.items()})


def publish_model(
    store: Store,
    name: str,
    weights: bytes,
    *,
    model: ModelConfig,
    config: dict[str, Any],
    training: dict[str, Any],
    made_from: dict[str, str],
    version: str,
    extras: Mapping[str, bytes] | None = None,
    check: Check = unchecked,
) -> PublishedModel:
    """Publish a model under models/<name>, `extras` beside it by name; the manifest comes last.

    `check` raises an error if this process may not publish any more.
    """
    global_dim = safetensors.torch.load(weights)["backbone.clip.text_projection"].shape[1]
    local_dim = model.local_dim if model.local_branch else global_dim
    settings = to_mapping(model)
    described = {"schema_version": SCHEMA_VERSION, "model": settings, "train": config}
    digest = model_digest(weights, settings)
    store.write_bytes(weights, MODELS, name, digest, "model.safetensors")
    store.write_json(described, MODELS, name, digest, "config.json")
    store.write_json(training, MODELS, name, digest, "training.json")
    for extra, content in (extras or {}).items():
        store.write_bytes(content, MODELS, name, digest, extra)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "digest": digest,
        "global_dim": global_dim,
        "local_dim": local_dim,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "version": version,
        "made_from": made_from,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    content = as_json(manifest)
    store.replace(lambda _: content, MODELS, name, MANIFEST, check=check)
    place = store.place(MODELS, name)
    return PublishedModel(place, digest, global_dim, local_dim, described, training, made_from, version)


def load_model(store: Store, name: str, device: str | torch.device = "cpu") -> tuple[CECA, PublishedModel]:
    """A published model, ready to embed.

    Raises:
        StoreError: there is none of this name (the message lists those there are), or it is damaged.
    """
    published = require_model(store, name)
    return load_weights(store, name, published.digest, device), published


def load_weights(store: Store, name: str, digest: str, device: str | torch.device = "cpu") -> CECA:
    """The model of this digest, although another may have been published under its name since.

    Raises:
        StoreError: it is gone or damaged.
    """
    stored = read_stored(store, name, digest)
    model = CECA(from_mapping(ModelConfig, stored.settings, f"{stored.place} config.json"))
    try:
        model.load_state_dict(safetensors.torch.load(stored.weights))
    except Exception as error:
        raise StoreError(f"{stored.place} is damaged: {error}; train it again with --redo") from error
    return model.to(device).eval()
