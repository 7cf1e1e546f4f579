"""Rates and weight decay of the parameter groups, and the schedule of the rates."""

from __future__ import annotations

import math

import pytest

from ceca.config import ModelConfig, OptimiserConfig
from ceca.model.ceca import CECA
from ceca.training.optimiser import parameter_groups, rate_factor

SMALL = ModelConfig(backbone="ceca-tiny", image_height=32, image_width=32, mixer_heads=4, local_dim=32)


def test_rates_warm_up_linearly_then_fall_as_a_cosine():
    def factor(step: int) -> float:
        return rate_factor(step, warmup=10, total=110, start=0.1)

    assert factor(0) == pytest.approx(0.1)
    assert factor(5) == pytest.approx(0.55)
    assert factor(10) == pytest.approx(1.0)
    assert factor(60) == pytest.approx(0.5)
    assert factor(35) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert factor(110) == pytest.approx(0.0)
    assert rate_factor(0, warmup=0, total=10, start=0.1) == 1.0


def test_clip_and_new_modules_their_biases_apart_have_the_published_rates():
    model = CECA(SMALL)
    config = OptimiserConfig(learning_rate=1e-5, new_learning_rate=1e-3, weight_decay=4e-5)
    groups = parameter_groups(model, config)
    of = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(of) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    named = dict(model.named_parameters())
    assert of[id(named["backbone.clip.visual.proj"])] == (1e-5, 4e-5)
    assert of[id(named["backbone.clip.visual.ln_post.bias"])] == (2e-5, 0.0)
    assert of[id(named["visual_mixer.gate"])] == (1e-3, 4e-5)
    assert of[id(named["textual_embedding.linear.bias"])] == (1e-3, 0.0)
