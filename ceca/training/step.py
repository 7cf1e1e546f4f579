"""One training step over the global batch: augmentation, forward pass, losses, backward pass, the optimiser's step.

Notable: the host hands the device work and never waits for a result (a test runs the step on a device that cannot be
read). Every worker computes the losses of its own samples, each text with all images and each image with all texts.
Its memory is therefore its share of the batch times the batch. The gathered features carry gradients back to their
workers (`workers`), so the sum of all workers' gradients is that of the one loss. DeepSpeed averages gradients over
workers, hence the factor in `scaled_loss`.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ceca.config import LossConfig, Term, TrainConfig
from ceca.losses import (
    DistributionMatching,
    IdentityCrossEntropy,
    RowLoss,
    TripletAlignment,
    cawl_comparisons,
    compare,
    confidence_aware_weighting_loss,
    confidence_weights,
    weigh_entropies,
)
from ceca.model.backbone import send, trim
from ceca.model.ceca import Features
from ceca.training.augment import augment_images, draw, generator, hide_words, mask_words
from ceca.training.engine import take_step
from ceca.training.order import batch_slice
from ceca.training.precision import BF16Backward
from ceca.training.soft_labels import soft_labels
from ceca.training.workers import (
    gather_features,
    gather_identities,
    gather_rows,
    sum_over_workers,
    world,
)


def train_step(
    engine: Any,
    batch: dict[str, np.ndarray],
    config: TrainConfig,
    epoch: int,
    step: int,
    device: torch.device,
    whole: int | None = None,
    clean: Tensor | None = None,
) -> tuple[Features, Tensor, dict[str, Tensor]]:
    """Take one step over the global batch; arguments as `batch_features`.

    Args:
        clean: [B] booleans, the samples to learn from; None: all.

    Returns:
        The features and identities of the global batch, and the loss terms.
    """
    features, identities = batch_features(engine, batch, config, epoch, step, device, whole)
    terms = loss_terms(features, identities, config.losses, clean, soft_labels(batch, identities, config.losses))
    engine.backward(scaled_loss(terms))
    take_step(engine)
    return features, identities, terms


def batch_features(
    engine: Any,
    batch: dict[str, np.ndarray],
    config: TrainConfig,
    epoch: int,
    step: int,
    device: torch.device,
    whole: int | None = None,
) -> tuple[Features, Tensor]:
    """Compute the features of the global batch.

    Args:
        engine: what `engine.make_engine` returned.
        batch: this worker's part: image [b, H, W, 3] uint8, caption and summary [b, context], identity [b].
        config: settings of the training.
        epoch: number of the epoch, from 0.
        step: number of the step in the epoch, from 0.
        device: device of the model.
        whole: B, samples in the global batch; None takes the configured number.

    Returns:
        The features and identities of the global batch.
    """
    whole = config.global_batch if whole is None else whole
    mine = batch_slice(*world(), whole)
    ids = torch.tensor(batch["caption"], dtype=torch.long)
    source = generator(config.seed, epoch, step)
    draws = draw(whole, ids.shape[1], source).rows(mine)
    captions = mask_words(ids, draws, config.augmentation.word_mask)
    texts, words = [captions], None
    if config.model.summary_weight > 0:
        texts.append(torch.tensor(batch["summary"], dtype=torch.long))
    if "words" in config.losses.terms:
        words = hide_words(ids, draw(whole, ids.shape[1], source).rows(mine))
        texts.append(words.ids)
    trimmed = trim(torch.cat(texts))
    if words is not None:
        words = words.trimmed(trimmed.shape[1]).to(device)
    parts = send(trimmed, device).split(len(ids))
    images = augment_images(send(torch.tensor(batch["image"]), device), draws, config.augmentation)
    images = images.to(next(engine.module.parameters()).dtype)
    identity = send(torch.tensor(batch["identity"]), device)
    labels = identity if "identity" in config.losses.terms else None
    summaries = parts[1] if config.model.summary_weight > 0 else None
    with BF16Backward() if config.backward == "bf16" else contextlib.nullcontext():
        local_features = engine(images, parts[0], summaries, labels, words)
    return gather_features(local_features, whole), gather_identities(identity, whole)


def loss_terms(
    features: Features,
    identities: Tensor,
    config: LossConfig,
    clean: Tensor | None = None,
    log_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """The configured losses over a batch: name of the term → fp32 scalar.

    Every worker gets the same values. Their gradients are those of this worker's samples; `workers.gather_features`
    adds the gradients of all workers up.

    Args:
        features: of the global batch (`workers.gather_features`).
        identities: [B] of its samples.
        config: the terms and their constants.
        clean: [B] booleans. The losses of other samples do not count, but others are compared with them. None: all.
        log_weights: [b, B] of `soft_labels`; None: every sample of another identity is a whole negative.

    Raises:
        ValueError: a term needs features that the model does not compute.
    """
    batch = _Batch(features, identities, config, log_weights)
    own = [_term(term, batch, clean) for term in config.terms]
    return dict(zip(config.terms, sum_over_workers(torch.stack(own)).unbind(), strict=True))


def branch_losses(
    features: Features, identities: Tensor, config: LossConfig, log_weights: Tensor | None = None
) -> Tensor:
    """The triplet alignment loss of every sample by the global and the local branch, [2, B], without gradients."""
    batch = _Batch(features, identities, config, log_weights)
    own = torch.stack([batch.triplets(name) for name in ("tal_global", "tal_local")])
    return gather_rows(own.T, len(identities)).T


class _Batch:
    """The global batch as this worker compares its own samples with it.

    Args:
        features: of the global batch.
        identities: [B] of its samples.
        config: the constants of the losses.
        log_weights: [b, B] of the samples as negatives of this worker's own; None: all count once.
    """

    def __init__(self, features: Features, identities: Tensor, config: LossConfig, log_weights: Tensor | None = None):
        self.features, self.identities, self.config, self.log_weights = features, identities, config, log_weights
        self.own = batch_slice(*world(), len(identities))
        self.unit: dict[str, Tensor] = {}  # normalised features by name

    def needed(self, term: str, *names: str) -> list[Tensor]:
        """Normalised features [B, D]."""
        for name, value in zip(names, _needed(self.features, term, *names), strict=True):
            if name not in self.unit:
                self.unit[name] = F.normalize(value.float(), dim=1)
        return [self.unit[name] for name in names]

    def both(self, term: str, loss: RowLoss, text: str, visual: str, people: Tensor | None = None) -> Tensor:
        """Losses of own samples, [b]: a text with all images plus an image with all texts."""
        sides = self.needed(term, text, visual)
        people = self.identities if people is None else people
        rows = [side[self.own] for side in sides]
        return compare(loss, rows, sides[::-1], people[self.own], people, self.log_weights).sum(dim=0)

    def triplets(self, term: str) -> Tensor:
        """TAL of own samples, [b], by the branch that the term names."""
        names = ("text", "visual") if term == "tal_global" else ("local_text", "local_visual")
        return self.both(term, TripletAlignment(self.config.temperature, self.config.margin), *names)

    def weighted(self) -> Tensor:
        """CAWL of own samples, [b]."""
        summary, text, image = self.needed("cawl", "summary", "text", "image")
        loss = IdentityCrossEntropy(self.config.scale)
        sides = cawl_comparisons(summary, text, image, self.own)
        entropies = compare(loss, *sides, self.identities[self.own], self.identities, self.log_weights)
        of_all = gather_rows(entropies[:2].detach().T, len(self.identities)).T
        weight = confidence_weights(*of_all, gamma=self.config.gamma, weight_range=self.config.weight_range)
        return weigh_entropies(entropies, weight[self.own])


def _term(term: Term, batch: _Batch, clean: Tensor | None) -> Tensor:
    """A loss of this worker's samples; those of all workers add up to the term."""
    config, own = batch.config, batch.own
    samples = len(batch.identities) if clean is None else clean.sum().clamp(min=1)
    clean_own = None if clean is None else clean[own]
    match term:
        case "tal_global" | "tal_local":
            return _chosen(batch.triplets(term), clean_own).sum()
        case "cawl":
            return _chosen(batch.weighted(), clean_own).sum() / samples
        case "infonce":
            alone = torch.arange(len(batch.identities), device=batch.identities.device)  # its own only positive
            losses = batch.both(term, IdentityCrossEntropy(config.scale), "text", "visual", alone)
            return 0.5 * _chosen(losses, clean_own).sum() / samples
        case "sdm":
            losses = batch.both(term, DistributionMatching(config.scale), "text", "visual")
            return _chosen(losses, clean_own).sum() / samples
        case "identity":
            (identity_loss,) = _needed(batch.features, term, "identity_loss")
            return config.identity_weight * _chosen(identity_loss[own, 0], clean_own).sum() / samples
        case "words":
            (word_loss,) = _needed(batch.features, term, "word_loss")
            words = _chosen(word_loss[:, 1].detach(), clean).sum()
            return _chosen(word_loss[own, 0], clean_own).sum() / words.clamp(min=1)


def _chosen(losses: Tensor, clean: Tensor | None) -> Tensor:
    """The losses [B], 0 for samples that are not clean."""
    return losses if clean is None else losses.masked_fill(~clean, 0.0)


def cawl(features: Features, identities: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """The losses and the weights of CAWL over a whole batch on one worker, [B] each."""
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
    values = [getattr(features, name) for name in names]
    if any(value is None for value in values):
        raise ValueError(f"the loss {term} needs {', '.join(names)}, which this model does not compute")
    return values


def scaled_loss(terms: dict[str, Tensor]) -> Tensor:
    """The loss for the backward pass: the sum of the terms times the number of workers."""
    _, size = world()
    return size * torch.stack(list(terms.values())).sum()
