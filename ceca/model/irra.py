"""IRRA's training heads: identity classification and implicit relation reasoning (method: The IRRA baseline).

They exist in training only and are never published. Both losses come out per sample, so that they are gathered
over workers as features are, and the batch's loss stays the loss of the whole batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ceca.model.backbone import Tokens
from ceca.model.clip import QuickGELU
from ceca.model.mixer import Attention

LAYERS = 4


class WordTask(NamedTuple):
    """Masked-word prediction: which words of a caption were hidden, and what they were.

    `ids` [B, L] are the captions with words hidden; `places` [M] index the hidden ones in the flattened [B·L] ids and
    `targets` [M] are the tokens that stood there. Made on the CPU, so that no device is asked how many there are.
    """

    ids: Tensor
    places: Tensor
    targets: Tensor

    def trimmed(self, length: int) -> WordTask:
        """The same for ids cut to so many columns, behind which nothing is hidden."""
        rows, columns = self.places // self.ids.shape[1], self.places % self.ids.shape[1]
        return WordTask(self.ids[:, :length], rows * length + columns, self.targets)

    def to(self, device: torch.device) -> WordTask:
        return WordTask(*(value.to(device) for value in self))


class IRRAHeads(nn.Module):
    """Classifier over the training identities, and a decoder of hidden words that looks at the image.

    Args:
        width: of the tokens. identities: how many there are in training. vocabulary: tokens of CLIP.
    """

    def __init__(self, width: int, heads: int, identities: int, vocabulary: int):
        super().__init__()
        self.classifier = nn.Linear(width, identities)
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)
        self.text_norm = nn.LayerNorm(width)
        self.image_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation=QuickGELU(), batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(width), enable_nested_tensor=False)
        self.decoder = nn.Sequential(
            nn.Linear(width, width),
            QuickGELU(),
            nn.LayerNorm(width),
            nn.Linear(width, vocabulary),
        )

    def identity_loss(self, image: Tensor, text: Tensor, labels: Tensor) -> Tensor:
        """Global features [B, D] of both modalities and class numbers [B] → sum of their cross-entropies, [B, 1]."""
        losses = [
            F.cross_entropy(self.classifier(features).float(), labels, reduction="none") for features in (image, text)
        ]
        return (losses[0] + losses[1])[:, None]

    def word_loss(self, text: Tokens, image: Tokens, task: WordTask) -> Tensor:
        """Cross-entropy of the hidden words: per sample its sum and their number, [B, 2].

        `text` are the tokens of the captions with hidden words, start and end included; they look at all tokens of
        `image` and its class token.
        """
        seen = torch.cat([image.summit[:, None], image.tokens], dim=1)
        x = self.cross_attention(
            self.text_norm(text.tokens), self.image_norm(seen), F.pad(image.present, (1, 0), value=True)
        )
        inside = text.present if text.inside is None else text.inside
        x = self.layers(x, src_key_padding_mask=~inside)
        rows, columns = task.places // task.ids.shape[1], task.places % task.ids.shape[1]
        losses = F.cross_entropy(self.decoder(x[rows, columns]).float(), task.targets, reduction="none")
        sums = torch.zeros(len(x), 2, device=x.device)
        return sums.index_add(0, rows, torch.stack([losses, torch.ones_like(losses)], 1))
