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
from ceca.datasets.images import decode_image
from ceca.samples import epoch_order
from ceca.store import Manifest, Store


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """Every pair in a fixed order: where its image is, its identity, and its texts as token ids."""

    part: np.ndarray  # [P] of the images table
    row: np.ndarray  # [P] in the part
    identity: np.ndarray  # [P]
    caption: np.ndarray  # [P, 77] uint16: CLIP has 49,408 tokens
    summary: np.ndarray  # [P, 77] uint16

    def __len__(self) -> int:
        return len(self.identity)


@ray.remote(num_cpus=0.5)
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

    A sample number counts this worker's samples through all epochs. The permutation of an epoch gives the global
    batches, and of each this worker takes its own slice.
    """

    def __init__(
        self, config: TrainConfig, rank: int, size: int, samples: ray.ObjectRef, images: dict[int, Any], start: int
    ):
        self.config, self.rank, self.start = config, rank, start
        self.samples: TrainingSet = ray.get(samples)
        self.images = EncodedImages(images)
        self.local = config.global_batch // size
        self.steps = len(self.samples) // config.global_batch
        self.order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        samples, chosen = self.samples, np.asarray([self._pair(self.start + int(sample)) for sample in batch["id"]])
        height, width = self.config.model.image_height, self.config.model.image_width
        pixels = [
            decode_image(self.images(part, row), height, width)
            for part, row in zip(samples.part[chosen].tolist(), samples.row[chosen].tolist(), strict=True)
        ]
        return {
            "image": np.stack(pixels),
            "caption": samples.caption[chosen].astype(np.int32),
            "summary": samples.summary[chosen].astype(np.int32),
            "identity": samples.identity[chosen],
        }

    def _pair(self, sample: int) -> int:
        step, offset = divmod(sample, self.local)
        epoch, step = divmod(step, self.steps)
        if self.order[0] != epoch:
            self.order = (epoch, epoch_order(len(self.samples), self.config.seed, epoch))
        return int(self.order[1][step * self.config.global_batch + self.rank * self.local + offset])


def stream_batches(
    config: TrainConfig, rank: int, size: int, samples: ray.ObjectRef, images: dict[int, Any], start_step: int
) -> Iterator[dict[str, np.ndarray]]:
    """This worker's batches from `start_step` (counted through all epochs) to the end of training, in order."""
    steps = len(ray.get(samples)) // config.global_batch * config.epochs - start_step
    local = config.global_batch // size
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    numbers = ray.data.range(steps * local, override_num_blocks=max(1, min(steps // 4, 1000)))
    loaded = numbers.map_batches(
        LoadSamples,
        fn_constructor_args=(config, rank, size, samples, images, start_step * local),
        batch_size=local,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=config.loaders_per_worker),
        num_cpus=config.cpus_per_loader,
    )
    return iter(loaded.iter_batches(batch_size=local, prefetch_batches=2))
