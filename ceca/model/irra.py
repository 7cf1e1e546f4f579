"""IRRA's training heads: identity classification and implicit relation reasoning (method: The IRRA baseline).

Notable: the heads exist in training only and are never published. Both losses are computed per sample, so workers
gather them as they gather features, and the loss is that of the global batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ceca.model.backbone import Tokens, send
from ceca.model.clip import QuickGELU
from ceca.model.mixer import Attention

LAYERS = 4  # transformer layers between cross-attention and the vocabulary


class WordTask(NamedTuple):
    """The task of masked-word prediction. It is made on the CPU, because asking a GPU for M would wait for the GPU.

    Attributes:
        ids: [B, L] token ids of captions with hidden words.
        places: [M] places of the hidden words in the flattened [B·L] ids.
        targets: [M] the token ids that stood there.
    """

    ids: Tensor
    places: Tensor
    targets: Tensor

    def positions(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of the hidden words in `ids`, [M] each."""
        length = self.ids.shape[1]
        return self.places // length, self.places % length

    def trimmed(self, length: int) -> WordTask:
        """The task for ids cut to `length` columns; no word behind them may be hidden."""
        rows, columns = self.positions()
        return WordTask(self.ids[:, :length], rows * length + columns, self.targets)

    def to(self, device: torch.device) -> WordTask:
        """The task on another device."""
        return WordTask(*(send(value, device) for value in self))


class IRRAHeads(nn.Module):
    """A classifier over the training identities, and a decoder that predicts hidden words from text and image.

    Args:
        width: D of the tokens.
        heads: attention heads.
        identities: number of identities in training.
        vocabulary: number of CLIP's tokens.
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
        """The sum of both modalities' cross-entropies, [B, 1].

        Args:
            image: [B, D] global features of the images.
            text: [B, D] global features of the captions.
            labels: [B] numbers of the training identities.
        """
        losses = [
            F.cross_entropy(self.classifier(features).float(), labels, reduction="none") for features in (image, text)
        ]
        return (losses[0] + losses[1])[:, None]

    def word_loss(self, text: Tokens, image: Tokens, task: WordTask) -> Tensor:
        """Cross-entropy of the hidden words, [B, 2]: per sample its sum and the number of hidden words.

        Args:
            text: tokens of the captions with hidden words; start, words and end attend to the image.
            image: tokens of the images, attended to together with the class token.
            task: the hidden words.
        """
        seen = torch.cat([image.summit[:, None], image.tokens], dim=1)
        present = F.pad(image.present, (1, 0), value=True)
        x = self.cross_attention(self.text_norm(text.tokens), self.image_norm(seen), present)
        padding = ~(text.present if text.inside is None else text.inside)
        x = self.layers(x, src_key_padding_mask=padding if len(x) else None)  # torch cannot mask a worker's empty part
        rows, columns = task.positions()
        losses = F.cross_entropy(self.decoder(x[rows, columns]).float(), task.targets, reduction="none")
        sums = torch.zeros(len(x), 2, device=x.device)
        return sums.index_add(0, rows, torch.stack([losses, torch.ones_like(losses)], 1))
