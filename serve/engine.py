"""A dialogue engine in a process of its own, which comes with its GPUs when it is needed and goes when it is idle.

So a service that nobody asks for it holds no GPUs.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayActorError, RayTaskError

from ceca.config import DialogueConfig
from ceca.dialogue.attributes import Choices
from ceca.dialogue.conversation import AT_ONCE, Dialogue, DialogueError, EngineError, Subject, converse
from ceca.dialogue.engines import make_engine
from ceca.dialogue.understanding import understand
from ceca.dialogue.verdicts import Claim, Verdict, judge
from ceca.machines import machines_for

log = logging.getLogger(__name__)

RETRY_S = 10.0  # pause after an engine that did not start or died, before the next attempt


class Knowledge(NamedTuple):
    """What an engine is given besides its settings.

    Attributes:
        choices: the attributes to ask for and their values; None asks for none.
        truth: what the simulated annotator knows: image id → fields of `Subject`.
    """

    choices: Choices | None
    truth: Mapping[str, Mapping[str, Any]] = {}


class Engine:
    """The engine's process. Plain Python; `OnDemand` makes it a Ray actor.

    Args:
        settings: settings of the dialogue.
        knowledge: what it is given besides.
    """

    def __init__(self, settings: DialogueConfig, knowledge: Knowledge):
        self.settings, self.knowledge = settings, knowledge
        self.engine = make_engine(settings, knowledge.choices)

    async def start(self) -> str:
        """Start the engine.

        Returns:
            The model's name.

        Raises:
            EngineError: it did not start.
        """
        await self.engine.start()
        self.free = asyncio.Semaphore(getattr(self.engine, "at_once", AT_ONCE))
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
                choices=self.knowledge.choices,
                attribute_tokens=settings.attribute_tokens,
            )
        except DialogueError as error:
            return error.reason, error.detail

    async def judge(self, subject: Subject, claims: Sequence[Claim], seconds: float) -> list[Verdict]:
        """Ask whether an image fits claims, one after the other, so that the image is in the engine's cache.

        Args:
            subject: the image.
            claims: what is asked about.
            seconds: time limit. What is not answered then is given up, so that the engine works for those who wait.

        Returns:
            The verdicts that there are in time, in the order of the claims.

        Raises:
            EngineError: the engine does not answer.
        """
        subject = dataclasses.replace(subject, **self.knowledge.truth.get(subject.image_id, {}))
        verdicts: list[Verdict] = []
        with contextlib.suppress(TimeoutError, DialogueError):  # the engine cannot answer about this image
            async with asyncio.timeout(seconds), self.free:
                for claim in claims:
                    verdicts.append(await judge(self.engine, subject, claim))
        return verdicts

    async def understand(
        self, subject: Subject, words: str, choices: Choices, question: str, seconds: float
    ) -> dict[str, str] | None:
        """Read a searcher's words beside the picture that they were shown.

        Args:
            subject: the picture.
            words: what they say.
            choices: the facets that they can mean, and their values.
            question: what they were asked; empty if they speak unasked.
            seconds: time limit.

        Returns:
            The facets that are understood; None if the engine cannot tell in time.

        Raises:
            EngineError: the engine does not answer.
        """
        with contextlib.suppress(TimeoutError, DialogueError):
            async with asyncio.timeout(seconds), self.free:
                return await understand(self.engine, subject, words, choices, question)
        return None


class OnDemand:
    """An engine's process, which is started on demand and ended after `idle_s` without use.

    Args:
        settings: settings of the dialogue.
        gpus: number of GPUs that the process takes.
        idle_s: seconds without use after which it is ended.
        does: what the engine does, for messages: "describes images".
        prepare: reads what the engine is given besides; may block.
        on_ready: called when the engine has started.
    """

    def __init__(
        self,
        settings: DialogueConfig,
        *,
        gpus: int,
        idle_s: float,
        does: str,
        prepare: Callable[[], Knowledge],
        on_ready: Callable[[], None] = lambda: None,
    ):
        self.settings, self.gpus, self.idle_s, self.does = settings, gpus, idle_s, does
        self.prepare, self.on_ready = prepare, on_ready
        self.engine: Any = None  # the actor's handle
        self.starting: asyncio.Task[None] | None = None
        self.model, self.problem = "", ""
        self.used = self.failed = float("-inf")  # times of the last answer and of the last failure

    def ready(self) -> bool:
        """Whether the engine runs. If not, this starts it, and `on_ready` is called when it runs."""
        idle = self.starting is None and time.monotonic() > self.failed + RETRY_S
        if self.engine is None and idle:
            start = f"starts as soon as there is room for its GPUs ({self.gpus})" if self.gpus else "is starting"
            self.problem = f"the engine that {self.does} {start}"
            self.starting = asyncio.create_task(self._start())
        return self.engine is not None

    async def _start(self) -> None:
        try:
            engine = self._make(await asyncio.to_thread(self.prepare))
            self.model = await engine.start.remote()
        except Exception as error:  # from the store, vLLM or the node: each may work again later
            self._lost(error)
        else:
            self.engine, self.problem, self.used = engine, "", time.monotonic()
            self.on_ready()
        finally:
            self.starting = None

    def _make(self, knowledge: Knowledge) -> Any:
        machines = machines_for("dialogue", "serve") if self.gpus else machines_for("cpu", "serve")
        kind = {"accelerator_type": self.settings.vllm.accelerator_type} if self.gpus else {}
        actor = ray.remote(num_cpus=0, num_gpus=self.gpus, label_selector=machines, **kind)(Engine)
        return actor.remote(self.settings, knowledge)

    def _lost(self, error: Exception) -> None:
        cause = error.cause if isinstance(error, RayTaskError) else error
        self.engine, self.failed = None, time.monotonic()
        self.problem = " ".join(str(cause).split())
        log.warning("the engine that %s: %s", self.does, self.problem)

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the engine.

        Raises:
            EngineError: it is not there, or it failed; a later `ready` starts it again.
        """
        engine = self.engine
        if engine is None:  # it failed a moment ago
            raise EngineError(self.problem)
        try:
            result = await getattr(engine, method).remote(*arguments)
        except (RayActorError, RayTaskError, EngineError) as error:
            died = isinstance(error, RayActorError)  # Ray's own words about that are long, and of its internals
            problem = EngineError(f"the process of the engine that {self.does} has died") if died else error
            if engine is self.engine:  # else another call was told first, and a new engine may run by now
                self._lost(problem)
            raise EngineError(self.problem or str(problem)) from None
        self.used = time.monotonic()
        return result

    def rest(self, wanted: bool) -> None:
        """End the engine if it is idle.

        Args:
            wanted: somebody is waiting for the engine, so keep it or its start.
        """
        if wanted:
            return
        if self.starting is not None:  # nobody waits any more, so no machine needs to come
            self.starting.cancel()
        self.problem = ""
        if self.engine is not None and time.monotonic() > self.used + self.idle_s:
            self.engine = None  # Ray ends an actor without handles
