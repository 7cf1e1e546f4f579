"""CECA: global branch, local branch, and the embeddings that a gallery and a query have (method).

A gallery image is embedded from its pixels and its summary; a query from its words alone. With a summary weight
of 0, summaries enter nowhere, neither the sum nor the mixer. A model without local branch (plain CLIP, IRRA) has its
global embedding in both places, so that everything after training treats all models alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ceca.config import ModelConfig
from ceca.model.backbone import RECOMPUTE, Backbone, Tokens
from ceca.model.irra import IRRAHeads, WordTask
from ceca.model.mixer import MixerBlock, ReleasedMixerBlock, TokenEmbedding, select_tokens

HEADS = "heads."  # parameters below this name serve training alone


class Features(NamedTuple):
    """Features of a batch, [B, D] each, not normalised: what the losses are made of.

    `image`, `text`, `summary` are the towers' own; `visual` is g, image and summary combined; `local_visual` and
    `local_text` come from the local branch. `summary` is None where summaries are not used, the local ones where
    there is no local branch. `identity_loss` [B, 1] and `word_loss` [B, 2] are what IRRA's heads add. A tuple, for
    DeepSpeed finds tensors in no other record, and ZeRO 3 gathers parameters for the backward pass where it finds them.
    """

    image: Tensor
    text: Tensor
    summary: Tensor | None
    visual: Tensor
    local_visual: Tensor | None = None
    local_text: Tensor | None = None
    identity_loss: Tensor | None = None
    word_loss: Tensor | None = None


class CECA(nn.Module):
    """The model; `micro_batch` is how many samples pass a tower at once in training (None: all).

    With a micro-batch, towers keep no activations but their outputs and compute them again in the backward pass,
    while the local branch and the losses see the whole batch: the gradient is that of the whole batch (GradCache).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.micro_batch: int | None = None
        self.backbone = Backbone(config)
        width = self.backbone.width
        self.heads: IRRAHeads | None = None
        self.visual_mixer = self._make_mixer("image")
        self.textual_mixer = self._make_mixer("text")
        if config.local_branch:
            self.visual_embedding = TokenEmbedding(width, config.local_dim)
            self.textual_embedding = TokenEmbedding(width, config.local_dim)

    def _make_mixer(self, side: str) -> MixerBlock | ReleasedMixerBlock | None:
        config = self.config
        if not config.local_branch or config.mixer == "none":
            return None
        crosses = self.uses_summaries and config.mixer in (side, "bidirectional")
        block = ReleasedMixerBlock if self.backbone.released else MixerBlock
        return block(self.backbone.width, config.mixer_heads, config.gate_start, crosses)

    @property
    def uses_summaries(self) -> bool:
        return self.config.summary_weight > 0

    @property
    def global_dim(self) -> int:
        return self.backbone.width

    @property
    def local_dim(self) -> int:
        return self.config.local_dim if self.config.local_branch else self.backbone.width

    def add_heads(self, identities: int) -> None:
        """Add IRRA's heads for training on so many identities."""
        vocabulary = self.backbone.clip.token_embedding.num_embeddings
        self.heads = IRRAHeads(self.backbone.width, self.config.mixer_heads, identities, vocabulary)

    def forward(
        self,
        images: Tensor,
        captions: Tensor,
        summaries: Tensor | None,
        labels: Tensor | None = None,
        words: WordTask | None = None,
    ) -> Features:
        """Training: images [B, 3, H, W]; captions, summaries [B, L] token ids (one L for all).

        `labels` [B] (numbers of the training identities) and `words` are what IRRA's heads learn from.
        """
        image = self._encode(self.backbone.encode_images, images)
        texts = [captions]
        if self.uses_summaries and summaries is not None:
            texts.append(summaries)
        if words is not None:
            texts.append(words.ids)
        encoded = self._encode(self.backbone.encode_texts, torch.cat(texts))
        parts = [encoded.rows(slice(n * len(captions), (n + 1) * len(captions))) for n in range(len(texts))]
        text, summary = parts[0], parts[1] if len(texts) - (words is not None) == 2 else None
        features = self._match(image, text, summary)
        if self.heads is not None and labels is not None:
            features = features._replace(identity_loss=self.heads.identity_loss(image.summit, text.summit, labels))
        if self.heads is not None and words is not None:
            features = features._replace(word_loss=self.heads.word_loss(parts[-1], image, words))
        return features

    def _encode(self, tower: Callable[[Tensor], Tokens], inputs: Tensor) -> Tokens:
        if not (self.training and self.micro_batch and self.micro_batch < len(inputs)):
            return tower(inputs)
        parts = inputs.split(self.micro_batch)
        return _join([checkpoint(tower, part, **RECOMPUTE) for part in parts])

    def _match(self, image: Tokens, text: Tokens, summary: Tokens | None) -> Features:
        visual = image.summit if summary is None else self._combine(image.summit, summary.summit)
        own = Features(image.summit, text.summit, None if summary is None else summary.summit, visual)
        if not self.config.local_branch:
            return own
        local_image = self.visual_embedding(*self._mix(self.visual_mixer, image, summary))
        if summary is None:
            local_text = self.textual_embedding(*self._mix(self.textual_mixer, text))
            return own._replace(local_visual=local_image, local_text=local_text)
        mixed_text, mixed_summary = (
            self._mix(self.textual_mixer, text),
            self._mix(self.textual_mixer, summary, image),
        )
        if self.backbone.released:
            local_text, local_summary = self.textual_embedding(*mixed_text), self.textual_embedding(*mixed_summary)
        else:
            # One pass through the textual embedding: captions and summaries share its batch statistics.
            both = self.textual_embedding(*(torch.cat(pair) for pair in zip(mixed_text, mixed_summary, strict=True)))
            local_text, local_summary = both.chunk(2)
        return own._replace(local_visual=self._combine(local_image, local_summary), local_text=local_text)

    def embed_gallery(
        self, images: Tensor, summaries: Tensor | None, most_words: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images and their summaries → global [B, D] and local [B, E] embeddings, L2-normalised.

        Args:
            images: [B, 3, H, W] normalised pixels.
            summaries: [B, L] token ids, or None.
            most_words: limit of the summary's words that condition the image in a `released` mixer, the most important
                first. The released program takes the fewest words of any summary in its batch, so that an embedding
                depends on its batch; None takes all words and depends on nothing else.
        """
        image = self.backbone.encode_images(images)
        use = self.uses_summaries and summaries is not None
        summary = self.backbone.encode_texts(summaries) if use and summaries is not None else None
        visual = image.summit if summary is None else self._combine(image.summit, summary.summit)
        local = visual
        if self.config.local_branch:
            local = self.visual_embedding(*self._mix(self.visual_mixer, image, summary, most_words))
            if summary is not None:
                local = self._combine(local, self.textual_embedding(*self._mix(self.textual_mixer, summary, image)))
        return F.normalize(visual.float(), dim=1), F.normalize(local.float(), dim=1)

    def embed_queries(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [B, L] → global [B, D] and local [B, E] embeddings, L2-normalised."""
        text = self.backbone.encode_texts(texts)
        local = (
            self.textual_embedding(*self._mix(self.textual_mixer, text)) if self.config.local_branch else text.summit
        )
        return F.normalize(text.summit.float(), dim=1), F.normalize(local.float(), dim=1)

    def _combine(self, image: Tensor, summary: Tensor) -> Tensor:
        weight = self.config.summary_weight
        return (1 - weight) * image + weight * summary

    def _mix(
        self,
        mixer: MixerBlock | ReleasedMixerBlock | None,
        side: Tokens,
        other: Tokens | None = None,
        most: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Tokens of a side, mixed with the other's (of a text, with at most `most` words): for `TokenEmbedding`."""
        own, present = select_tokens(side, self.config.token_ratio)
        own = F.normalize(own, dim=-1)
        if mixer is None:
            return own, present
        condition = self._condition(other, most) if other is not None and mixer.crosses else ()
        if side.padded is not None and self.config.token_ratio >= 1:  # the released mixer looks at padding too
            return mixer(own, side.padded, *condition), present, side.padded
        return mixer(own, present, *condition), present

    def _condition(self, other: Tokens, most: int | None) -> tuple[Tensor, Tensor]:
        ratio = self.config.condition_ratio if self.training else 1.0
        if self.backbone.released:
            return select_tokens(other, ratio, other.received, most if other.padded is not None else None)
        tokens, present = select_tokens(other, ratio)
        return F.normalize(tokens, dim=-1), present


def _join(parts: list[Tokens]) -> Tokens:
    """The tokens of all samples; those of shorter parts get absent ones behind them."""
    longest = max(part.present.shape[1] for part in parts)

    def pad(value: Tensor) -> Tensor:
        return F.pad(value, (0, 0) * (value.ndim - 2) + (0, longest - value.shape[1]))

    def join(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat([pad(value) for value in values])

    return Tokens(
        torch.cat([pad(part.tokens) for part in parts]),
        torch.cat([pad(part.importance) for part in parts]),
        torch.cat([pad(part.present) for part in parts]),
        torch.cat([part.summit for part in parts]),
        parts[0].places,
        join("inside"),
        join("received"),
        join("padded"),
    )


def fused_similarity(query: tuple[Tensor, Tensor], gallery: tuple[Tensor, Tensor], omega: float) -> Tensor:
    """S = (1-ω)·cos_global + ω·cos_local: normalised (global, local) pairs [Q, ·] and [G, ·] → [Q, G]."""
    return (1 - omega) * query[0] @ gallery[0].T + omega * query[1] @ gallery[1].T
