"""CECA: the global branch, the local branch, and the embeddings of gallery images and of queries (method).

Notable: a gallery image is embedded from its pixels and its summary, a query from its words alone. With a summary
weight of 0, summaries are used nowhere, neither in the sum nor in the mixer. A model without a local branch (plain
CLIP, IRRA) returns its global embedding as the local one too, so everything after training treats all models alike.
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

HEADS = "heads."  # prefix of the parameters that only training uses


class Features(NamedTuple):
    """Features of a batch, not normalised, from which the losses are computed.

    This is a tuple, because DeepSpeed finds tensors in no other kind of record, and ZeRO 3 must find them to gather
    parameters for the backward pass.

    Attributes:
        image: [B, D] of the image tower.
        text: [B, D] of the text tower, from captions.
        summary: [B, D] of the text tower, from summaries; None if summaries are not used.
        visual: [B, D] g, image and summary combined.
        local_visual: [B, E] l, image and summary combined; None without a local branch.
        local_text: [B, E] of captions; None without a local branch.
        identity_loss: [B, 1] from IRRA's heads.
        word_loss: [B, 2] from IRRA's heads.
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
    """The model.

    `micro_batch` is the number of samples that pass a tower at once in training; None passes all. With a micro-batch,
    towers keep only their outputs and compute their activations again in the backward pass. The local branch and the
    losses see the whole batch, so the gradient is that of the whole batch (GradCache).
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
        """The mixer of a side (`image` or `text`); None if the settings have none."""
        config = self.config
        if not config.local_branch or config.mixer == "none":
            return None
        crosses = self.uses_summaries and config.mixer in (side, "bidirectional")
        block = ReleasedMixerBlock if self.backbone.released else MixerBlock
        return block(self.backbone.width, config.mixer_heads, config.gate_start, crosses)

    @property
    def uses_summaries(self) -> bool:
        """Whether summaries have any influence."""
        return self.config.summary_weight > 0

    @property
    def global_dim(self) -> int:
        """Width D of the global embedding."""
        return self.backbone.width

    @property
    def local_dim(self) -> int:
        """Width E of the local embedding; D without a local branch."""
        return self.config.local_dim if self.config.local_branch else self.backbone.width

    def add_heads(self, identities: int) -> None:
        """Add IRRA's heads for training; `identities` is the number of identities in the training split."""
        vocabulary = self.backbone.clip.token_embedding.num_embeddings
        self.heads = IRRAHeads(self.backbone.width, self.config.mixer_heads, identities, vocabulary)

    def published_state(self) -> dict[str, Tensor]:
        """The parameters and statistics that retrieval needs."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith(HEADS)}

    def forward(
        self,
        images: Tensor,
        captions: Tensor,
        summaries: Tensor | None,
        labels: Tensor | None = None,
        words: WordTask | None = None,
    ) -> Features:
        """Compute the features of a training batch.

        Args:
            images: [B, 3, H, W] normalised pixels.
            captions: [B, L] token ids.
            summaries: [B, L] token ids, with the same L.
            labels: [B] numbers of the training identities, for IRRA's heads.
            words: the hidden words, for IRRA's heads.
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
        """Pass inputs through a tower, a micro-batch at a time in training."""
        if not (self.training and self.micro_batch and self.micro_batch < len(inputs)):
            return tower(inputs)
        parts = inputs.split(self.micro_batch)
        return _join([checkpoint(tower, part, **RECOMPUTE) for part in parts])

    def _match(self, image: Tokens, text: Tokens, summary: Tokens | None) -> Features:
        """The features of both branches."""
        visual = self._visual(image, summary)
        features = Features(image.summit, text.summit, None if summary is None else summary.summit, visual)
        if not self.config.local_branch:
            return features
        local_image = self.visual_embedding(*self._mix(self.visual_mixer, image, summary))
        if summary is None:
            local_text = self.textual_embedding(*self._mix(self.textual_mixer, text))
            return features._replace(local_visual=local_image, local_text=local_text)
        mixed_text = self._mix(self.textual_mixer, text)
        mixed_summary = self._mix(self.textual_mixer, summary, image)
        if self.backbone.released:
            local_text, local_summary = self.textual_embedding(*mixed_text), self.textual_embedding(*mixed_summary)
        else:
            # Captions and summaries pass the textual embedding together, so they share its batch statistics.
            both = self.textual_embedding(*(torch.cat(pair) for pair in zip(mixed_text, mixed_summary, strict=True)))
            local_text, local_summary = both.chunk(2)
        return features._replace(local_visual=self._combine(local_image, local_summary), local_text=local_text)

    def embed_gallery(
        self, images: Tensor, summaries: Tensor | None, most_words: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embed gallery images: global [B, D] and local [B, E], L2-normalised.

        Args:
            images: [B, 3, H, W] normalised pixels.
            summaries: [B, L] token ids; None embeds images alone.
            most_words: limit of the summary's words that condition the image in a `released` mixer; the most important
                ones are kept. The released program takes the fewest words of any summary in its batch, so that an
                embedding depends on its batch. None takes all words and depends on nothing else.
        """
        image = self.backbone.encode_images(images)
        summary = None
        if self.uses_summaries and summaries is not None:
            summary = self.backbone.encode_texts(summaries)
        local = visual = self._visual(image, summary)
        if self.config.local_branch:
            local = self.visual_embedding(*self._mix(self.visual_mixer, image, summary, most_words))
            if summary is not None:
                local = self._combine(local, self.textual_embedding(*self._mix(self.textual_mixer, summary, image)))
        return F.normalize(visual.float(), dim=1), F.normalize(local.float(), dim=1)

    def embed_queries(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """Embed queries: token ids [B, L] → global [B, D] and local [B, E], L2-normalised."""
        text = self.backbone.encode_texts(texts)
        local = text.summit
        if self.config.local_branch:
            local = self.textual_embedding(*self._mix(self.textual_mixer, text))
        return F.normalize(text.summit.float(), dim=1), F.normalize(local.float(), dim=1)

    def _visual(self, image: Tokens, summary: Tokens | None) -> Tensor:
        """The global visual feature g, [B, D]; the image's own without a summary."""
        return image.summit if summary is None else self._combine(image.summit, summary.summit)

    def _combine(self, image: Tensor, summary: Tensor) -> Tensor:
        """(1-λ)·image + λ·summary, with λ the summary weight."""
        weight = self.config.summary_weight
        return (1 - weight) * image + weight * summary

    def _mix(
        self,
        mixer: MixerBlock | ReleasedMixerBlock | None,
        side: Tokens,
        other: Tokens | None = None,
        most: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Select a side's tokens and mix them with the other side's, for `TokenEmbedding`.

        Args:
            mixer: the side's mixer, if there is one.
            side: output of the side's tower.
            other: output of the other tower, if the mixer has a condition.
            most: limit of a text's words in the condition of a released mixer.

        Returns:
            tokens [B, K, D], present [B, K], and if padding counts in the batch statistics, what counts [B, K].
        """
        tokens, present = select_tokens(side, self.config.token_ratio)
        tokens = F.normalize(tokens, dim=-1)
        if mixer is None:
            return tokens, present
        condition = self._condition(other, most) if other is not None and mixer.crosses else ()
        if side.padded is not None and self.config.token_ratio >= 1:  # the released mixer attends to padding, too
            return mixer(tokens, side.padded, *condition), present, side.padded
        return mixer(tokens, present, *condition), present

    def _condition(self, other: Tokens, most: int | None) -> tuple[Tensor, Tensor]:
        """The tokens to condition on: the most important ones in training, all at inference."""
        ratio = self.config.condition_ratio if self.training else 1.0
        if self.backbone.released:
            return select_tokens(other, ratio, other.received, most if other.padded is not None else None)
        tokens, present = select_tokens(other, ratio)
        return F.normalize(tokens, dim=-1), present


def _join(parts: list[Tokens]) -> Tokens:
    """Join the tokens of micro-batches; shorter ones are padded with absent tokens."""
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
    """Compare queries with gallery images, [Q, G]: S = (1-ω)·cos_global + ω·cos_local.

    Args:
        query: normalised embeddings, global [Q, D] and local [Q, E].
        gallery: normalised embeddings, global [G, D] and local [G, E].
        omega: ω, share of the local similarity.
    """
    return (1 - omega) * query[0] @ gallery[0].T + omega * query[1] @ gallery[1].T
