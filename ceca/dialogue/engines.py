"""The engine that a configuration asks for."""

from __future__ import annotations

from typing import Any

from ceca.config import DialogueConfig
from ceca.dialogue.attributes import Choices
from ceca.dialogue.conversation import Engine
from ceca.settings import to_mapping


def make_engine(config: DialogueConfig, vocabulary: Choices | None = None) -> Engine:
    """The engine named by `config.engine`; the oracle needs the `vocabulary` of the drawn attributes."""
    # Imported where they are chosen: vLLM takes seconds and memory that other engines do without.
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
    from ceca.dialogue.oracle import OracleEngine

    return OracleEngine(config.oracle, vocabulary or {})


def generation_settings(config: DialogueConfig) -> dict[str, Any]:
    """What decided the answers, for the record: common settings and those of the chosen engine."""
    common = ("engine", "questions", "answer_tokens", "summary_tokens", "attributes", "temperature", "seed")
    settings = to_mapping(config, results_only=True)
    return {**{name: settings[name] for name in common}, config.engine: settings[config.engine]}
