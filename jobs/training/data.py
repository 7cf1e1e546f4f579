"""The training input: the samples in Ray's object store, and their stream to a worker in the order of the epochs.

Encoded images lie in the object store, one reference per part: any sample is read without a copy, and a node fetches
a part once. Texts are tokenised once for all epochs. CPU workers of Ray Data decode and resize the images ahead of the
trainer and send uint8. They import no torch, which would cost each of them seconds and a gigabyte.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray

from ceca.config import TrainConfig
from ceca.data.store import Manifest, Store
from ceca.data.tables import ImageRow
from ceca.datasets.images import decode_image
from ceca.training.order import epoch_order, epoch_partners
from ceca.training.workers import batch_slice


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """All P pairs in a fixed order: place of the image, identity, and texts as token ids."""

    part: np.ndarray  # [P] part of the images table
    row: np.ndarray  # [P] row in the part
    identity: np.ndarray  # [P], numbered from 0
    caption: np.ndarray  # [P, 77] uint16: CLIP has 49,408 tokens
    summary: np.ndarray  # [P, 77] uint16

    def __len__(self) -> int:
        return len(self.identity)

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
    images: dict[int, Any]  # part → reference to its column of encoded images
    validation: Any | None  # reference to HeldOut


@ray.remote(num_cpus=0.5, max_retries=-1)  # on a full disk workers die until there is room again
def _load_part(uri: str, manifest: Manifest, part: int) -> pa.Table:
    return Store(uri).read_part(manifest, part, ["image"])


def load_images(store: Store, images: Manifest, parts: set[int]) -> dict[int, ray.ObjectRef]:
    """Let Ray tasks fetch the `image` column of these parts from the store: part → reference."""
    return {part: _load_part.remote(store.uri, images, part) for part in sorted(parts)}


class EncodedImages:
    """Encoded images by (part, row), read in place from Ray's object store."""

    def __init__(self, references: dict[int, ray.ObjectRef]):
        self.references = references
        self.columns: dict[int, pa.ChunkedArray] = {}

    def __call__(self, part: int, row: int) -> bytes:
        if part not in self.columns:
            self.columns[part] = ray.get(self.references[part])["image"]
        return self.columns[part][row].as_py()


class LoadSamples:
    """Ray Data actor: sample numbers → decoded images and tokens.

    A sample number counts this worker's samples through all epochs. The order of an epoch gives the global batches;
    this worker loads its own part of each batch.

    Args:
        config: settings of the training.
        rank: number of this worker.
        size: number of workers.
        samples: reference to the TrainingSet.
        images: part → reference to its encoded images.
        start: sample number of the first sample to load.
    """

    def __init__(
        self, config: TrainConfig, rank: int, size: int, samples: ray.ObjectRef, images: dict[int, Any], start: int
    ):
        self.config, self.start = config, start
        self.samples: TrainingSet = ray.get(samples)
        self.images = EncodedImages(images)
        self.rows = batch_slice(rank, size, config.global_batch)
        self.steps = len(self.samples) // config.global_batch
        self.epoch = -1

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        samples = self.samples
        pairs, captions, summaries = np.array([self._pair(self.start + int(sample)) for sample in batch["id"]]).T
        height, width = self.config.model.image_height, self.config.model.image_width
        pixels = [
            decode_image(self.images(part, row), height, width)
            for part, row in zip(samples.part[pairs].tolist(), samples.row[pairs].tolist(), strict=True)
        ]
        return {
            "image": np.stack(pixels),
            "caption": samples.caption[captions].astype(np.int32),
            "summary": samples.summary[summaries].astype(np.int32),
            "identity": samples.identity[pairs],
        }

    def _pair(self, sample: int) -> tuple[int, int, int]:
        """Positions of a sample's three pairs: the image's, the caption's and the summary's."""
        step, offset = divmod(sample, self.rows.stop - self.rows.start)
        epoch, step = divmod(step, self.steps)
        if self.epoch != epoch:
            self._begin(epoch)
        pair = int(self.order[step * self.config.global_batch + self.rows.start + offset])
        return pair, int(self.captions[pair]), int(self.summaries[pair])

    def _begin(self, epoch: int) -> None:
        config, samples = self.config, self.samples
        self.epoch = epoch
        self.order = epoch_order(samples.identity, config.seed, epoch, config.pairs_per_identity)
        views = (samples.identity, samples.image, config.seed, epoch)
        self.captions = epoch_partners(*views, config.caption_swap, "captions")
        self.summaries = epoch_partners(*views, config.summary_swap, "summaries")


def stream_batches(
    config: TrainConfig, rank: int, size: int, samples: ray.ObjectRef, images: dict[int, Any], start_step: int
) -> Iterator[dict[str, np.ndarray]]:
    """This worker's batches in order, from `start_step` (counted through all epochs) to the end of training."""
    steps = len(ray.get(samples)) // config.global_batch * config.epochs - start_step
    rows = batch_slice(rank, size, config.global_batch)
    per_step = rows.stop - rows.start
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    numbers = ray.data.range(steps * per_step, override_num_blocks=max(1, min(steps // 4, 1000)))
    loaded = numbers.map_batches(
        LoadSamples,
        fn_constructor_args=(config, rank, size, samples, images, start_step * per_step),
        batch_size=per_step,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.loaders_per_worker),
        num_cpus=config.cpus_per_loader,
    )
    return iter(loaded.iter_batches(batch_size=per_step, prefetch_batches=2))
