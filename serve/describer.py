"""The engine that is asked about added images: a process of its own, which comes with its GPUs when it is needed and
goes when it is not, so that a service without new images holds none."""

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

AGAIN_S = 10.0  # before an engine that did not start is tried again


@ray.remote(num_cpus=0)
class Engine:
    """The process."""

    def __init__(self, settings: DialogueConfig, choices: Choices | None):
        self.settings, self.choices = settings, choices
        self.engine = make_engine(settings, choices)

    async def start(self) -> str:
        """Returns the model's name; raises EngineError."""
        await self.engine.start()
        return self.engine.model

    async def converse(self, subject: Subject) -> Dialogue | tuple[str, str]:
        """A dialogue, or the reason and the detail of a DialogueError; raises EngineError."""
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
    """Asks about images, by an engine that it starts when one is wanted and lets go after `shrink_s` without."""

    def __init__(self, store: Store, settings: DialogueConfig, config: ServeConfig, on_ready: Callable[[], None]):
        self.store, self.config, self.on_ready = store, config, on_ready
        self.gpus = config.engine_gpus * settings.vllm.tensor_parallel if settings.engine == "vllm" else 0
        vllm = dataclasses.replace(settings.vllm, gpus=config.engine_gpus)
        self.settings = dataclasses.replace(settings, vllm=vllm)
        self.engine: ActorHandle | None = None
        self.starting: asyncio.Task[None] | None = None
        self.model, self.problem = "", ""
        self.used = self.failed = float("-inf")  # when an answer came last, and when a start failed

    def ready(self) -> bool:
        """Is the engine there? If not, it is started, and `on_ready` says when it is."""
        idle = self.starting is None and time.monotonic() > self.failed + AGAIN_S
        if self.engine is None and idle:
            self.starting = asyncio.create_task(self._start())
        return self.engine is not None

    async def _start(self) -> None:
        room = f", when there is room for its GPUs ({self.gpus})" if self.gpus else ""
        self.problem = f"the engine that describes images starts{room}"
        try:
            choices = await asyncio.to_thread(read_vocabulary, self.store) if self.settings.attributes else None
            engine = Engine.options(num_gpus=self.gpus).remote(self.settings, choices)  # type: ignore[attr-defined]
            self.model = await engine.start.remote()
        except Exception as error:  # of the store, of vLLM, of its node: all may come back
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
        """A dialogue about an image.

        Raises:
            DialogueError: for this image. EngineError: for all; the next `ready` starts it anew.
        """
        if self.engine is None:  # lost a moment ago
            raise EngineError(self.problem)
        try:
            found = await self.engine.converse.remote(subject)
        except (RayActorError, RayTaskError) as error:
            self._lost(error)
            raise EngineError(self.problem) from None
        self.used = time.monotonic()
        if isinstance(found, tuple):
            raise DialogueError(*found)
        return found

    def rest(self, wanted: bool) -> None:
        """Nobody is asked about now; is somebody waiting for that? Else let go of what is not needed any more."""
        if wanted:
            return
        if self.starting is not None:  # those who waited are gone, and a machine need not come
            self.starting.cancel()
        self.problem = ""
        if self.engine is not None and time.monotonic() > self.used + self.config.shrink_s:
            self.engine = None  # Ray ends an actor of which nobody has a handle
