"""Batches of random samples, as the input pipeline gives them."""

from __future__ import annotations

import numpy as np

START, END = 49406, 49407  # CLIP's tokens


def random_batch(batch: int, height: int, width: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch as the input pipeline gives it: two samples of each person, texts of 12 to 52 tokens.

    Args:
        batch: number of samples.
        height: of the images, in pixels.
        width: of the images, in pixels.
        seed: of the random numbers.
    """
    source = np.random.default_rng(seed)

    def texts() -> np.ndarray:
        ids = np.zeros((batch, 77), np.int32)
        for row, words in zip(ids, source.integers(10, 51, batch), strict=True):
            row[: words + 2] = [START, *source.integers(1, START, words), END]
        return ids

    return {
        "image": source.integers(0, 256, (batch, height, width, 3), dtype=np.uint8),
        "caption": texts(),
        "summary": texts(),
        "identity": np.arange(batch) // 2,
    }


def text_tokens(batch: dict[str, np.ndarray]) -> int:
    """Tokens of all captions and summaries of a batch, without padding."""
    return int(sum((batch[name].argmax(axis=1) + 1).sum() for name in ("caption", "summary")))
