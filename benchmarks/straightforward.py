"""CECA as one would write it from the paper: plain PyTorch, correct, not optimised for speed.

`train.py` compares ceca with it. It keeps the attention maps of all blocks and uses one row of the last. It encodes
captions and summaries in two passes at their full 77 tokens. It selects and pools tokens sample by sample, and masks
padding. The losses are written out from their equations. From the same weights it computes the same values as ceca.
"""

from __future__ import annotations

import math
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ceca.config import LossConfig, ModelConfig
from ceca.model.clip import TINY, descriptions


class Mixer(nn.Module):
    """Self-attention, cross-attention and MLP with a gated residual."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.self_norm, self.cross_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.cross_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, own: Tensor, absent: Tensor, other: Tensor | None, other_absent: Tensor | None) -> Tensor:
        normed = self.self_norm(own)
        x = own + self.self_attention(normed, normed, normed, key_padding_mask=absent)[0]
        if other is not None:
            x = x + self.cross_attention(self.cross_norm(x), other, other, key_padding_mask=other_absent)[0]
        x = x + self.mlp(self.mlp_norm(x))
        return own + torch.sigmoid(self.gate) * (x - own)


class Embedding(nn.Module):
    """Linear + MLP with batch normalisation over all tokens except padding, then the maximum of each sample."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear, self.hidden, self.out = nn.Linear(width, out), nn.Linear(width, width), nn.Linear(width, out)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, samples: list[Tensor]) -> Tensor:
        lengths = [len(sample) for sample in samples]
        tokens = torch.cat(samples)
        embedded = self.linear(tokens) + self.out(F.relu(self.norm(self.hidden(tokens))))
        return torch.stack([sample.max(dim=0).values for sample in embedded.split(lengths)])


class Straightforward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        size = (config.image_height, config.image_width)
        if config.backbone == TINY:
            open_clip.add_model_config(descriptions()[TINY])
        self.clip = open_clip.create_model(config.backbone, pretrained=None, force_image_size=size)
        width = self.clip.text_projection.shape[1]
        self.visual_mixer, self.textual_mixer = (Mixer(width, config.mixer_heads) for _ in range(2))
        self.visual_embedding, self.textual_embedding = (Embedding(width, config.local_dim) for _ in range(2))

    def load(self, state: dict[str, Tensor]) -> None:
        """Load the weights of ceca's model.

        Args:
            state: `state_dict` of `ceca.model.ceca.CECA`.
        """
        renamed = {}
        for name, value in state.items():
            name = name.removeprefix("backbone.")
            if ".query." in name:  # here one projection gives query, key and value
                attention, kind = name.split(".query.")
                key_value = state[f"{attention}.key_value.{kind}"]
                renamed[f"{attention}.in_proj_{kind}"] = torch.cat([value, key_value])
            elif ".key_value." not in name:
                renamed[name.replace("attention.out.", "attention.out_proj.")] = value
        missing, unknown = self.load_state_dict(renamed, strict=False)
        left = [name for name in missing if name != "clip.logit_scale" and not name.endswith("num_batches_tracked")]
        assert not left, left
        assert not unknown, unknown

    def blocks(self, blocks: Any, x: Tensor, mask: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Tokens [B, N, D] after all blocks, and each block's attention map [B, N, N], mean over heads."""
        maps = []
        for block in blocks:
            normed = block.ln_1(x)
            attended, attention = block.attn(normed, normed, normed, need_weights=True, attn_mask=mask)
            x = x + attended
            x = x + block.mlp(block.ln_2(x))
            maps.append(attention)
        return x, maps

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, 193, D] of images, class token first, and the last block's attention map."""
        visual = self.clip.visual
        x = visual.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], dim=1) + visual.positional_embedding
        x, maps = self.blocks(visual.transformer.resblocks, visual.ln_pre(x), None)
        return visual.ln_post(x) @ visual.proj, maps[-1]

    def encode_texts(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, 77, D] of texts, and the last block's attention map."""
        x = self.clip.token_embedding(ids) + self.clip.positional_embedding
        x, maps = self.blocks(self.clip.transformer.resblocks, x, self.clip.attn_mask)
        return self.clip.ln_final(x) @ self.clip.text_projection, maps[-1]

    def forward(self, images: Tensor, captions: Tensor, summaries: Tensor) -> dict[str, Tensor]:
        """Features [B, D] of the losses by name.

        Args:
            images: pixels [B, 3, H, W].
            captions: token ids [B, 77].
            summaries: token ids [B, 77].
        """
        image, image_map = self.encode_images(images)
        text, text_map = self.encode_texts(captions)
        summary, summary_map = self.encode_texts(summaries)
        batch, weight = range(len(images)), self.config.summary_weight
        ends, summary_ends = captions.argmax(dim=1), summaries.argmax(dim=1)

        patches, words, summary_words, key_patches, key_words = [], [], [], [], []
        for i in batch:
            seen, places = (image[i, 1:], image_map[i, 0, 1:]), image.shape[1] - 1
            patches.append(select(*seen, self.config.token_ratio, places))
            key_patches.append(select(*seen, self.config.condition_ratio, places))
            words.append(select(text[i, 1 : ends[i]], text_map[i, ends[i], 1 : ends[i]], self.config.token_ratio, 75))
            inner = slice(1, int(summary_ends[i]))
            importance = summary_map[i, summary_ends[i], inner]
            summary_words.append(select(summary[i, inner], importance, self.config.token_ratio, 75))
            key_words.append(select(summary[i, inner], importance, self.config.condition_ratio, 75))
        mixed_patches = mix(self.visual_mixer, patches, key_words)
        mixed_words = mix(self.textual_mixer, words, None)
        mixed_summary = mix(self.textual_mixer, summary_words, key_patches)
        local_image = self.visual_embedding(mixed_patches)
        local_text, local_summary = self.textual_embedding(mixed_words + mixed_summary).split(len(images))

        v = image[:, 0]
        t = torch.stack([text[i, ends[i]] for i in batch])
        s = torch.stack([summary[i, summary_ends[i]] for i in batch])
        return {
            "image": v,
            "text": t,
            "summary": s,
            "visual": (1 - weight) * v + weight * s,
            "local_visual": (1 - weight) * local_image + weight * local_summary,
            "local_text": local_text,
        }


def select(tokens: Tensor, importance: Tensor, ratio: float, places: int) -> Tensor:
    """The most important of a sample's tokens, normalised: a share of a tower's places."""
    if ratio < 1:
        kept = max(1, math.floor(ratio * places))
        tokens = tokens[importance.argsort(descending=True, stable=True)[:kept]]
    return F.normalize(tokens, dim=-1)


def pad(samples: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Samples in one tensor [B, N, D], and a mask [B, N] that is true at padding."""
    padded = nn.utils.rnn.pad_sequence(samples, batch_first=True)
    absent = torch.ones(padded.shape[:2], dtype=torch.bool, device=padded.device)
    for i, sample in enumerate(samples):
        absent[i, : len(sample)] = False
    return padded, absent


def mix(mixer: Mixer, own: list[Tensor], other: list[Tensor] | None) -> list[Tensor]:
    """Mixed tokens of each sample, conditioned on the other side's tokens if there are any."""
    tokens, absent = pad(own)
    mixed = mixer(tokens, absent, *(pad(other) if other is not None else (None, None)))
    return [mixed[i, : len(sample)] for i, sample in enumerate(own)]


def total_loss(features: dict[str, Tensor], identities: Tensor, config: LossConfig) -> Tensor:
    """TAL(global) + TAL(local) + CAWL, from their equations."""
    unit = {name: F.normalize(value.float(), dim=1) for name, value in features.items()}
    positive = identities[:, None] == identities[None, :]
    tal = torch.zeros((), device=identities.device)
    for similarity in (unit["text"] @ unit["visual"].T, unit["local_text"] @ unit["local_visual"].T):
        for direction in (similarity, similarity.T):
            for i in range(len(identities)):
                near, far = direction[i][positive[i]], direction[i][~positive[i]]
                alpha = torch.softmax(near.detach() / config.temperature, dim=0)
                repulsion = config.temperature * torch.logsumexp(far / config.temperature, dim=0)
                tal = tal + torch.clamp(config.margin - (alpha * near).sum() + repulsion, min=0)

    def cross_entropy(a: str, b: str) -> Tensor:
        p = torch.softmax(config.scale * unit[a] @ unit[b].T, dim=1)
        return -torch.log((p * positive).sum(dim=1))

    to_text, to_image = cross_entropy("summary", "text"), cross_entropy("summary", "image")
    with torch.no_grad():
        weight = (torch.exp(-to_text) * torch.exp(-to_image)) ** config.gamma
        weight = (weight / weight.mean()).clamp(*config.weight_range)
    cross = 0.5 * (cross_entropy("image", "text") + cross_entropy("text", "image"))
    return tal + (weight * (to_text + to_image) + (1 - weight) * cross).mean()
