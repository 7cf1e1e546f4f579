"""Workers that hold one engine each, and keep many conversations in flight across their units of work."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from ceca.config import DialogueConfig
from ceca.data.store import Manifest, Store
from ceca.dialogue.attributes import Choices, read_truth
from ceca.dialogue.conversation import AT_ONCE, EngineError, Subject
from ceca.dialogue.engines import make_engine
from ceca.settings import from_mapping
from jobs.runtime.records import rows_in
from jobs.runtime.team import WorkerLost
from jobs.runtime.units import Workers

MOST_AT_ONCE = 1024  # conversations of a large GPU


def engine_workers(config: DialogueConfig, images_per_unit: int) -> Workers:
    """The workers of a stage that asks an engine.

    Args:
        config: the engine, the number of workers and of their conversations.
        images_per_unit: images of a unit of work. While one unit drains, the next fills.
    """
    gpus = config.vllm.gpus * config.vllm.tensor_parallel if config.engine == "vllm" else 0
    conversations = config.conversations or ((config.vllm.sequences or MOST_AT_ONCE) if gpus else AT_ONCE)
    return Workers(
        config.replicas,
        cpus=1,
        gpus=gpus,
        accelerator_type=config.vllm.accelerator_type if gpus else None,
        units_at_once=1 + math.ceil(conversations / images_per_unit),
        may_be_lost=config.engine == "vllm",
        spread=bool(gpus) and config.vllm.several_machines,
    )


class CanaryError(EngineError):
    """The model does not describe what it is shown."""


class EngineWorker:
    """Holds one engine, in an event loop of its own, so that the engine lives from one unit to the next.

    Several threads may do units at once. Their conversations share the engine and one limit.

    Args:
        uri: the dataset.
        images: the images table.
        config: settings of the engine, as plain values.
        vocabulary: attribute → its values, for the oracle.
    """

    def __init__(self, uri: str, images: Manifest, config: dict[str, Any], vocabulary: Choices):
        self.store, self.images = Store(uri), images
        self.config = from_mapping(DialogueConfig, config)
        self.truth: dict[str, dict[str, Any]] = {}  # image id → fields of Subject, for drawn pedestrians
        if self.config.engine == "oracle":
            self.truth = read_truth(self.store, images)
        self.engine = make_engine(self.config, vocabulary)
        self.occupancy = Occupancy()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.use_engine(self.engine.start())
        at_once: int = getattr(self.engine, "at_once", AT_ONCE)
        self.in_flight = asyncio.Semaphore(self.config.conversations or at_once)
        self.occupancy.reset()

    def use_engine(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine in the loop of the engine.

        Raises:
            WorkerLost: the engine of this worker fails; those of other workers may work.
            EngineError: no worker's engine can work, because they share an endpoint, or the model sees no images.
        """
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()
        except CanaryError:
            raise
        except EngineError as error:
            if self.config.engine == "vllm":
                raise WorkerLost(str(error)) from error
            raise

    @contextlib.asynccontextmanager
    async def conversation(self) -> AsyncIterator[None]:
        """Wait for a place in the engine, and hold it while the context lasts."""
        async with self.in_flight:
            self.occupancy.change(1)
            try:
                yield
            finally:
                self.occupancy.change(-1)

    def subjects(self, work: dict[str, list[list[int]]]) -> list[Subject]:
        """The images of a unit of work, {"images": ranges of rows}."""
        places = self.images.places(rows_in(work["images"]))
        known = self.store.take(self.images, places, ["image_id", "image"]).to_pylist() if places else []
        return [Subject(**image, **self.truth.get(image["image_id"], {})) for image in known]


class Occupancy:
    """Load of an engine: seconds with and without a conversation, and the sum of all conversations' seconds."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.reset()

    def reset(self) -> None:
        self.since = time.monotonic()
        self.busy = self.idle = self.conversations = 0.0

    def change(self, by: int) -> None:
        """Count conversations that begin (1) or end (-1)."""
        now = time.monotonic()
        span, self.since = now - self.since, now
        self.conversations += span * self.in_flight
        if self.in_flight:
            self.busy += span
        else:
            self.idle += span
        self.in_flight += by

    def take(self) -> dict[str, float]:
        """The seconds since the last call."""
        self.change(0)
        counts = {"engine_busy_s": self.busy, "engine_idle_s": self.idle, "conversation_s": self.conversations}
        self.reset()
        return counts
