"""Embed decoded images and plain texts with a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ceca.model.backbone import send, tokenize, trim
from ceca.model.ceca import CECA

# CLIP's pixel statistics.
MEAN = (0.48145466, 0.4578275, 0.40821073)


STD = (0.26862954, 0.26130258, 0.27577711)


def normalize(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] → float32 [B, 3, H, W], by CLIP's mean and deviation."""
    mean, std = (send(torch.tensor(values) * 255, images.device) for values in (MEAN, STD))
    return ((images.float() - mean) / std).permute(0, 3, 1, 2).contiguous()


@torch.inference_mode()
def embed_texts(model: CECA, texts: list[str], device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """Queries → normalised global [Q, D] and local [Q, E], fp32."""
    return model.embed_queries(send(trim(tokenize(texts, model.config.context)), device))


@torch.inference_mode()
def embed_images(
    model: CECA, pixels: Sequence[np.ndarray], summaries: list[str] | None, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """Decoded images, uint8 [H, W, 3] each → normalised global [N, D] and local [N, E].

    With their summaries as a gallery has them, without as a query.
    """
    images = normalize(send(torch.from_numpy(np.stack(pixels)), device))
    told = None if summaries is None else send(trim(tokenize(summaries, model.config.context)), device)
    return model.embed_gallery(images, told)
