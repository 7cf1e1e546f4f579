"""The training input: the samples, and their stream to a worker in the order of the epochs.

Texts are tokenised once for all epochs, and lie in the object store. CPU workers of Ray Data decode and resize the
images ahead of the trainer and send uint8. They import no torch, which would cost each of them seconds and a gigabyte.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import ray

from ceca.config import TrainConfig
from ceca.data.tables import ImageRow
from ceca.datasets.images import decode_image
from ceca.machines import machines_for
from ceca.training.order import Batches, Portion, epoch_order, epoch_pairs, epoch_partners
from jobs.training.images import EncodedImages


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts of P pairs as token ids: each text once, however many pairs have it."""

    tokens: np.ndarray  # [T, context] uint16: CLIP has 49,408 tokens
    of_pair: np.ndarray  # [P] row of each pair's text
    cut: float = 0.0  # share of the texts that are longer than the context

    def __getitem__(self, pairs: np.ndarray) -> np.ndarray:
        """Token ids of some pairs' texts, [B, context]."""
        return self.tokens[self.of_pair[pairs]]

    def mean_length(self) -> float:
        """Tokens of a pair's text on average."""
        return float(np.count_nonzero(self.tokens, axis=1)[self.of_pair].mean())


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """All P pairs of all sets in a fixed order: place of the image, identity, and texts as token ids."""

    part: np.ndarray  # [P] part of the images tables, counted through the sets
    row: np.ndarray  # [P] row in the part
    identity: np.ndarray  # [P], numbered from 0
    nobody: np.ndarray  # [P] whether nobody named the image's person
    caption: Texts
    summary: Texts
    portions: tuple[Portion, ...]  # of each set

    @property
    def visited(self) -> int:
        """Number of pairs that an epoch may visit."""
        return sum(portion.taken for portion in self.portions)

    @property
    def identities(self) -> int:
        return int(self.identity.max()) + 1

    @property
    def image(self) -> np.ndarray:
        """Numbers of the images, [P]: pairs of one image have the same number."""
        return self.part.astype(np.int64) << 32 | self.row.astype(np.int64)


class Sentence(NamedTuple):
    """A caption and the person it describes."""

    text: str
    identity: int


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The input of validation: images with their summaries, and the captions that ask for them."""

    split: str
    images: Sequence[ImageRow]
    sentences: Sequence[Sentence]


@dataclasses.dataclass(frozen=True)
class Run:
    """The input of a training worker."""

    config: TrainConfig
    store_uri: str
    run: str  # folder of the run below the dataset
    samples: Any  # reference to a TrainingSet
    images: EncodedImages
    validation: Any | None  # reference to HeldOut


def training_machines(config: TrainConfig) -> dict[str, str]:
    """Ray's label selector of a training's workers, and of those that fetch and decode their images beside them."""
    return machines_for("train" if config.gpus_per_worker else "cpu")


class LoadSamples:
    """Ray Data actor: ranges of sample numbers (`first`, `end`) → decoded images and tokens.

    A sample number counts this worker's samples through all passes. The order of an epoch gives the global batches;
    this worker loads its own part of each batch. An epoch has two equal passes if it begins with a division.

    Args:
        config: settings of the training.
        rank: number of this worker.
        size: number of workers.
        samples: reference to the TrainingSet.
        images: the encoded images.
        start: sample number of the first sample to load.
    """

    def __init__(
        self, config: TrainConfig, rank: int, size: int, samples: ray.ObjectRef, images: EncodedImages, start: int
    ):
        self.config, self.start = config, start
        self.samples: TrainingSet = ray.get(samples)
        self.images = images
        self.places = worker_places(Batches.of(self.samples.visited, config), rank, size)
        self.epoch = -1

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        samples = self.samples
        numbers = [n for first, end in zip(batch["first"], batch["end"], strict=True) for n in range(first, end)]
        pairs, captions, summaries = np.array([self._pair(self.start + number) for number in numbers]).T
        model = self.config.model
        form = model.image_height, model.image_width, model.image_resize
        encoded = self.images.read(samples.part[pairs].tolist(), samples.row[pairs].tolist())
        pixels = [decode_image(image, *form) for image in encoded]
        return {
            "image": np.stack(pixels),
            "caption": samples.caption[captions].astype(np.int32),
            "summary": samples.summary[summaries].astype(np.int32),
            "identity": samples.identity[pairs],
            "nobody": samples.nobody[pairs],
        }

    def _pair(self, sample: int) -> tuple[int, int, int]:
        """Positions of a sample's three pairs: the image's, the caption's and the summary's."""
        number, place = divmod(sample, len(self.places))
        if self.epoch != number // passes(self.config):
            self._begin(number // passes(self.config))
        pair = int(self.order[self.places[place]])
        return pair, int(self.captions[pair]), int(self.summaries[pair])

    def _begin(self, epoch: int) -> None:
        config, samples = self.config, self.samples
        self.epoch = epoch
        pairs = epoch_pairs(samples.portions, config.seed, epoch)
        self.order = pairs[epoch_order(samples.identity[pairs], config.seed, epoch, config.pairs_per_identity)]
        views = (samples.identity, samples.image, config.seed, epoch)
        self.captions = epoch_partners(*views, config.caption_swap, "captions")
        self.summaries = epoch_partners(*views, config.summary_swap, "summaries")


def passes(config: TrainConfig) -> int:
    """How often an epoch visits its pairs: before training for a division, and to train."""
    return 2 if config.division == "consensus" else 1


def worker_places(batches: Batches, rank: int, size: int) -> np.ndarray:
    """The places in an epoch's order that a worker takes in all its steps, one after the other."""
    return np.concatenate([batches.places(step, rank, size) for step in range(len(batches))]).astype(np.int64)


class Numbered(NamedTuple):
    """The samples that a worker still loads: the number of the first one, and how many each batch has."""

    first: int
    sizes: list[int]


def samples_to_load(config: TrainConfig, batches: Batches, rank: int, size: int, start_step: int) -> Numbered:
    """The samples of a worker after `start_step` finished steps.

    In the middle of an epoch the division has been made; at its start, its pass comes first.
    """
    rows = [len(batches.places(step, rank, size)) for step in range(len(batches))]
    epoch, step = divmod(start_step, len(batches))
    done = epoch * passes(config) + (passes(config) - 1 if step else 0)  # passes
    sizes = rows * (config.epochs * passes(config) - done)
    return Numbered(done * sum(rows) + sum(rows[:step]), sizes[step:])


def stream_batches(
    config: TrainConfig, rank: int, size: int, samples: ray.ObjectRef, images: EncodedImages, start_step: int
) -> Iterator[dict[str, np.ndarray]]:
    """This worker's batches in order, to the end of training.

    Args:
        config: settings of the training.
        rank: number of this worker.
        size: number of workers.
        samples: reference to the TrainingSet.
        images: the encoded images.
        start_step: finished training steps. A division's pass comes before the first step of its epoch.
    """
    numbered = samples_to_load(config, Batches.of(ray.get(samples).visited, config), rank, size, start_step)
    sizes, most = numbered.sizes, max(numbered.sizes, default=0)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.execution_options.label_selector = training_machines(config)
    if not most:  # fewer pairs than workers
        return cut_batches(iter(()), sizes, empty_batch(config))
    total = sum(sizes)
    ranges = [{"first": first, "end": min(first + most, total)} for first in range(0, total, most)]
    # `ray.data.range` and Arrow tables start processes that read these numbers.
    loaded = ray.data.from_items(ranges, override_num_blocks=max(1, min(len(ranges) // 4, 1000))).map_batches(
        LoadSamples,
        fn_constructor_args=(config, rank, size, samples, images, numbered.first),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.loaders_per_worker),
        num_cpus=config.cpus_per_loader,
    )
    return cut_batches(iter(loaded.iter_batches(batch_size=most, prefetch_batches=2)), sizes, empty_batch(config))


def empty_batch(config: TrainConfig) -> dict[str, np.ndarray]:
    """The part of a batch with fewer pairs than workers, for a worker that gets none."""
    pixels = np.zeros((0, config.model.image_height, config.model.image_width, 3), np.uint8)
    ids = np.zeros((0, config.model.context), np.int32)
    no_people = {"identity": np.zeros(0, np.int64), "nobody": np.zeros(0, bool)}
    return {"image": pixels, "caption": ids, "summary": ids, **no_people}


def cut_batches(
    stream: Iterator[dict[str, np.ndarray]], sizes: Iterable[int], empty: dict[str, np.ndarray]
) -> Iterator[dict[str, np.ndarray]]:
    """Cut a stream of rows in pieces of any size into batches of the given sizes.

    Args:
        stream: column → values; together at least as many rows as the sizes.
        sizes: rows of each batch.
        empty: a batch without rows.
    """
    held = empty
    for size in sizes:
        while len(held["identity"]) < size:
            piece = next(stream)
            held = (
                {name: np.concatenate([held[name], piece[name]]) for name in held} if len(held["identity"]) else piece
            )
        yield {name: values[:size] for name, values in held.items()}
        held = {name: values[size:] for name, values in held.items()}
