"""Weights in and out: CLIP weights from a tag, file or URI; published models as safetensors beside their config.

A published model is three objects and a manifest written last:
    models/<name>/<digest>/{model.safetensors, config.json, training.json}    models/<name>/manifest.json
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from ceca.config import ModelConfig
from ceca.data.names import MANIFEST, MODELS
from ceca.data.schema import SCHEMA_VERSION
from ceca.data.store import Store, StoreError
from ceca.model.archive import Record, read_archive, tensors_of
from ceca.model.backbone import Backbone, WeightsError
from ceca.model.ceca import CECA
from ceca.model.registry import PublishedModel, locate, require_model
from ceca.settings import from_mapping, to_mapping

# What OpenAI's files carry besides weights, and the scale that nothing here uses.
NOT_WEIGHTS = ("logit_scale", "logit_bias", "input_resolution", "context_length", "vocab_size", "attn_mask")


def load_clip_weights(backbone: Backbone, name: str, source: str) -> None:
    """Load CLIP weights, position embeddings interpolated to the backbone's image size.

    Args:
        name: the backbone's name. source: open_clip tag (downloaded), local file, or URI.

    Raises:
        WeightsError: not found, not weights, or weights of another model.
    """
    weights = read_weights(name, source)
    weights = {key.removeprefix("module."): value for key, value in weights.items()}
    weights = {key: value.float() for key, value in weights.items() if key not in NOT_WEIGHTS}
    own = {key: value for key, value in backbone.clip.state_dict().items() if key not in NOT_WEIGHTS}
    key = "visual.positional_embedding"
    if key in weights and key in own and weights[key].shape[1] == own[key].shape[1]:
        weights[key] = interpolate_positions(weights[key], backbone.clip.visual.grid_size)
    wrong = [k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape]
    problems = {"missing": own.keys() - weights.keys(), "unknown": weights.keys() - own.keys(), "of other shape": wrong}
    if any(problems.values()):
        found = "; ".join(f"{len(keys)} {what}, e.g. {sorted(keys)[0]}" for what, keys in problems.items() if keys)
        raise WeightsError(
            f"{source!r} does not hold the weights of {name}: {found}; choose the matching --model.backbone"
        )
    backbone.clip.load_state_dict(weights, strict=False)


def interpolate_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """[1 + n², D] position embeddings, class first → [1 + h·w, D], bilinearly from the square grid."""
    start, patches = positions[:1], positions[1:]
    side = round(len(patches) ** 0.5)
    if side * side != len(patches):
        raise WeightsError(f"position embeddings of {len(patches)} patches are not from a square grid")
    square = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bilinear", align_corners=False)
    return torch.cat([start, resized.flatten(2).transpose(1, 2)[0]])


def read_weights(name: str, source: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint: safetensors, a plain torch file, or OpenAI's TorchScript archive.

    Args:
        name: the backbone's name, for tags. source: open_clip tag, local file or URI.

    Raises:
        WeightsError: not found, or something else than tensors is in it.
    """
    path = _find_weights(name, source)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        found = read_archive(path)
        found = tensors_of(found) if isinstance(found, Record) else found  # OpenAI's own files are TorchScript
    except Exception as error:
        raise WeightsError(f"{source!r} cannot be read as weights ({type(error).__name__}: {error})") from error
    for key in ("state_dict", "model"):  # where trainers keep weights beside the optimiser's state
        found = found.get(key, found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise WeightsError(f"{source!r} holds something else than named weights")
    return found


def _find_weights(name: str, source: str) -> Path:
    if "://" in source:
        try:
            return Path(fsspec.open_local(f"simplecache::{source}"))
        except (OSError, ValueError) as error:
            raise WeightsError(f"cannot fetch weights from {source!r}: {error}") from error
    if Path(source).is_file():
        return Path(source)
    import open_clip  # slow to import, and only a download needs it

    tags = open_clip.list_pretrained_tags_by_model(name)
    if source not in tags:
        raise WeightsError(f"no weights {source!r}: not a file, and the tags of {name} are {', '.join(tags) or 'none'}")
    try:
        return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(name, source)))
    except Exception as error:
        raise WeightsError(
            f"cannot download {name} {source!r} ({type(error).__name__}: {error}); "
            "fetch the file where there is a network and pass its path as --model.pretrained"
        ) from error


def build_model(config: ModelConfig) -> CECA:
    """A model to train: CLIP's weights where the configuration names them, random ones elsewhere."""
    model = CECA(config)
    if config.pretrained is not None:
        load_clip_weights(model.backbone, config.backbone, config.pretrained)
    return model


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
) -> PublishedModel:
    """Publish a model under models/<name>, `extras` beside it by name; the manifest comes last."""
    global_dim = safetensors.torch.load(weights)["backbone.clip.text_projection"].shape[1]
    local_dim = model.local_dim if model.local_branch else global_dim
    described = {"schema_version": SCHEMA_VERSION, "model": to_mapping(model), "train": config}
    digest = hashlib.sha256(weights + json.dumps(described["model"], sort_keys=True).encode()).hexdigest()[:16]
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
    store.write_json(manifest, MODELS, name, MANIFEST)
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
    home, names = locate(store, name)
    place = home.place(*names, digest)
    described = home.read_json(*names, digest, "config.json")
    if described is None:
        raise StoreError(f"{place} has no config.json; train the model again with --redo")
    model = CECA(from_mapping(ModelConfig, described["model"], f"{place} config.json"))
    try:
        model.load_state_dict(safetensors.torch.load(home.read_bytes(*names, digest, "model.safetensors")))
    except FileNotFoundError:
        raise StoreError(f"{place} has no model.safetensors; train it again with --redo") from None
    except Exception as error:
        raise StoreError(f"{place} is damaged: {error}; train it again with --redo") from error
    return model.to(device).eval()
