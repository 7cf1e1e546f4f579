"""CLIP's two towers, giving every token and how important it is (method: Encoders).

Notable: any ViT CLIP of open_clip; the attention map is computed for one row of the last block only, all other
attention is fused; captions and summaries share one pass, in which padding enters nothing but the fused attention.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ceca.config import ModelConfig
from ceca.errors import UserError
from ceca.model.clip import CLIP
from ceca.model.tokens import CONTEXT, tokenize_numpy

# Parameters of ZeRO 3 have other shapes when a pass is computed again, which the check would refuse.
RECOMPUTE: dict[str, Any] = {"use_reentrant": False, "determinism_check": "none"}


class WeightsError(UserError):
    """Weights that cannot be loaded into the model."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Output of a tower for B samples of N tokens, before any normalisation.

    Attributes:
        tokens: [B, N, D].
        importance: [B, N], the attention that the class token or the sentence's end pays to each token.
        present: [B, N], patches and words; not start, end and padding.
        summit: [B, D], the feature of the class token or the sentence's end.
        places: N of the full tower: its patches, or the words that a text may have (75 of 77 tokens). Shares of tokens
            are shares of it.
        inside: [B, N], tokens from start to end; for texts alone.
        received: [B, N], the mean attention over all queries; for patches in the released mixer's training alone.
        padded: [B, N], words and padding; for texts in the released mixer alone.
    """

    tokens: Tensor
    importance: Tensor
    present: Tensor
    summit: Tensor
    places: int
    inside: Tensor | None = None
    received: Tensor | None = None
    padded: Tensor | None = None

    def rows(self, chosen: slice) -> Tokens:
        """The same for some of the samples."""
        names = [field.name for field in dataclasses.fields(self) if isinstance(getattr(self, field.name), Tensor)]
        return dataclasses.replace(self, **{name: getattr(self, name)[chosen] for name in names})


def tokenize(texts: list[str], context: int = CONTEXT) -> Tensor:
    """Texts → [B, context] token ids: start, words, end, then zeros; longer texts are cut."""
    return torch.from_numpy(tokenize_numpy(texts, context))


def send(values: Tensor, device: str | torch.device) -> Tensor:
    """Copy to a device. A GPU copies from pinned memory while the host goes on."""
    on_gpu = torch.device(device).type == "cuda"
    return (values.pin_memory() if on_gpu else values).to(device, non_blocking=True)


class Backbone(nn.Module):
    """CLIP's towers with their forward passes."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.clip = CLIP(config.backbone, (config.image_height, config.image_width), config.context)
        self.context = config.context
        # The released mixer looks at padding, and chooses patches by the attention that they receive.
        self.released = config.mixer_order == "released" and config.local_branch and config.mixer != "none"
        self.recompute = False  # activations inside blocks: computed again in the backward pass, or kept
        self.width: int = self.clip.text_projection.shape[1]

    def encode_images(self, images: Tensor) -> Tokens:
        """[B, 3, H, W] normalised pixels → tokens of the patches; the summit is the class token."""
        visual = self.clip.visual
        x = visual.conv1(images).flatten(2).transpose(1, 2)
        start = visual.class_embedding.expand(len(x), 1, -1)
        x = torch.cat([start, x], dim=1) + visual.positional_embedding
        x = visual.ln_pre(x)
        packing = Packing(None, *x.shape[:2])
        x, importance, received = self._blocks(visual.transformer.resblocks, x, None, packing)
        x = packing.unpack(visual.ln_post(x) @ visual.proj)
        present = torch.ones(x.shape[0], x.shape[1] - 1, dtype=torch.bool, device=x.device)
        received = received[:, 1:] if received is not None else None
        return Tokens(x[:, 1:], importance[:, 1:], present, x[:, 0], x.shape[1] - 1, None, received)

    def encode_texts(self, ids: Tensor) -> Tokens:
        """[B, L] token ids (L ≤ context) → tokens of the sentence; the summit is at its end.

        `present` marks the words; start, end and padding are not.
        """
        end = ids.argmax(dim=1)  # the end has the largest id
        # A device is not asked for lengths, which would wait for it: there, ids are cut before the copy, and padded.
        here = ids.device.type == "cpu" and not self.released
        ids = trim(ids) if here else ids
        if self.released:
            ids = F.pad(ids, (0, self.context - ids.shape[1]))
        length = ids.shape[1]
        positions = torch.arange(length, device=ids.device)
        x = self.clip.token_embedding(ids) + self.clip.positional_embedding[:length]
        packing = Packing.of(positions <= end[:, None]) if here else Packing(None, *ids.shape)
        x, importance, _ = self._blocks(self.clip.transformer.resblocks, x, end, packing)
        x = packing.unpack(self.clip.ln_final(x) @ self.clip.text_projection)
        words = (positions > 0) & (positions < end[:, None])
        # A text without a single word stands for itself by its end, so that pooling has something to pool.
        present = words | ((positions == end[:, None]) & ~words.any(dim=1, keepdim=True))
        padded = (positions > 0) & (positions != end[:, None]) if self.released else None
        summit = x[torch.arange(len(x), device=x.device), end]
        return Tokens(x, importance, present, summit, self.context - 2, positions <= end[:, None], None, padded)

    def _blocks(
        self, blocks: Any, x: Tensor, end: Tensor | None, packing: Packing
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Through a tower's blocks: [B, N, D] → [T, D], the importance [B, N], and the attention received.

        Texts (with their `end` [B]) look back only, and their importance is that for the end; images' is for the
        class token.
        """
        x = packing.pack(x)
        for block in blocks[:-1]:
            if self.recompute and self.training:
                x = checkpoint(
                    _block, block, x, end is not None, packing, use_reentrant=False, determinism_check="none"
                )
            else:
                x = _block(block, x, end is not None, packing)
        return _last_block(blocks[-1], x, end, packing, received=self.released and self.training and end is None)


class Packing(NamedTuple):
    """The tokens of a batch as rows of one matrix, texts without their padding.

    Linear layers take a matrix as it is; of anything else they make one, and again in the backward pass.
    """

    places: Tensor | None  # [T] in the flattened [B·L]; None: all tokens are there
    batch: int
    length: int

    @classmethod
    def of(cls, there: Tensor) -> Packing:
        """From [B, L] booleans on the CPU. A single text has no padding, and texts of one length have none."""
        return cls(None if there.all() else there.flatten().nonzero().squeeze(1), *there.shape)

    def pack(self, x: Tensor) -> Tensor:
        """[B, L, D] → [T, D]."""
        x = x.flatten(0, 1)
        return x if self.places is None else x.index_select(0, self.places)

    def unpack(self, x: Tensor) -> Tensor:
        """[T, D] → [B, L, D], zeros for padding."""
        if self.places is not None:
            x = x.new_zeros(self.batch * self.length, x.shape[-1]).index_copy(0, self.places, x)
        return x.view(self.batch, self.length, x.shape[-1])


def trim(ids: Tensor) -> Tensor:
    """[B, context] → [B, L]: without the columns that are padding in every row; one column if there are no rows."""
    return ids[:, : max(ids.argmax(dim=1).tolist(), default=0) + 1]


def _block(block: Any, x: Tensor, causal: bool, packing: Packing) -> Tensor:
    """A residual attention block, fused: [T, D] → [T, D]."""
    q, k, v = _heads(block, x, packing)
    return _add(block, x, F.scaled_dot_product_attention(q, k, v, is_causal=causal), packing)


def _last_block(
    block: Any, x: Tensor, end: Tensor | None, packing: Packing, *, received: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same, and the attention (mean over heads) of one row, [B, N]: the class token's, or the end's of texts.

    With `received` also the mean of all rows.
    """
    q, k, v = _heads(block, x, packing)
    with torch.no_grad():  # importance selects tokens; no gradient passes through a choice
        row = (
            q[:, :, :1] if end is None else q.gather(2, end[:, None, None, None].expand(-1, q.shape[1], 1, q.shape[3]))
        )
        logits = (row @ k.transpose(2, 3)).squeeze(2).float() / q.shape[-1] ** 0.5  # [B, H, N]
        if end is not None:
            behind = torch.arange(k.shape[2], device=k.device) > end[:, None]
            logits = logits.masked_fill(behind[:, None], -torch.inf)
        importance = logits.softmax(dim=-1).mean(dim=1)
        all_rows = None
        if received:
            scores = (q @ k.transpose(2, 3)).float() / q.shape[-1] ** 0.5  # [B, H, N, N]
            all_rows = scores.softmax(dim=-1).mean(dim=(1, 2))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=end is not None)
    return _add(block, x, mixed, packing), importance, all_rows


def _heads(block: Any, x: Tensor, packing: Packing) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a block's attention, [B, H, N, d] each."""
    attention = block.attn
    qkv = packing.unpack(F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias))
    q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def _add(block: Any, x: Tensor, mixed: Tensor, packing: Packing) -> Tensor:
    """What attention found, [B, H, N, d], and then the MLP, added to a block's input."""
    mixed = packing.pack(mixed.transpose(1, 2).flatten(2))
    x = x + block.ls_1(block.attn.out_proj(mixed))
    return x + block.ls_2(block.mlp(block.ln_2(x)))
