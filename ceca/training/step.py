"""One training step, whatever runs it: the order of samples, losses over the global batch, the optimiser's groups.

Notable: every worker computes the loss of the *whole* global batch from gathered features, in which only its own
carry a gradient. The sum of the workers' gradients is then the gradient of that one loss, with a single
collective forward and none backward. Trainers average gradients over workers, hence the factor in `scaled_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import open_clip
import pyarrow as pa
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ceca.config import LossConfig, ModelConfig, OptimiserConfig
from ceca.data.tables import share
from ceca.losses import (
    confidence_aware_weighting_loss,
    contrastive_loss,
    similarity_distribution_matching,
    triplet_alignment_loss,
)
from ceca.model.ceca import Features

REFERENCE_BATCH = 64  # the published global batch, to which the published rates belong


def world() -> tuple[int, int]:
    """This worker's rank and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_features(features: Features, batch: int) -> Features:
    """This worker's features [b, D] → those of all, [B, D], in the order of ranks; gradients only through own rows.

    Workers' shares of the batch are those of `share`. Features a model does not compute stay out. One collective in
    fp32 for all of them.
    """
    rank, size = world()
    if size == 1:
        return features
    names = [name for name, value in features._asdict().items() if value is not None]
    own = torch.cat([getattr(features, name).float() for name in names], dim=1)
    parts = _all_gather(own.detach(), batch)
    parts[rank] = own
    widths = [getattr(features, name).shape[1] for name in names]
    gathered = dict(zip(names, torch.cat(parts).split(widths, dim=1), strict=True))
    return features._replace(**gathered)


def gather_identities(identities: Tensor, batch: int) -> Tensor:
    """[b] → [B], in the order of ranks."""
    _, size = world()
    return identities if size == 1 else torch.cat(_all_gather(identities, batch))


def _all_gather(own: Tensor, batch: int) -> list[Tensor]:
    """Every worker's rows. Collectives want equal shapes, so shares are padded to the largest and cut again."""
    _, size = world()
    shares = [share(rank, size, batch) for rank in range(size)]
    lengths = [rows.stop - rows.start for rows in shares]
    padded = own.new_zeros(max(lengths), *own.shape[1:])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded)
    return [part[:length] for part, length in zip(parts, lengths, strict=True)]


def loss_terms(features: Features, identities: Tensor, config: LossConfig) -> dict[str, Tensor]:
    """The configured losses over the whole batch it is given, by name: scalars, fp32."""
    tal = {"temperature": config.temperature, "margin": config.margin}
    similarity = cosine(features.text, features.visual)

    def compute(term: str) -> Tensor:
        if term == "tal_global":
            return triplet_alignment_loss(similarity, identities, **tal).sum()
        if term == "tal_local":
            local_text, local_visual = _needed(features, term, "local_text", "local_visual")
            return triplet_alignment_loss(cosine(local_text, local_visual), identities, **tal).sum()
        if term == "cawl":
            return cawl(features, identities, config)[0].mean()
        if term == "infonce":
            return contrastive_loss(similarity, scale=config.scale).mean()
        if term == "sdm":
            return similarity_distribution_matching(similarity, identities, scale=config.scale).mean()
        if term == "identity":
            (identity_loss,) = _needed(features, term, "identity_loss")
            return config.identity_weight * identity_loss.mean()
        (word_loss,) = _needed(features, term, "word_loss")  # words
        loss, words = word_loss.sum(dim=0)
        return loss / words.clamp(min=1)

    return {term: compute(term) for term in config.terms}


def cawl(features: Features, identities: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """CAWL's losses and weights, [B] each."""
    (summary,) = _needed(features, "cawl", "summary")
    return confidence_aware_weighting_loss(
        summary,
        features.text,
        features.image,
        identities,
        scale=config.scale,
        gamma=config.gamma,
        weight_range=config.weight_range,
    )


def _needed(features: Features, term: str, *names: str) -> list[Tensor]:
    found = [getattr(features, name) for name in names]
    if any(value is None for value in found):
        raise ValueError(f"the loss {term} needs {', '.join(names)}, which this model does not compute")
    return found


def cosine(rows: Tensor, columns: Tensor) -> Tensor:
    """[B, D], [C, D] → [B, C] in fp32."""
    return F.normalize(rows.float(), dim=1) @ F.normalize(columns.float(), dim=1).T


def scaled_loss(terms: dict[str, Tensor]) -> Tensor:
    """The sum of the terms, times the number of workers: what to call backward on."""
    _, size = world()
    return size * torch.stack(list(terms.values())).sum()


def parameter_groups(model: nn.Module, config: OptimiserConfig, batch: int = REFERENCE_BATCH) -> list[dict[str, Any]]:
    """CLIP and new modules, weights and biases apart: rates and decay as published, the rates by `batch_rule`."""
    factor = {"fixed": 1.0, "linear": batch / REFERENCE_BATCH, "sqrt": (batch / REFERENCE_BATCH) ** 0.5}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name.startswith("backbone."), name.endswith("bias")), []).append(parameter)
    made = []
    for (is_clip, is_bias), parameters in groups.items():
        rate = config.learning_rate * (2 if is_bias else 1) if is_clip else config.new_learning_rate
        rate *= factor[config.batch_rule]
        made.append({"params": parameters, "lr": rate, "weight_decay": 0.0 if is_bias else config.weight_decay})
    return made


def rate_factor(step: int, *, warmup: float, total: int, start: float) -> float:
    """Factor of the learning rate at a step: linear from `start` over `warmup` steps, then cosine to 0."""
    if step < warmup:
        return start + (1 - start) * step / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, total - warmup))))


def better(candidate: dict[str, float], best: dict[str, float] | None, keys: Sequence[str]) -> bool:
    """Whether validation metrics improve, compared key by key; equal ones do not."""
    return best is None or [candidate[key] for key in keys] > [best[key] for key in keys]


def step_flops(config: ModelConfig, batch: int, text_tokens: int) -> float:
    """Floating-point operations that a training step needs: forward, and twice that backward.

    Counted are matrix products; padding and what is computed twice do not count.

    Args:
        batch: samples. text_tokens: of their captions and summaries together, start and end included.
    """
    clip = open_clip.get_model_config(config.backbone)
    vision, text, width = clip["vision_cfg"], clip["text_cfg"], clip["embed_dim"]
    patch = vision["patch_size"]
    patches = (config.image_height // patch) * (config.image_width // patch)
    texts = batch * (2 if config.summary_weight else 1)
    length = text_tokens / texts
    forward = 6 * batch * patches * patch**2 * vision["width"]
    for tower, tokens, span in ((vision, batch * (patches + 1), patches + 1), (text, text_tokens, length)):
        size = tower["width"]
        block = (8 + 4 * tower.get("mlp_ratio", 4)) * size**2 + 4 * span * size
        forward += tokens * (tower["layers"] * block + 2 * size * width)
    if config.local_branch:
        own = batch * patches + text_tokens
        forward += own * (4 * width * config.local_dim + 2 * width**2)
        if config.mixer != "none":
            forward += own * 16 * width**2 + 4 * width * (batch * patches**2 + text_tokens * length)
        for side in ("image", "text") if config.summary_weight else ():
            if config.mixer in (side, "bidirectional"):  # queries and outputs of own tokens, keys and values of others
                ends = (batch * patches, batch * length) if side == "image" else (batch * length, batch * patches)
                conditions = config.condition_ratio * ends[1]
                forward += 4 * width**2 * (ends[0] + conditions) + 4 * width * ends[0] * conditions / batch
    return 3 * forward


class Curve:
    """The loss of every step, term by term.

    Losses stay on their device until `flush`, for reading one would wait for the step that makes it.
    """

    def __init__(self) -> None:
        self.columns: dict[str, list[float]] = {}
        self.pending: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def add(self, terms: dict[str, Tensor]) -> None:
        self.pending.append({name: value.detach() for name, value in terms.items()})

    def flush(self) -> None:
        """Bring the pending losses to this process."""
        if not self.pending:
            return
        names = list(self.pending[0])
        rows = torch.stack([torch.stack([terms[name] for name in names]) for terms in self.pending]).tolist()
        for name, values in zip(names, zip(*rows, strict=True), strict=True):
            self.columns.setdefault(name, []).extend(values)
        self.pending = []

    def mean(self, last: int) -> dict[str, float]:
        """The mean of each term over the last steps, and of their sum under `loss`."""
        self.flush()
        means = {name: sum(values[-last:]) / last for name, values in self.columns.items()}
        return {"loss": sum(means.values()), **means}

    def table(self) -> pa.Table:
        """One row per step: `step` from 1, `loss`, and a column per term."""
        self.flush()
        total = [sum(values) for values in zip(*self.columns.values(), strict=True)]
        steps = list(range(1, len(total) + 1))
        return pa.table({"step": pa.array(steps, pa.int64()), "loss": pa.array(total, pa.float64()), **self.columns})

    @classmethod
    def from_table(cls, table: pa.Table) -> Curve:
        made = cls()
        made.columns = {name: table[name].to_pylist() for name in table.column_names if name not in ("step", "loss")}
        return made
