"""CLIP's two towers, giving every token and how important it is (method: Encoders).

Notable: any ViT CLIP of open_clip; the attention map is computed for one row of the last block only, all other
attention is fused; texts are cut to the longest of the batch; captions and summaries share one pass.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ceca.config import ModelConfig
from ceca.errors import UserError

TINY = Path(__file__).parent / "ceca-tiny.json"
CONTEXT = 77  # tokens CLIP reads
START, END, MASK = 49406, 49407, 49405  # as in IRRA, the rarest merge gives its id to the mask


class WeightsError(UserError):
    """Weights that cannot be loaded into the model."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What a tower gives: `tokens` [B, N, D] with their `importance` [B, N], those that are there in `present`
    [B, N], and the `summit` feature [B, D] (class token, or sentence end). All before normalisation."""

    tokens: Tensor
    importance: Tensor
    present: Tensor
    summit: Tensor

    def rows(self, chosen: slice) -> Tokens:
        """The same of some samples."""
        return Tokens(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))


def tokenize(texts: list[str]) -> Tensor:
    """Texts → [B, 77] token ids: start, words, end, then zeros; longer texts are cut."""
    return _tokenizer()(texts, context_length=CONTEXT)


def count_tokens(text: str) -> int:
    """Length of a text in tokens with start and end, not cut: above 77, CLIP does not see its end."""
    return len(_tokenizer().encode(text)) + 2


def _tokenizer() -> Any:
    return open_clip.tokenizer._tokenizer  # open_clip's one instance of CLIP's byte-pair encoding


class Backbone(nn.Module):
    """open_clip's CLIP without its logit scale, which nothing here uses."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.backbone == "ceca-tiny":
            open_clip.add_model_config(TINY)
        if config.backbone not in open_clip.list_models():
            vits = [name for name in open_clip.list_models() if name.startswith("ViT-")]
            raise UserError(f"unknown backbone {config.backbone!r}; valid: ceca-tiny, {', '.join(vits)}")
        size = (config.image_height, config.image_width)
        # It warns of random weights, which are meant here: weights.py loads others where they are asked for.
        logging.disable(logging.WARNING)
        clip = open_clip.create_model(config.backbone, pretrained=None, force_image_size=size, load_weights=False)
        logging.disable(logging.NOTSET)
        if not isinstance(clip, open_clip.CLIP) or not isinstance(clip.visual, open_clip.transformer.VisionTransformer):
            raise UserError(f"backbone {config.backbone!r} is not a plain ViT CLIP; choose a ViT-… of open_clip")
        if clip.visual.attn_pool is not None or clip.visual.pool_type != "tok" or clip.text_pool_type != "argmax":
            raise UserError(f"backbone {config.backbone!r} does not pool by class and end token; choose another ViT-…")
        del clip.logit_scale
        clip.logit_bias = None
        self.clip = clip
        self.recompute = False
        self.width: int = clip.text_projection.shape[1]

    def encode_images(self, images: Tensor) -> Tokens:
        """[B, 3, H, W] normalised pixels → tokens of the patches; the summit is the class token."""
        visual = self.clip.visual
        x = visual.conv1(images).flatten(2).transpose(1, 2)
        start = visual.class_embedding.expand(len(x), 1, -1)
        x = torch.cat([start, x], dim=1) + visual.positional_embedding
        x = visual.ln_pre(x)
        for block in visual.transformer.resblocks[:-1]:
            x = block(x)
        summit_at = torch.zeros(len(x), dtype=torch.long, device=x.device)
        x, importance = _last_block(visual.transformer.resblocks[-1], x, summit_at, None)
        x = visual.ln_post(x) @ visual.proj
        present = torch.ones(x.shape[0], x.shape[1] - 1, dtype=torch.bool, device=x.device)
        return Tokens(x[:, 1:], importance[:, 1:], present, x[:, 0])

    def encode_texts(self, ids: Tensor) -> Tokens:
        """[B, L] token ids (L ≤ 77) → tokens of the sentence; the summit is at its end.

        `present` marks the words; start, end and padding are not.
        """
        end = ids.argmax(dim=1)  # the end has the largest id
        ids = ids[:, : int(end.max()) + 1] if ids.device.type == "cpu" else ids  # on a GPU, cut before the copy
        length = ids.shape[1]
        x = self.clip.token_embedding(ids) + self.clip.positional_embedding[:length]
        mask = self.clip.attn_mask[:length, :length].to(x.dtype)
        for block in self.clip.transformer.resblocks[:-1]:
            x = block(x, attn_mask=mask)
        x, importance = _last_block(self.clip.transformer.resblocks[-1], x, end, mask)
        x = self.clip.ln_final(x) @ self.clip.text_projection
        positions = torch.arange(length, device=ids.device)
        words = (positions > 0) & (positions < end[:, None])
        # A text without a single word stands for itself by its end, so that pooling has something to pool.
        present = words | ((positions == end[:, None]) & ~words.any(dim=1, keepdim=True))
        return Tokens(x, importance, present, x[torch.arange(len(x), device=x.device), end])


def trim(ids: Tensor) -> Tensor:
    """[B, 77] → [B, L]: without the columns that are padding in every row."""
    return ids[:, : int(ids.argmax(dim=1).max()) + 1]


def _last_block(block: Any, x: Tensor, row: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """A residual attention block, and the attention (mean over heads) of one row: [B, N, D], [B, N].

    Args:
        x: [B, N, D]. row: [B] whose attention is wanted. mask: [N, N] added to the logits, or None.
    """
    attention = block.attn
    batch, length, width = x.shape
    heads = attention.num_heads
    qkv = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = (part.view(batch, length, heads, -1).transpose(1, 2) for part in qkv.chunk(3, dim=2))  # [B, H, N, d]
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    mixed = attention.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))
    with torch.no_grad():  # importance selects tokens; no gradient passes through a choice
        index = row[:, None, None, None].expand(-1, heads, 1, q.shape[-1])
        logits = (q.gather(2, index) @ k.transpose(2, 3)).squeeze(2) / q.shape[-1] ** 0.5  # [B, H, N]
        if mask is not None:
            logits = logits + mask[row][:, None, :]
        importance = logits.float().softmax(dim=-1).mean(dim=1)
    x = x + block.ls_1(mixed)
    x = x + block.ls_2(block.mlp(block.ln_2(x)))
    return x, importance
