"""The dialogue engine that describes added images.

It runs in its own process, which takes its GPUs when an image needs it and releases them when idle. So a service
without new images holds no GPUs for it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from ceca.config import DialogueConfig, ServeConfig
from ceca.data.store import Store
from ceca.dialogue.attributes import Choices, read_vocabulary
from ceca.dialogue.conversation import Dialogue, DialogueError, EngineError, Subject, converse
from ceca.dialogue.engines import make_engine

log = logging.getLogger(__name__)

RETRY_S = 10.0  # pause after an engine that did not start, before the next attempt


@ray.remote(num_cpus=0)
class Engine:
    """The engine's process, a Ray actor.

    Args:
        settings: settings of the dialogue.
        choices: the attributes to ask for and their values; None asks for none.
    """

    def __init__(self, settings: DialogueConfig, choices: Choices | None):
        self.settings, self.choices = settings, choices
        self.engine = make_engine(settings, choices)

    async def start(self) -> str:
        """Start the engine.

        Returns:
            The model's name.

        Raises:
            EngineError: it did not start.
        """
        await self.engine.start()
        return self.engine.model

    async def converse(self, subject: Subject) -> Dialogue | tuple[str, str]:
        """Hold the dialogue about an image.

        Returns:
            The dialogue, or the reason and detail of a DialogueError.

        Raises:
            EngineError: the engine does not answer.
        """
        settings = self.settings
        try:
            return await converse(
                self.engine,
                subject,
                questions=settings.questions,
                answer_tokens=settings.answer_tokens,
                summary_tokens=settings.summary_tokens,
                choices=self.choices,
                attribute_tokens=settings.attribute_tokens,
            )
        except DialogueError as error:
            return error.reason, error.detail


class Questioner:
    """Describes images with an engine, which it starts on demand and stops after `shrink_s` without images.

    Args:
        store: the dataset.
        settings: settings of the dialogue, as for the dataset's images.
        config: settings of the service.
        on_ready: called when the engine has started.
    """

    def __init__(self, store: Store, settings: DialogueConfig, config: ServeConfig, on_ready: Callable[[], None]):
        self.store, self.config, self.on_ready = store, config, on_ready
        self.gpus = config.engine_gpus * settings.vllm.tensor_parallel if settings.engine == "vllm" else 0
        vllm = dataclasses.replace(settings.vllm, gpus=config.engine_gpus)
        self.settings = dataclasses.replace(settings, vllm=vllm)
        self.engine: ActorHandle | None = None
        self.starting: asyncio.Task[None] | None = None
        self.model, self.problem = "", ""
        self.used = self.failed = float("-inf")  # times of the last answer and of the last failed start

    def ready(self) -> bool:
        """Whether the engine runs. If not, this starts it, and `on_ready` is called when it runs."""
        idle = self.starting is None and time.monotonic() > self.failed + RETRY_S
        if self.engine is None and idle:
            self.starting = asyncio.create_task(self._start())
        return self.engine is not None

    async def _start(self) -> None:
        start = f"starts as soon as there is room for its GPUs ({self.gpus})" if self.gpus else "is starting"
        self.problem = f"the engine that describes images {start}"
        try:
            choices = await asyncio.to_thread(read_vocabulary, self.store) if self.settings.attributes else None
            engine = Engine.options(num_gpus=self.gpus).remote(self.settings, choices)  # type: ignore[attr-defined]
            self.model = await engine.start.remote()
        except Exception as error:  # from the store, vLLM or the node: each may work again later
            self._lost(error)
        else:
            self.engine, self.problem, self.used = engine, "", time.monotonic()
            self.on_ready()
        finally:
            self.starting = None

    def _lost(self, error: Exception) -> None:
        cause = error.cause if isinstance(error, RayTaskError) else error
        self.engine, self.failed = None, time.monotonic()
        self.problem = " ".join(str(cause).split())
        log.warning("the engine that describes images: %s", self.problem)

    async def converse(self, subject: Subject) -> Dialogue:
        """Hold the dialogue about an image.

        Raises:
            DialogueError: it failed for this image.
            EngineError: the engine failed; the next `ready` starts it again.
        """
        if self.engine is None:  # it failed a moment ago
            raise EngineError(self.problem)
        try:
            result = await self.engine.converse.remote(subject)
        except (RayActorError, RayTaskError) as error:
            self._lost(error)
            raise EngineError(self.problem) from None
        self.used = time.monotonic()
        if isinstance(result, tuple):
            raise DialogueError(*result)
        return result

    def rest(self, wanted: bool) -> None:
        """Release the engine if it is idle.

        Args:
            wanted: images are waiting for the engine, so keep it or its start.
        """
        if wanted:
            return
        if self.starting is not None:  # no image waits any more, so no machine needs to come
            self.starting.cancel()
        self.problem = ""
        if self.engine is not None and time.monotonic() > self.used + self.config.shrink_s:
            self.engine = None  # Ray ends an actor without handles
