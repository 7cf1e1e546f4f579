"""The dialogue engine that describes added images.

It runs in its own process, which takes its GPUs when an image needs it and releases them when idle. So a service
without new images holds no GPUs for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from ceca.config import DialogueConfig, ServeConfig, VLLMConfig
from ceca.data.store import Store
from ceca.dialogue.attributes import Choices, read_vocabulary
from ceca.dialogue.conversation import Dialogue, DialogueError, EngineError, Subject, converse
from ceca.dialogue.engines import make_engine
from ceca.errors import UserError
from ceca.machines import machines_for
from ceca.model.registry import lies_in
from ceca.search.edition import Edition
from ceca.settings import from_mapping, to_mapping

log = logging.getLogger(__name__)

RETRY_S = 10.0  # pause after an engine that did not start, before the next attempt


EngineSettings = DialogueConfig | str  # settings of the dialogue, or why no engine can look at new images

DESCRIBE = "describe the person in `summary`"


def engine_settings(edition: Edition, config: ServeConfig) -> EngineSettings:
    """Settings of the dialogue about an added image: the same questions as for the dataset's images.

    The dataset says what is asked. The service's own settings alone say where images and keys go: somebody else may
    have written the dataset.
    """
    dialogues = edition.told()
    if dialogues is None or "engine" not in dialogues.config or dialogues.config.get("published"):
        return f"no engine can look at a new image here, because the dataset's dialogues were imported; {DESCRIBE}"
    place = f"the manifest of {edition.store.place('dialogues')}"
    given = from_mapping(DialogueConfig, {**dialogues.config, "only_missing": False}, place)
    if given.engine == "oracle":  # it knows only drawn people
        return (
            "no engine can look at a new image here, because the dataset's dialogues come from the simulated "
            f"annotator; {DESCRIBE}"
        )
    if given.engine == "openai" and not config.engine_url:
        return (
            f"the dataset's dialogues came from {given.openai.base_url!r}, and images are not sent where a dataset "
            f"says: start the service with engine_url, or {DESCRIBE}"
        )
    model = config.engine_model or given.vllm.model
    if given.engine == "vllm" and not (config.engine_model or _is_known(edition.store, model)):
        return (
            f"the dataset's dialogues came from the model {model!r}, which is neither in the dataset nor the "
            f"default one: start the service with engine_model, or {DESCRIBE}"
        )
    settings = to_mapping(given, results_only=True)  # without how a job runs, which a manifest does not decide either
    settings["openai"] |= {"base_url": config.engine_url, "api_key_variable": config.engine_key_variable}
    settings["vllm"] |= {"model": model, "gpus": min(1, config.engine_gpus)}
    settings["vllm"]["tensor_parallel"] = max(1, config.engine_gpus)
    return from_mapping(DialogueConfig, settings, place)


def _is_known(store: Store, model: str) -> bool:
    return model == VLLMConfig().model or lies_in(store, model)


def refuse_without_engine(settings: EngineSettings, summary: str) -> None:
    """Refuse an image that nothing can describe, before it is acknowledged.

    Raises:
        UserError: it has no summary, and no engine can write one.
    """
    if isinstance(settings, str) and not summary:
        raise UserError(settings)


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
        settings: settings of the dialogue, from `engine_settings`.
        config: settings of the service.
        on_ready: called when the engine has started.
    """

    def __init__(self, store: Store, settings: DialogueConfig, config: ServeConfig, on_ready: Callable[[], None]):
        self.store, self.config, self.on_ready = store, config, on_ready
        self.gpus = config.engine_gpus if settings.engine == "vllm" else 0
        self.settings = settings
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
            machines = machines_for("dialogue", "serve") if self.gpus else machines_for("cpu", "serve")
            options = {"num_gpus": self.gpus, "label_selector": machines}
            engine = Engine.options(**options).remote(self.settings, choices)  # type: ignore[attr-defined]
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
