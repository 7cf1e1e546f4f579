"""What happens to a training batch on its device: augmentation of pixels and words (method: Optimisation).

Every random number is drawn for the *global* batch from a generator seeded with (seed, epoch, step), and a worker
uses its own rows. So the same samples get the same changes whatever the number of workers.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ceca.config import AugmentationConfig
from ceca.model.embed import normalize
from ceca.model.irra import WordTask
from ceca.model.tokens import MASK

TRIES = 10  # rectangles of random erasing, of which the first that fits is taken


def generator(*key: int) -> torch.Generator:
    """A CPU generator for a key such as (seed, epoch, step); different keys give unrelated streams."""
    mixed = 0
    for part in key:
        mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(mixed)


@dataclasses.dataclass(frozen=True)
class Draws:
    """Random numbers of a batch: [B] each for images, [B, L] for words; uniform in [0, 1) unless said."""

    flip: Tensor
    shift: Tensor  # [B, 2], of the crop: down and right
    erase: Tensor
    erase_shape: Tensor  # [B, TRIES, 2]: area, aspect
    erase_place: Tensor  # [B, 2]
    touch: Tensor  # [B, L]
    change: Tensor  # [B, L]: which change a touched word gets
    token: Tensor  # [B, L] ids to replace by

    def rows(self, chosen: slice) -> Draws:
        return Draws(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))


def draw(batch: int, length: int, source: torch.Generator) -> Draws:
    """Random numbers for a global batch of texts of `length` tokens."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=source)

    return Draws(
        uniform(batch),
        uniform(batch, 2),
        uniform(batch),
        uniform(batch, TRIES, 2),
        uniform(batch, 2),
        uniform(batch, length),
        uniform(batch, length),
        torch.randint(1, MASK, (batch, length), generator=source),
    )


def augment_images(images: Tensor, draws: Draws, config: AugmentationConfig) -> Tensor:
    """uint8 [B, H, W, 3] → normalised float32 [B, 3, H, W], flipped, shifted and partly erased.

    The frame of the padding is black, as in the published recipe; an erased area gets `erase_value`.
    """
    batch, height, width, _ = images.shape
    device = images.device
    flip = (draws.flip < config.flip).to(device)
    images = torch.where(flip[:, None, None, None], images.flip(2), images)
    shift = (draws.shift * (2 * config.pad + 1)).long().to(device) - config.pad
    rows = torch.arange(height, device=device)[None, :] + shift[:, :1]
    columns = torch.arange(width, device=device)[None, :] + shift[:, 1:]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    samples = torch.arange(batch, device=device)[:, None, None]
    images = images[samples, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]]
    pixels = normalize(images * inside[..., None])
    erased = _erased(draws, config, height, width).to(device)[:, None]
    return torch.where(erased, pixels.new_tensor(config.erase_value)[:, None, None], pixels)


def _erased(draws: Draws, config: AugmentationConfig, height: int, width: int) -> Tensor:
    """[B, H, W]: the rectangle to erase, of 2-40 % of the area and an aspect of 0.3-3.3.

    As in torchvision, a rectangle that does not fit is drawn again, ten times at most, and then nothing is erased.
    """
    low, high = config.erase_area
    area = (low + (high - low) * draws.erase_shape[..., 0]) * height * width
    aspect = torch.exp(math.log(0.3) + (math.log(3.3) - math.log(0.3)) * draws.erase_shape[..., 1])
    tall, wide = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()  # [B, TRIES]
    fits = (tall < height) & (wide < width)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    tall, wide = tall.gather(1, first)[:, 0], wide.gather(1, first)[:, 0]
    top = (draws.erase_place[:, 0] * (height - tall + 1)).floor()
    left = (draws.erase_place[:, 1] * (width - wide + 1)).floor()
    y, x = torch.arange(height)[None, :], torch.arange(width)[None, :]
    rows = (y >= top[:, None]) & (y < (top + tall)[:, None])
    columns = (x >= left[:, None]) & (x < (left + wide)[:, None])
    chosen = ((draws.erase < config.erase) & fits.any(dim=1))[:, None, None]
    return rows[:, :, None] & columns[:, None, :] & chosen


def mask_words(ids: Tensor, draws: Draws, share: float) -> Tensor:
    """[B, L] token ids: each word touched with probability `share`, then masked 60 %, replaced 20 %, dropped 20 %.

    Start and end stay, what follows a dropped word moves up, and the first word of a text is never dropped, so no
    text becomes empty.
    """
    length = ids.shape[1]
    touch, change, token = (part[:, :length].to(ids.device) for part in (draws.touch, draws.change, draws.token))
    positions = torch.arange(length, device=ids.device)
    words = (positions > 0) & (positions < ids.argmax(dim=1, keepdim=True))  # the end has the largest id
    touched = words & (touch < share)
    changed = torch.where(touched & (change < 0.6), torch.full_like(ids, MASK), ids)
    changed = torch.where(touched & (change >= 0.6) & (change < 0.8), token.to(ids.dtype), changed)
    dropped = touched & (change >= 0.8)
    dropped[:, :2] = False
    order = dropped.to(torch.uint8).argsort(dim=1, stable=True)
    return changed.masked_fill(dropped, 0).gather(1, order)


def hide_words(ids: Tensor, draws: Draws, share: float = 0.15) -> WordTask:
    """[B, L] captions → the task of masked-word prediction: of the words chosen, 80 % masked, 10 % replaced.

    On the CPU, for the number of hidden words must be known before a device works.
    """
    length = ids.shape[1]
    touch, change, token = (part[:, :length] for part in (draws.touch, draws.change, draws.token))
    positions = torch.arange(length)
    words = (positions > 0) & (positions < ids.argmax(dim=1, keepdim=True))
    hidden = words & (touch < share)
    # At least one of each text that has a word, or it would teach nothing: the first, as in IRRA's program.
    hidden[:, 1] |= words[:, 1] & ~hidden.any(dim=1)
    changed = torch.where(hidden & (change < 0.8), torch.full_like(ids, MASK), ids)
    changed = torch.where(hidden & (change >= 0.8) & (change < 0.9), token.to(ids.dtype), changed)
    places = hidden.flatten().nonzero().squeeze(1)
    return WordTask(changed, places, ids.flatten()[places])
