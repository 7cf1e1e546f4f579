"""The dialogue engine that describes added images."""

from __future__ import annotations

from collections.abc import Callable

from ceca.config import DialogueConfig, ServeConfig, VLLMConfig
from ceca.data.store import Store
from ceca.dialogue.attributes import read_vocabulary
from ceca.dialogue.conversation import Dialogue, DialogueError, Subject
from ceca.errors import UserError
from ceca.model.registry import lies_in
from ceca.search.edition import Edition
from ceca.settings import from_mapping, to_mapping
from serve.engine import Knowledge, OnDemand

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


class Questioner(OnDemand):
    """Describes images with an engine, which it starts on demand and stops after `shrink_s` without images.

    Args:
        store: the dataset.
        settings: settings of the dialogue, from `engine_settings`.
        config: settings of the service.
        on_ready: called when the engine has started.
    """

    def __init__(self, store: Store, settings: DialogueConfig, config: ServeConfig, on_ready: Callable[[], None]):
        super().__init__(
            settings,
            gpus=config.engine_gpus if settings.engine == "vllm" else 0,
            idle_s=config.shrink_s,
            does="describes images",
            prepare=lambda: Knowledge(read_vocabulary(store) if settings.attributes else None),
            on_ready=on_ready,
        )

    async def converse(self, subject: Subject) -> Dialogue:
        """Hold the dialogue about an image.

        Raises:
            DialogueError: it failed for this image.
            EngineError: the engine failed.
        """
        result = await self.call("converse", subject)
        if isinstance(result, tuple):
            raise DialogueError(*result)
        return result
