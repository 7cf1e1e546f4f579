"""CECA: global branch, local branch, and the embeddings that a gallery and a query have (method).

A gallery image is embedded from its pixels and its summary; a query from its words alone. With a summary weight
of 0, summaries enter nowhere, neither the sum nor the mixer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ceca.config import ModelConfig
from ceca.model.backbone import Backbone, Tokens
from ceca.model.mixer import MixerBlock, TokenEmbedding, select_tokens


class Features(NamedTuple):
    """Features of a batch, [B, D] each, not normalised: what the losses are made of.

    `image`, `text`, `summary` are the towers' own; `visual` is g, image and summary combined; `local_visual` and
    `local_text` come from the local branch. `summary` is None where summaries are not used. A tuple, for DeepSpeed
    finds tensors in no other record, and ZeRO 3 gathers parameters for the backward pass where it finds them.
    """

    image: Tensor
    text: Tensor
    summary: Tensor | None
    visual: Tensor
    local_visual: Tensor
    local_text: Tensor


class CECA(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        width = self.backbone.width
        self.visual_mixer = MixerBlock(width, config.mixer_heads, config.gate_start)
        self.textual_mixer = MixerBlock(width, config.mixer_heads, config.gate_start)
        self.visual_embedding = TokenEmbedding(width, config.local_dim)
        self.textual_embedding = TokenEmbedding(width, config.local_dim)

    @property
    def uses_summaries(self) -> bool:
        return self.config.summary_weight > 0

    @property
    def global_dim(self) -> int:
        return self.backbone.width

    def forward(self, images: Tensor, captions: Tensor, summaries: Tensor | None) -> Features:
        """Training: images [B, 3, H, W]; captions, summaries [B, L] token ids (one L for both)."""
        batch = len(images)
        image = self.backbone.encode_images(images)
        if not self.uses_summaries or summaries is None:
            text = self.backbone.encode_texts(captions)
            tokens, present = self._mix_text(text)
            local_text = self.textual_embedding(tokens, present)
            visual_tokens = self._mix_image(image, None)
            local_visual = self.visual_embedding(*visual_tokens)
            return Features(image.summit, text.summit, None, image.summit, local_visual, local_text)

        both = self.backbone.encode_texts(torch.cat([captions, summaries]))
        text, summary = both.rows(slice(0, batch)), both.rows(slice(batch, None))
        # One pass through the textual embedding: captions and summaries share its batch statistics.
        mixed_text, mixed_summary = self._mix_text(text), self._mix_text(summary, image)
        locals_ = self.textual_embedding(*(torch.cat(pair) for pair in zip(mixed_text, mixed_summary, strict=True)))
        local_text, local_summary = locals_[:batch], locals_[batch:]
        local_image = self.visual_embedding(*self._mix_image(image, summary))
        return Features(
            image.summit,
            text.summit,
            summary.summit,
            self._combine(image.summit, summary.summit),
            self._combine(local_image, local_summary),
            local_text,
        )

    def embed_gallery(self, images: Tensor, summaries: Tensor | None) -> tuple[Tensor, Tensor]:
        """Images and their summaries → global [B, D] and local [B, E] embeddings, L2-normalised."""
        image = self.backbone.encode_images(images)
        if not self.uses_summaries or summaries is None:
            visual, local = image.summit, self.visual_embedding(*self._mix_image(image, None))
        else:
            summary = self.backbone.encode_texts(summaries)
            visual = self._combine(image.summit, summary.summit)
            local_image = self.visual_embedding(*self._mix_image(image, summary))
            local = self._combine(local_image, self.textual_embedding(*self._mix_text(summary, image)))
        return F.normalize(visual.float(), dim=1), F.normalize(local.float(), dim=1)

    def embed_queries(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [B, L] → global [B, D] and local [B, E] embeddings, L2-normalised."""
        text = self.backbone.encode_texts(texts)
        local = self.textual_embedding(*self._mix_text(text))
        return F.normalize(text.summit.float(), dim=1), F.normalize(local.float(), dim=1)

    def _combine(self, image: Tensor, summary: Tensor) -> Tensor:
        weight = self.config.summary_weight
        return (1 - weight) * image + weight * summary

    def _mix_image(self, image: Tokens, summary: Tokens | None) -> tuple[Tensor, Tensor]:
        own, present = select_tokens(image, self.config.token_ratio)
        condition = self._condition(summary) if summary is not None else (None, None)
        return self.visual_mixer(own, present, *condition), present

    def _mix_text(self, text: Tokens, image: Tokens | None = None) -> tuple[Tensor, Tensor]:
        own, present = select_tokens(text, self.config.token_ratio)
        condition = self._condition(image) if image is not None else (None, None)
        return self.textual_mixer(own, present, *condition), present

    def _condition(self, other: Tokens) -> tuple[Tensor, Tensor]:
        return select_tokens(other, self.config.condition_ratio if self.training else 1.0)


def fused_similarity(query: tuple[Tensor, Tensor], gallery: tuple[Tensor, Tensor], omega: float) -> Tensor:
    """S = (1-ω)·cos_global + ω·cos_local: normalised (global, local) pairs [Q, ·] and [G, ·] → [Q, G]."""
    return (1 - omega) * query[0] @ gallery[0].T + omega * query[1] @ gallery[1].T
