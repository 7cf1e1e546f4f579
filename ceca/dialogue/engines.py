"""Choice of the engine by the configuration."""

from __future__ import annotations

from typing import Any, assert_never

from ceca.config import DialogueConfig
from ceca.dialogue.attributes import Choices
from ceca.dialogue.conversation import Engine
from ceca.settings import to_mapping


def make_engine(config: DialogueConfig, vocabulary: Choices | None = None) -> Engine:
    """Make the engine named by `config.engine`.

    Args:
        config: settings of the dialogue stage.
        vocabulary: vocabulary of the drawn attributes; only the oracle needs it.
    """
    # Engines are imported only when chosen: importing vLLM takes seconds and much memory.
    if config.engine == "vllm":
        from ceca.dialogue.supervised import Supervised
        from ceca.dialogue.vllm import VLLMEngine

        return Supervised(
            lambda: VLLMEngine(config.vllm, temperature=config.temperature, seed=config.seed),
            stall_s=config.vllm.stall_s,
            restarts=config.vllm.restarts,
        )
    if config.engine == "openai":
        from ceca.dialogue.openai import OpenAIEngine

        return OpenAIEngine(config.openai, temperature=config.temperature, seed=config.seed)
    if config.engine == "oracle":
        from ceca.dialogue.oracle import OracleEngine

        return OracleEngine(config.oracle, vocabulary or {})
    assert_never(config.engine)


def generation_settings(config: DialogueConfig) -> dict[str, Any]:
    """Return the settings that determine the answers: the common ones and those of the chosen engine."""
    common = ("engine", "questions", "answer_tokens", "summary_tokens", "attributes", "temperature", "seed")
    settings = to_mapping(config, results_only=True)
    return {**{name: settings[name] for name in common}, config.engine: settings[config.engine]}
