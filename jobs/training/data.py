"""The training input: which samples there are, and streaming them to a worker in the order of the epochs.

Encoded images lie in Ray's object store, a part a reference, so that any sample can be read without copying and
nodes fetch a part once. Texts are tokenised once, for all epochs. Ray Data decodes and resizes on CPU workers ahead
of the trainer and sends uint8; they import no torch, which would cost each of them seconds and a gigabyte.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from ceca.config import TrainConfig
from ceca.data.store import Manifest, Store
from ceca.datasets.images import decode_image
from ceca.training.order import epoch_order, epoch_partners
from ceca.training.workers import batch_slice


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """Every pair in a fixed order: where its image is, its identity, and its texts as token ids."""

    part: np.ndarray  # [P] of the images table
    row: np.ndarray  # [P] in the part
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
        """[P] numbers that tell images apart."""
        return self.part.astype(np.int64) << 32 | self.row.astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Run:
    """All that a worker is told."""

    config: TrainConfig
    store_uri: str
    run: str  # folder of the run below the dataset
    samples: Any  # reference to a TrainingSet
    images: dict[int, Any]
    validation: Any | None  # reference to {"images": [(part, row, identity, summary)], "queries": [(text, identity)]}


@ray.remote(num_cpus=0.5, max_retries=-1)  # as often as workers die: on a full disk they do so for as long as it is
def _load_part(uri: str, manifest: Manifest, part: int) -> pa.Table:
    return Store(uri).read_part(manifest, part, ["image"])


def load_images(store: Store, images: Manifest, parts: set[int]) -> dict[int, ray.ObjectRef]:
    """References to the `image` column of these parts, fetched from the store by Ray tasks."""
    return {part: _load_part.remote(store.uri, images, part) for part in sorted(parts)}


class EncodedImages:
    """Encoded bytes by (part, row), read in place from Ray's object store."""

    def __init__(self, references: dict[int, ray.ObjectRef]):
        self.references = references
        self.columns: dict[int, pa.ChunkedArray] = {}

    def __call__(self, part: int, row: int) -> bytes:
        if part not in self.columns:
            self.columns[part] = ray.get(self.references[part])["image"]
        return self.columns[part][row].as_py()


class LoadSamples:
    """Ray Data actor: sample numbers → decoded images and tokens.

    A sample number counts this worker's samples through all epochs. The order of an epoch gives the global batches,
    and of each this worker takes its own share.
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
        """The pair of a sample number, and the pairs whose caption and summary it takes."""
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
    """This worker's batches from `start_step` (counted through all epochs) to the end of training, in order."""
    steps = len(ray.get(samples)) // config.global_batch * config.epochs - start_step
    rows = batch_slice(rank, size, config.global_batch)
    own = rows.stop - rows.start
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    numbers = ray.data.range(steps * own, override_num_blocks=max(1, min(steps // 4, 1000)))
    loaded = numbers.map_batches(
        LoadSamples,
        fn_constructor_args=(config, rank, size, samples, images, start_step * own),
        batch_size=own,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.loaders_per_worker),
        num_cpus=config.cpus_per_loader,
    )
    return iter(loaded.iter_batches(batch_size=own, prefetch_batches=2))
