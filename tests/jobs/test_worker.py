"""Training: what the worker says about steps that were not taken, and what is refused before it starts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ceca.config import TrainConfig
from ceca.errors import UserError
from ceca.training.engine import Progress
from jobs.train import train
from jobs.training.worker import _count_skipped


def test_skipped_steps_are_counted_and_told_once(capsys):
    engine, progress = SimpleNamespace(skipped_steps=2, optimizer=None), Progress(steps=9)
    _count_skipped(engine, progress, TrainConfig())
    assert (
        "ceca: 2 steps up to step 9 were skipped, because a gradient was not finite (2 in all)"
        in capsys.readouterr().out
    )
    _count_skipped(engine, progress, TrainConfig())
    assert capsys.readouterr().out == ""
    engine.skipped_steps, progress.steps = 3, 12
    _count_skipped(engine, progress, TrainConfig())
    assert "1 steps up to step 12 were skipped" in capsys.readouterr().out
    assert progress.skipped == 3


def test_fp16_is_refused_where_gpus_are_only_declared(tmp_path, monkeypatch):
    monkeypatch.setenv("CECA_DECLARED_GPUS", "1")
    with pytest.raises(UserError, match="precision fp16 needs GPUs, and this cluster only declares some"):
        train(str(tmp_path), TrainConfig(precision="fp16", gpus_per_worker=1))
