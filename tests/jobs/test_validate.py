"""Validation inside a training run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ceca.config import TrainConfig
from ceca.settings import from_mapping
from jobs.training import validate as module
from jobs.training.validate import EmbeddedShare, validate

RIGHT, WRONG = [1.0, 0.0], [0.0, 1.0]


@pytest.mark.parametrize(("omega", "rank_1"), [(0.3, 100.0), (0.45, 100.0), (0.5, 0.0), (0.7, 0.0)])
def test_the_similarities_are_fused_with_the_settings_omega(monkeypatch: Any, omega: float, rank_1: float) -> None:
    """Person 1 has cosines (1, 0) and person 2 (0.1, 1): the first is nearer while ω < 0.9 / 1.9 = 0.474."""
    nearly = [0.1, (1 - 0.01) ** 0.5]
    gallery = (torch.tensor([RIGHT, nearly]), torch.tensor([WRONG, RIGHT]))
    queries = (torch.tensor([RIGHT]), torch.tensor([RIGHT]))
    monkeypatch.setattr(module, "_embed_share", lambda *_: EmbeddedShare(gallery, [1, 2], queries, [1]))
    config = from_mapping(TrainConfig, {"validation_omega": omega})
    metrics = validate(SimpleNamespace(), SimpleNamespace(config=config), torch.device("cpu"))  # type: ignore[arg-type]
    assert metrics["rank1"] == rank_1
    released = from_mapping(TrainConfig, {"validation_omega": omega, "protocol": "released"})
    metrics = validate(SimpleNamespace(), SimpleNamespace(config=released), torch.device("cpu"))  # type: ignore[arg-type]
    assert metrics["rank1"] == 0.0  # ω 0.5, whatever the setting
