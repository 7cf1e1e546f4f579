"""Augmentation of a training batch on its device: changes to pixels and to words (method: Optimisation).

Notable: every random number is drawn for the *global* batch, from a generator seeded with (seed, epoch, step), and a
worker uses the rows of its slice. A sample therefore gets the same changes whatever the number of workers. `draw` is
the only place that draws; everything below it is a pure function of a batch and its draws.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ceca.config import AugmentationConfig
from ceca.model.backbone import send
from ceca.model.embed import normalize
from ceca.model.irra import WordTask
from ceca.model.tokens import MASK

TRIES = 10  # rectangles drawn for random erasing; the first one that fits is taken
ERASE_ASPECT = (0.3, 3.3)  # height over width of an erased rectangle, smallest and largest


def generator(*key: int) -> torch.Generator:
    """A CPU generator for a key such as (seed, epoch, step); different keys give unrelated streams."""
    mixed = 0
    for part in key:
        mixed = (mixed * 6364136223846793005 + part + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(mixed)


@dataclasses.dataclass(frozen=True)
class Draws:
    """Random numbers for a batch of B samples with L tokens each, uniform in [0, 1) except `token`.

    Attributes:
        flip: [B], decides whether an image is mirrored.
        shift: [B, 2], offset of the crop: down and right.
        erase: [B], decides whether a rectangle is erased.
        erase_shape: [B, TRIES, 2], area and aspect of the rectangles to try.
        erase_place: [B, 2], its top and left edge.
        touch: [B, L], decides whether a word is changed.
        change: [B, L], decides how a touched word is changed.
        token: [B, L], ids of the tokens that replace words.
    """

    flip: Tensor
    shift: Tensor
    erase: Tensor
    erase_shape: Tensor
    erase_place: Tensor
    touch: Tensor
    change: Tensor
    token: Tensor

    def rows(self, chosen: slice) -> Draws:
        """The numbers of some samples."""
        return Draws(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))


def draw(batch: int, length: int, source: torch.Generator) -> Draws:
    """Draw the random numbers of a global batch.

    Args:
        batch: samples in the global batch.
        length: tokens per text.
        source: a CPU generator.
    """

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


# --- pixels -----------------------------------------------------------------------------------------------


def augment_images(images: Tensor, draws: Draws, config: AugmentationConfig) -> Tensor:
    """Flip, shift, normalise and partly erase images: uint8 [B, H, W, 3] → float32 [B, 3, H, W].

    The padding is black, as in the published recipe. An erased area gets the colour `erase_value`. The device gets a
    few numbers per image and computes the rest.
    """
    batch, height, width, _ = images.shape
    device = images.device
    shift = (draws.shift * (2 * config.pad + 1)).long() - config.pad
    flip, down, right = send(torch.cat([(draws.flip < config.flip)[:, None], shift], dim=1), device).T
    images = torch.where(flip.bool()[:, None, None, None], images.flip(2), images)
    rows = torch.arange(height, device=device) + down[:, None]
    columns = torch.arange(width, device=device) + right[:, None]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    samples = torch.arange(batch, device=device)[:, None, None]
    images = images[samples, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]]
    pixels = normalize(images * inside[..., None])
    erased = _erased(draws, config, height, width, device)[:, None]
    return torch.where(erased, send(torch.tensor(config.erase_value), device)[:, None, None], pixels)


def _erased(
    draws: Draws, config: AugmentationConfig, height: int, width: int, device: str | torch.device = "cpu"
) -> Tensor:
    """The pixels to erase, [B, H, W] on a device: one rectangle of each chosen image."""
    top, bottom, left, right = send(_rectangles(draws, config, height, width), device).T[..., None]
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    return ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None, :]


def _rectangles(draws: Draws, config: AugmentationConfig, height: int, width: int) -> Tensor:
    """The rectangle of each image, [B, 4]: its first row and the row behind it, then its columns; zeros for none.

    Its area is within `erase_area` and its aspect in `ERASE_ASPECT`. As in torchvision, a rectangle that does not fit
    is drawn again, at most ten times; then nothing is erased.
    """
    low, high = config.erase_area
    flat, upright = ERASE_ASPECT
    area = (low + (high - low) * draws.erase_shape[..., 0]) * height * width
    aspect = torch.exp(math.log(flat) + (math.log(upright) - math.log(flat)) * draws.erase_shape[..., 1])
    tall, wide = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()  # [B, TRIES]
    fits = (tall < height) & (wide < width)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    tall, wide = tall.gather(1, first)[:, 0], wide.gather(1, first)[:, 0]
    top = (draws.erase_place[:, 0] * (height - tall + 1)).floor()
    left = (draws.erase_place[:, 1] * (width - wide + 1)).floor()
    chosen = (draws.erase < config.erase) & fits.any(dim=1)
    return (torch.stack([top, top + tall, left, left + wide], dim=1) * chosen[:, None]).long()


# --- words ------------------------------------------------------------------------------------------------


def mask_words(ids: Tensor, draws: Draws, share: float) -> Tensor:
    """Change words of texts: 60 % of the touched words are masked, 20 % replaced by a random token, 20 % dropped.

    The start and end tokens stay, and the words behind a dropped word move up. The first word of a text is never
    dropped, so no text becomes empty.

    Args:
        ids: [B, L] token ids.
        draws: the random numbers of these samples, at least L per text.
        share: probability that a word is touched.

    Returns:
        [B, L] token ids.
    """
    touched, change = _touched(ids, draws, share), _of_length(draws.change, ids)
    changed = _mask_or_replace(ids, draws, touched, mask_below=0.6, replace_below=0.8)
    dropped = touched & (change >= 0.8)
    dropped[:, :2] = False
    order = dropped.to(torch.uint8).argsort(dim=1, stable=True)
    return changed.masked_fill(dropped, 0).gather(1, order)


def hide_words(ids: Tensor, draws: Draws, share: float = 0.15) -> WordTask:
    """Make the task of masked-word prediction: 80 % of the chosen words are masked, 10 % replaced, 10 % kept.

    This runs on the CPU: the number of hidden words decides shapes, and asking a GPU for it would wait for the GPU.

    Args:
        ids: [B, L] token ids of captions, on the CPU.
        draws: the random numbers of these samples, at least L per text.
        share: probability that a word is chosen.
    """
    hidden = _touched(ids, draws, share)
    # Each text with a word has at least one hidden, or it would teach nothing: the first, as in IRRA's program.
    has_word = ids.argmax(dim=1) > 1
    hidden[:, 1] |= has_word & ~hidden.any(dim=1)
    changed = _mask_or_replace(ids, draws, hidden, mask_below=0.8, replace_below=0.9)
    places = hidden.flatten().nonzero().squeeze(1)
    return WordTask(changed, places, ids.flatten()[places])


def _of_length(numbers: Tensor, ids: Tensor) -> Tensor:
    """Random numbers [B, L'] cut to the length of `ids` [B, L], on their device."""
    return numbers[:, : ids.shape[1]].to(ids.device)


def _touched(ids: Tensor, draws: Draws, share: float) -> Tensor:
    """The words to change, [B, L]: each with probability `share`; never the start, the end or padding."""
    positions = torch.arange(ids.shape[1], device=ids.device)
    words = (positions > 0) & (positions < ids.argmax(dim=1, keepdim=True))  # the end token has the largest id
    return words & (_of_length(draws.touch, ids) < share)


def _mask_or_replace(ids: Tensor, draws: Draws, touched: Tensor, *, mask_below: float, replace_below: float) -> Tensor:
    """Mask touched words with `change` below the first limit, and replace those between the two limits: [B, L] ids."""
    change, token = _of_length(draws.change, ids), _of_length(draws.token, ids)
    changed = torch.where(touched & (change < mask_below), torch.full_like(ids, MASK), ids)
    return torch.where(touched & (change >= mask_below) & (change < replace_below), token.to(ids.dtype), changed)
