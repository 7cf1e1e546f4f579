"""Validation inside a training run: fused-similarity metrics on held-out images, embedded by all workers together."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import ray
import torch
import torch.distributed as dist
from torch import Tensor

from ceca.config import OMEGA
from ceca.datasets.images import decode_image
from ceca.metrics import retrieval_metrics
from ceca.model.backbone import tokenize, trim
from ceca.model.ceca import CECA, fused_similarity
from ceca.model.embed import normalize
from ceca.training.workers import world
from jobs.training.data import HeldOut, Run


class EmbeddedShare(NamedTuple):
    """One worker's part of the held-out images and sentences: embeddings (global, local) and identities."""

    gallery: tuple[Tensor, ...]
    gallery_identities: list[int]
    queries: tuple[Tensor, ...]
    query_identities: list[int]


@torch.no_grad()
def validate(model: CECA, run: Run, device: torch.device, batch: int = 64) -> dict[str, float]:
    """Fused-similarity metrics of the held-out images: every worker embeds a part, rank 0 compares.

    Args:
        model: the model as it is now.
        run: the worker's input; `run.validation` is not None.
        device: device of the model.
        batch: images or sentences embedded together.

    Returns:
        The metrics by key, on every worker.
    """
    rank, size = world()
    share = _embed_share(model, run, device, batch)
    shares: list[Any] = [None] * size
    if size > 1:
        dist.all_gather_object(shares, share)
    else:
        shares[0] = share
    metrics: list[Any] = [None]
    if rank == 0:
        gallery = _join([share.gallery for share in shares if share.gallery])
        queries = _join([share.queries for share in shares if share.queries])
        config = run.config
        omega = OMEGA["released"] if config.protocol == "released" else config.validation_omega
        similarity = fused_similarity(queries, gallery, omega)  # type: ignore[arg-type]
        query_identities = np.concatenate([share.query_identities for share in shares])
        gallery_identities = np.concatenate([share.gallery_identities for share in shares])
        metrics = [retrieval_metrics(similarity, query_identities, gallery_identities).as_dict()]
    if size > 1:
        dist.broadcast_object_list(metrics, src=0)
    return metrics[0]


def _embed_share(model: CECA, run: Run, device: torch.device, batch: int) -> EmbeddedShare:
    """Embed every size-th image and sentence, beginning with this worker's rank."""
    rank, size = world()
    held_out: HeldOut = ray.get(run.validation)
    model.eval()
    config, dtype = run.config.model, next(model.parameters()).dtype
    form = config.image_height, config.image_width, config.image_resize
    gallery, queries = [], []
    rows = held_out.images[rank::size]
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        encoded = run.images.read([row.part for row in part], [row.row for row in part])
        pixels = np.stack([decode_image(image, *form) for image in encoded])
        images = normalize(torch.from_numpy(pixels).to(device)).to(dtype)
        summaries = trim(tokenize([row.summary for row in part], config.context)).to(device)
        gallery.append([side.cpu() for side in model.embed_gallery(images, summaries)])
    sentences = held_out.sentences[rank::size]
    for start in range(0, len(sentences), batch):
        texts = [sentence.text for sentence in sentences[start : start + batch]]
        ids = trim(tokenize(texts, config.context)).to(device)
        queries.append([side.cpu() for side in model.embed_queries(ids)])
    return EmbeddedShare(
        _join(gallery), [row.identity for row in rows], _join(queries), [sentence.identity for sentence in sentences]
    )


def _join(pairs: list[Any]) -> tuple[Tensor, ...]:
    """Concatenate (global, local) embeddings along the rows."""
    return tuple(torch.cat(parts) for parts in zip(*pairs, strict=True))
