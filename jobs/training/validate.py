"""Validation inside a training run: fused-similarity metrics on held-out images, every worker embedding a share."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from torch import Tensor

from ceca.datasets.images import decode_image
from ceca.metrics import retrieval_metrics
from ceca.model.backbone import tokenize, trim
from ceca.model.ceca import CECA, fused_similarity
from ceca.model.embed import normalize
from ceca.training.workers import world
from jobs.training.data import EncodedImages, Run

OMEGA = 0.3  # of validation; evaluation sweeps it


@torch.no_grad()
def validate(model: CECA, run: Run, device: torch.device, batch: int = 64) -> dict[str, float]:
    """Fused-similarity metrics; each worker embeds its share, rank 0 compares."""
    rank, size = world()
    validation = ray.get(run.validation)
    encoded = EncodedImages(run.images)
    model.eval()
    config, dtype = run.config.model, next(model.parameters()).dtype
    gallery, queries = [], []
    mine = validation["images"][rank::size]
    for start in range(0, len(mine), batch):
        rows = mine[start : start + batch]
        pixels = np.stack(
            [decode_image(encoded(row[0], row[1]), config.image_height, config.image_width) for row in rows]
        )
        images = normalize(torch.from_numpy(pixels).to(device)).to(dtype)
        summaries = trim(tokenize([row[3] for row in rows])).to(device)
        gallery.append([part.cpu() for part in model.embed_gallery(images, summaries)])
    texts = validation["queries"][rank::size]
    for start in range(0, len(texts), batch):
        ids = trim(tokenize([text for text, _ in texts[start : start + batch]])).to(device)
        queries.append([part.cpu() for part in model.embed_queries(ids)])
    own = (_join(gallery), [row[2] for row in mine], _join(queries), [identity for _, identity in texts])
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, own) if size > 1 else everyone.__setitem__(0, own)
    found: list[Any] = [None]
    if rank == 0:
        gallery_pairs = _join([part[0] for part in everyone if part[0]])
        query_pairs = _join([part[2] for part in everyone if part[2]])
        similarity = fused_similarity(query_pairs, gallery_pairs, OMEGA)  # type: ignore[arg-type]
        query_identities = np.concatenate([part[3] for part in everyone])
        gallery_identities = np.concatenate([part[1] for part in everyone])
        found = [retrieval_metrics(similarity, query_identities, gallery_identities).as_dict()]
    if size > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0]


def _join(pairs: list[Any]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(parts) for parts in zip(*pairs, strict=True))
