"""The terms of the loss over a batch, and a step on a device that cannot be read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.waits import MetaEngine, Waits
from ceca.config import LossConfig, ModelConfig, TrainConfig
from ceca.losses import cosine_similarity, triplet_alignment_loss
from ceca.model.backbone import tokenize
from ceca.model.ceca import Features
from ceca.training.step import branch_losses, cawl, loss_terms, train_step

IDENTITIES = torch.tensor([0, 1, 0, 2])


def features(summary: bool = True) -> Features:
    source = torch.Generator().manual_seed(0)
    values = [torch.randn(4, 8, generator=source) for _ in range(6)]
    return Features(values[0], values[1], values[2] if summary else None, *values[3:])


def test_each_term_is_its_loss_over_the_embeddings_it_names():
    batch = features()
    terms = loss_terms(batch, IDENTITIES, LossConfig(terms=("tal_local", "tal_global")))
    assert list(terms) == ["tal_local", "tal_global"]
    for name, text, visual in (
        ("tal_global", batch.text, batch.visual),
        ("tal_local", batch.local_text, batch.local_visual),
    ):
        similarity = cosine_similarity(text, visual)
        expected = triplet_alignment_loss(similarity, IDENTITIES, temperature=0.015, margin=0.1).sum()
        assert float(terms[name]) == pytest.approx(float(expected))


ALL: tuple[Any, ...] = ("tal_global", "tal_local", "cawl", "infonce", "sdm", "identity", "words")


def test_noisy_samples_are_compared_with_and_not_learned_from():
    batch, clean = features(), torch.tensor([True, False, True, True])
    source = torch.Generator().manual_seed(1)
    batch = batch._replace(identity_loss=torch.rand(4, 1, generator=source), word_loss=torch.rand(4, 2) + 1)
    config = LossConfig(terms=ALL)
    found = loss_terms(batch, IDENTITIES, config, clean)
    assert found.keys() == set(ALL)
    by_branch = branch_losses(batch, IDENTITIES, config)
    assert by_branch.shape == (2, 4)
    expected = {
        "tal_global": by_branch[0, clean].sum(),
        "tal_local": by_branch[1, clean].sum(),
        "cawl": cawl(batch, IDENTITIES, config)[0][clean].mean(),
        "identity": 0.5 * batch.identity_loss[clean].mean(),
        "words": batch.word_loss[clean, 0].sum() / batch.word_loss[clean, 1].sum(),
    }
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(float(value)), name
    everything = loss_terms(batch, IDENTITIES, config)
    for name, value in loss_terms(batch, IDENTITIES, config, torch.ones(4, dtype=torch.bool)).items():
        assert float(value) == pytest.approx(float(everything[name])), name
    none = loss_terms(batch, IDENTITIES, config, torch.zeros(4, dtype=torch.bool))
    assert set(map(float, none.values())) == {0.0}


def test_terms_are_computed_in_fp32_whatever_the_features_are():
    halves = Features(*(value.bfloat16() for value in features()[:6] if value is not None))
    assert {value.dtype for value in loss_terms(halves, IDENTITIES, LossConfig()).values()} == {torch.float32}


def test_the_weighting_loss_without_summaries_says_what_to_set():
    with pytest.raises(ValueError, match="the loss cawl needs summary"):
        loss_terms(features(summary=False), IDENTITIES, LossConfig())


def test_a_worker_keeps_features_for_the_backward_pass_and_no_similarities():
    batch, width = 256, 8
    source = torch.Generator().manual_seed(0)
    values = [torch.randn(batch, width, generator=source, requires_grad=True) for _ in range(6)]
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        terms = loss_terms(Features(*values), torch.arange(batch) // 2, LossConfig())
        sum(terms.values()).backward()
    assert sum(kept.values()) < batch * batch * 4 / 2  # before, 45 matrices of similarities


# --- a whole step -----------------------------------------------------------------------------------------

METHODS = {
    "ceca": (ModelConfig(), LossConfig()),
    "released": (ModelConfig(mixer_order="released"), LossConfig()),
    "selected tokens": (ModelConfig(token_ratio=0.5), LossConfig(terms=("tal_global", "tal_local"))),
    "irra": (ModelConfig(local_branch=False, summary_weight=0.0), LossConfig(terms=("sdm", "identity", "words"))),
    "clip": (ModelConfig(local_branch=False, summary_weight=0.0), LossConfig(terms=("infonce",))),
    "soft labels": (ModelConfig(), LossConfig(soft_labels=0.5)),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_host_never_waits_for_the_device_in_a_step(method):
    model, losses = METHODS[method]
    small = {"backbone": "ceca-tiny", "image_height": 32, "image_width": 32, "mixer_heads": 4, "local_dim": 32}
    model = ModelConfig(**{**{name: getattr(model, name) for name in model.__dataclass_fields__}, **small})
    config = TrainConfig(model=model, losses=losses, global_batch=4, precision="fp32", zero_stage=0)
    ids = tokenize(["a man in a red coat", "a woman with a bag", "a child", "a man"]).numpy()
    batch = {
        "image": np.zeros((4, 32, 32, 3), np.uint8), "caption": ids, "summary": ids, "identity": np.array([0, 1, 2, 0]),
        "nobody": np.array([False, True, True, False]),
    }  # fmt: skip
    engine = MetaEngine(config)
    with Waits() as waits:
        train_step(engine, batch, config, epoch=0, step=0, device=torch.device("meta"))
    assert not waits.found
    assert all(p.grad is not None for n, p in engine.module.named_parameters() if "backbone" in n)


@pytest.mark.parametrize("read", ["item", "nonzero", "cpu", "masked", "tensor", "blocking"])
def test_such_a_device_shows_every_kind_of_wait(read):
    values = torch.ones(3, device="meta")
    waits = {
        "item": lambda: float(values.sum()),
        "nonzero": lambda: (values > 0).nonzero(),
        "cpu": lambda: values.cpu(),
        "masked": lambda: values[values > 0],
        "tensor": lambda: torch.tensor([1.0, 2.0], device="meta"),
        "blocking": lambda: torch.ones(3).to("meta"),
    }
    with Waits() as mode:
        try:
            waits[read]()
        except (RuntimeError, NotImplementedError):
            return
    assert mode.found
