"""The counted operations of a step against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ceca.config import ModelConfig
from ceca.model.backbone import tokenize
from ceca.model.ceca import CECA
from ceca.training.flops import step_flops


def test_the_operations_of_a_step_are_those_that_torch_counts():
    config = ModelConfig(backbone="ceca-tiny", image_height=64, image_width=32, mixer_heads=4, local_dim=32)
    model = CECA(config).train()
    captions, summaries = (
        tokenize(["a man in a red coat", "a woman"]),
        tokenize(["a tall man in a coat", "a woman, alone"]),
    )
    tokens = int(sum((ids.argmax(dim=1) + 1).sum() for ids in (captions, summaries)))
    with FlopCounterMode(display=False) as counter:
        features = model(torch.randn(2, 3, 64, 32), captions, summaries)
        sum(value.sum() for value in features if value is not None).backward()
    assert step_flops(config, 2, tokens) == pytest.approx(counter.get_total_flops(), rel=0.1)
