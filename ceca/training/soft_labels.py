"""Soft labels: pictures of nobody known that are described alike are no negatives of each other (method: Soft labels).

Notable: likeness is the share of common words. It needs no model, so it is the same from the first step to the last, on
every machine, and whatever the model has learned; captions of the dataset are compared, before words are masked.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ceca.config import LossConfig
from ceca.losses import same_identity
from ceca.model.backbone import send
from ceca.model.tokens import END, START
from ceca.training.order import batch_slice
from ceca.training.workers import gather_rows, world

NEVER = -1e4  # instead of log 0: finite, and small enough for every temperature


def soft_labels(batch: dict[str, np.ndarray], identities: Tensor, config: LossConfig) -> Tensor | None:
    """How much each sample of the global batch counts as a negative of this worker's samples, for `loss_terms`.

    Args:
        batch: this worker's part: caption [b, context], and nobody [b], whether nobody named the image's person.
        identities: [B] of the global batch.
        config: whether there are soft labels.

    Returns:
        [b, B] of `negative_weights`; None without soft labels.
    """
    if not config.soft_labels:
        return None
    words = send(torch.tensor(batch["caption"], dtype=torch.long), identities.device)
    nobody = send(torch.tensor(batch["nobody"]), identities.device)
    of_all = gather_rows(words, len(identities))
    own = identities[batch_slice(*world(), len(identities))]
    softened = nobody[:, None] & ~same_identity(own, identities)
    return negative_weights(words, of_all, softened, config.soft_labels)


def negative_weights(rows: Tensor, columns: Tensor, softened: Tensor, enough: float) -> Tensor:
    """Weights of columns as negatives of rows: log(1 − min(1, J / enough)) where they are softened, else 0.

    J is the number of words that both captions have, divided by the number of words that one of them has.

    Args:
        rows: [b, N] token ids of captions.
        columns: [B, N] token ids of captions.
        softened: [b, B] booleans.
        enough: J from which a column is no negative, above 0.

    Returns:
        [b, B] fp32, with `NEVER` instead of log 0.
    """
    mine, theirs = _has_word(rows), _has_word(columns)
    common = mine @ theirs.T
    either = mine.sum(dim=1)[:, None] + theirs.sum(dim=1)[None, :] - common
    label = (common / either.clamp(min=1) / enough).clamp(max=1)
    return torch.where(softened, torch.log1p(-label).clamp(min=NEVER), 0.0)


def _has_word(ids: Tensor) -> Tensor:
    """Which words of the vocabulary texts have: ids [B, N] → [B, END + 1] of 0 and 1. Start, end, padding are none."""
    found = torch.zeros(len(ids), END + 1, device=ids.device).scatter_(1, ids, 1.0)
    found[:, 0], found[:, START], found[:, END] = 0.0, 0.0, 0.0
    return found
