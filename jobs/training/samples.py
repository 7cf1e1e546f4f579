"""The samples of a training run, read from the tables: training pairs and held-out images. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from ceca.config import Protocol, TrainConfig
from ceca.data.schema import NOBODY
from ceca.data.store import Manifest, Reject, Store, filesystem
from ceca.data.tables import ImageRow, add_summaries, list_images, make_pairs
from ceca.errors import UserError
from ceca.model.tokens import CONTEXT, count_tokens, tokenize_numpy
from ceca.training.order import published_noise, shuffled_captions
from jobs.runtime.console import console, label
from jobs.training.data import HeldOut, Sentence, TrainingSet


def training_pairs(
    store: Store, config: TrainConfig, tables: Mapping[str, Manifest], steps: int | None = None
) -> pa.Table:
    """List the (image, caption) pairs to learn from, and print their number.

    Args:
        store: the dataset.
        config: settings of the training.
        tables: the input tables by name.
        steps: take only this many global batches of pairs, spread evenly over the split; None: all pairs.

    Raises:
        UserError: the split has fewer pairs than one global batch.
    """
    rows, missing = _summarised(store, tables, config.split)
    if missing:
        label("warning", "yellow", f"{len(missing)} images have no summary and are left out of training")
    pairs = make_pairs(store, rows, tables["captions"])
    if not pairs.num_rows or (pairs.num_rows < config.global_batch and config.last_batch == "drop"):
        raise UserError(
            f"split {config.split!r} has {pairs.num_rows} image-caption pairs, fewer than one global batch of "
            f"{config.global_batch}; lower --global-batch or check the dataset"
        )
    if steps is not None:
        pairs = pairs.take(np.linspace(0, pairs.num_rows - 1, steps * config.global_batch).astype(int))
    long = sum(count_tokens(row.summary) > CONTEXT for row in rows)
    console.print(
        f"train: {len(rows):,} images, {pairs.num_rows:,} pairs, {len({row.identity for row in rows}):,} identities; "
        f"{long / max(1, len(rows)):.1%} of summaries are longer than CLIP's 77 tokens"
    )
    return pairs


def tokenize_pairs(pairs: pa.Table, config: TrainConfig) -> TrainingSet:
    """Number the identities and tokenise the texts of all pairs, once for all epochs.

    Raises:
        UserError: `config.noise_file` does not fit the pairs.
    """
    captions_of = _captions_of(pairs.num_rows, config)
    return TrainingSet(
        part=pairs["part"].to_numpy(),
        row=pairs["row"].to_numpy(),
        identity=number_identities(pairs),
        caption=tokenize_numpy(pairs["caption"].to_pylist()).astype(np.uint16)[captions_of],
        summary=tokenize_numpy(pairs["summary"].to_pylist()).astype(np.uint16),
    )


def read_noise_file(uri: str) -> bytes:
    """Read the file that `noise_file` names.

    Raises:
        UserError: it does not exist.
    """
    fs, path = filesystem(uri)
    try:
        return fs.cat_file(path)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"no file of noisy correspondence at {uri}") from None


def _captions_of(pairs: int, config: TrainConfig) -> np.ndarray:
    """For every pair, the pair whose caption it gets, [P]."""
    if config.noise_file is None:
        return shuffled_captions(pairs, config.seed, config.caption_noise)
    try:
        source = published_noise(read_noise_file(config.noise_file), pairs)
    except ValueError as error:
        raise UserError(f"{config.noise_file}: {error}") from None
    noisy = float(np.mean(source != np.arange(pairs)))
    console.print(f"train: {noisy:.1%} of the pairs have another's caption, by {config.noise_file}")
    return source


def number_identities(pairs: pa.Table) -> np.ndarray:
    """Numbers from 0 of the identities of pairs, [P]; an image whose person nobody named is a person of its own."""
    identity = pairs["identity"].to_numpy()
    image = pairs["part"].to_numpy().astype(np.int64) << 32 | pairs["row"].to_numpy()
    keys = np.stack([identity, np.where(identity == NOBODY, image, 0)])
    return np.unique(keys, axis=1, return_inverse=True)[1].ravel()


def held_out(store: Store, tables: Mapping[str, Manifest], protocol: Protocol = "validation") -> HeldOut | None:
    """The images and captions by which the epoch is chosen: of `val`, or with the protocol `released` of `test`.

    Returns None if there are no such images or captions.
    """
    split = "test" if protocol == "released" else "val"
    images, _ = _summarised(store, tables, split)
    if not images:
        hint = "; --protocol released chooses it on test, as published tables do" if split == "val" else ""
        label("warning", "yellow", f"there is no split {split}: the last epoch is kept{hint}")
    pairs = make_pairs(store, images, tables["captions"])
    if not images or not pairs.num_rows:
        return None
    texts = zip(pairs["caption"].to_pylist(), pairs["identity"].to_pylist(), strict=True)
    return HeldOut(split, images, [Sentence(text, identity) for text, identity in texts if identity != NOBODY])


def _summarised(store: Store, tables: Mapping[str, Manifest], split: str) -> tuple[list[ImageRow], list[Reject]]:
    """The images of a split with their summaries if there is a table of dialogues; images without one are rejects."""
    rows = list_images(store, tables["images"], split)
    if "dialogues" not in tables:
        return rows, []
    return add_summaries(store, rows, tables["images"], tables["dialogues"])
