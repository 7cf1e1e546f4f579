"""The samples of a training run, read from the tables: training pairs and held-out images. Imports no torch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from ceca.config import Protocol, TrainConfig
from ceca.data.schema import NOBODY
from ceca.data.store import Manifest, Reject, Store, filesystem
from ceca.data.tables import Images, Pairs, find_captions, find_dialogues, find_images, list_images, read_texts
from ceca.errors import UserError
from ceca.model.tokens import count_tokens, tokenize_numpy
from ceca.training.order import Batches, Portion, published_noise, shuffled_captions
from jobs.runtime.console import console, label
from jobs.training.data import HeldOut, Sentence, Texts, TrainingSet
from jobs.training.sets import InputSet


def training_set(sets: Sequence[InputSet], config: TrainConfig, steps: int | None = None) -> TrainingSet:
    """The samples of all sets, and what an epoch takes of each.

    Args:
        sets: the dataset, and the further ones.
        config: settings of the training. Its file of noisy correspondence is for the dataset alone.
        steps: as in `training_pairs`.

    Raises:
        UserError: there are fewer pairs than one global batch, or none in one of the sets.
    """
    without_file = dataclasses.replace(config, noise_file=None)
    samples = [
        tokenize_pairs(
            each.store,
            training_pairs(each.store, config, each.tables, steps),
            without_file if number else config,
            each.weight,
        )
        for number, each in enumerate(sets)
    ]
    if len(samples) == 1:
        joined = samples[0]  # not copied, for texts may fill much of the memory
    else:
        joined = join_sets(samples, [len(each.tables["images"].parts) for each in sets])
    if not len(Batches.of(joined.visited, config)):
        raise UserError(
            f"split {config.split!r} has {joined.visited} image-caption pairs, fewer than one global batch of "
            f"{config.global_batch}; lower --global-batch or check the dataset"
        )
    return joined


def join_sets(sets: Sequence[TrainingSet], parts: Sequence[int]) -> TrainingSet:
    """Join sets one after the other. Parts of images and identities are counted on, so they are kept apart.

    Args:
        sets: the samples of each set.
        parts: number of parts of each set's images table.
    """
    first_part = np.cumsum([0, *parts[:-1]])
    first_identity = np.cumsum([0, *(each.identities for each in sets[:-1])])
    return TrainingSet(
        part=np.concatenate([each.part + first for each, first in zip(sets, first_part, strict=True)]),
        row=np.concatenate([each.row for each in sets]),
        identity=np.concatenate([each.identity + first for each, first in zip(sets, first_identity, strict=True)]),
        nobody=np.concatenate([each.nobody for each in sets]),
        caption=_join_texts([each.caption for each in sets]),
        summary=_join_texts([each.summary for each in sets]),
        portions=tuple(portion for each in sets for portion in each.portions),
    )


def _join_texts(texts: Sequence[Texts]) -> Texts:
    sizes = [len(each.tokens) for each in texts]
    return Texts(
        np.concatenate([each.tokens for each in texts]),
        np.concatenate([each.of_pair + sum(sizes[:number]) for number, each in enumerate(texts)]),
        sum(each.cut * size for each, size in zip(texts, sizes, strict=True)) / sum(sizes),
    )


def training_pairs(
    store: Store, config: TrainConfig, tables: Mapping[str, Manifest], steps: int | None = None
) -> Pairs:
    """Find the (image, caption) pairs of a set to learn from, and print their number.

    Args:
        store: the dataset.
        config: settings of the training.
        tables: the input tables by name.
        steps: take only this many global batches of pairs, spread evenly over the split; None: all pairs.

    Raises:
        UserError: the split has no pairs.
    """
    images, missing = _described(store, tables, config.split)
    if missing:
        label("warning", "yellow", f"{len(missing)} images have no summary and are left out of training")
    pairs = find_captions(store, images, tables["captions"])
    if not len(pairs):
        raise UserError(
            f"split {config.split!r} of {store.uri} has no pairs of an image and a caption to learn from; check the "
            "dataset, or take another --split"
        )
    if steps is not None:
        pairs = pairs.take(np.linspace(0, len(pairs) - 1, steps * config.global_batch).astype(int))
    identities = len(np.unique(images.identities))
    console.print(f"train: {len(images):,} images, {len(pairs):,} pairs, {identities:,} identities")
    return pairs


def tokenize_pairs(store: Store, pairs: Pairs, config: TrainConfig, weight: float = 1.0) -> TrainingSet:
    """Number the identities and tokenise the texts of a set's pairs, once for all epochs.

    Args:
        store: the set.
        pairs: its pairs.
        config: settings of the training.
        weight: how often an epoch visits each of them.

    Raises:
        UserError: `config.noise_file` does not fit the pairs.
    """
    captions_of, context = _captions_of(len(pairs), config), config.model.context
    images = pairs.images
    rows = images.rows[pairs.image]
    places = np.array(images.table.places(rows), np.int32).reshape(-1, 2)
    if images.dialogues is None or images.told is None:
        summary = Texts(tokenize_numpy([""], context).astype(np.uint16), np.zeros(len(pairs), np.int64))
    else:
        summary = _tokenize(store, images.dialogues, images.told[pairs.image], "summary", context)
    caption = _tokenize(store, pairs.captions, pairs.rows[captions_of], "text", context)
    console.print(
        f"train: longer than the model's {context} tokens, and cut: {caption.cut:.1%} of captions, "
        f"{summary.cut:.1%} of summaries"
    )
    return TrainingSet(
        part=places[:, 0],
        row=places[:, 1],
        identity=number_identities(pairs.identities, rows),
        nobody=pairs.identities == NOBODY,
        caption=caption,
        summary=summary,
        portions=(Portion.of(len(pairs), weight),),
    )


def _tokenize(store: Store, table: Manifest, rows: np.ndarray, column: str, context: int) -> Texts:
    """Token ids of the texts in these rows of a table, [P]."""
    needed, of_pair = np.unique(rows, return_inverse=True)
    tokens = np.zeros((len(needed), context), np.uint16)
    start, long = 0, 0
    for texts in read_texts(store, table, needed, column):
        part = tokens[start : start + len(texts)]
        part[:] = tokenize_numpy(texts, context)
        long += sum(count_tokens(texts[full]) > context for full in np.flatnonzero(part[:, -1]))
        start += len(texts)
    return Texts(tokens, of_pair, long / max(1, len(needed)))


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


def number_identities(identities: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Numbers from 0 of the identities of pairs, [P]; an image whose person nobody named is a person of its own.

    Args:
        identities: [P] of the pairs.
        images: [P] number of each pair's image.
    """
    keys = np.stack([identities, np.where(identities == NOBODY, images, 0)])
    return np.unique(keys, axis=1, return_inverse=True)[1].ravel()


def held_out(store: Store, tables: Mapping[str, Manifest], protocol: Protocol = "validation") -> HeldOut | None:
    """The images and captions by which the epoch is chosen: of `val`, or with the protocol `released` of `test`.

    Returns None if there are no such images or captions.
    """
    split = "test" if protocol == "released" else "val"
    images, _ = _described(store, tables, split)
    if not len(images):
        hint = "; --protocol released chooses it on test, as published tables do" if split == "val" else ""
        label("warning", "yellow", f"there is no split {split}: the last epoch is kept{hint}")
        return None
    pairs = find_captions(store, images, tables["captions"])
    if not len(pairs):
        return None
    asked = pairs.take(pairs.identities != NOBODY)
    if not len(asked):
        label("warning", "yellow", f"nobody is named in the split {split}: the last epoch is kept")
        return None
    texts = itertools.chain.from_iterable(read_texts(store, asked.captions, asked.rows, "text"))
    sentences = [Sentence(text, identity) for text, identity in zip(texts, asked.identities.tolist(), strict=True)]
    return HeldOut(split, list_images(store, images), sentences)


def _described(store: Store, tables: Mapping[str, Manifest], split: str) -> tuple[Images, list[Reject]]:
    """The images of a split with their dialogues if there is a table of them; images without one are rejects."""
    images = find_images(store, tables["images"], split)
    return find_dialogues(store, images, tables["dialogues"]) if "dialogues" in tables else (images, [])
