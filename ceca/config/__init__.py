"""Settings: one frozen dataclass per stage, validated when it is made.

A field's default is replaced by the recipe (a YAML file with one section per stage), and the recipe by the command
line, whose options are generated from these types (ceca/commandline.py); the text below a field is its help text. An
unknown key, loss or engine is an error that lists the valid ones. Names of versions are digests of these settings,
except the fields made by `execution`. The location of the data (`--data`) is not a setting: it never changes a result.
"""

from __future__ import annotations

from ceca.config.dialogue import DialogueConfig, OpenAIConfig, OracleConfig, VLLMConfig
from ceca.config.evaluate import EvaluateConfig, IndexConfig, ServeConfig
from ceca.config.ingest import DrawConfig, IngestConfig, Split
from ceca.config.train import (
    OMEGA,
    AugmentationConfig,
    Format,
    LossConfig,
    ModelConfig,
    OptimiserConfig,
    Protocol,
    Term,
    TrainConfig,
)

STAGES: dict[str, type] = {
    "draw": DrawConfig,
    "ingest": IngestConfig,
    "dialogue": DialogueConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "index": IndexConfig,
    "serve": ServeConfig,
}

__all__ = [
    "OMEGA",
    "STAGES",
    "AugmentationConfig",
    "DialogueConfig",
    "DrawConfig",
    "EvaluateConfig",
    "Format",
    "IndexConfig",
    "IngestConfig",
    "LossConfig",
    "ModelConfig",
    "OpenAIConfig",
    "OptimiserConfig",
    "OracleConfig",
    "Protocol",
    "ServeConfig",
    "Split",
    "Term",
    "TrainConfig",
    "VLLMConfig",
]
