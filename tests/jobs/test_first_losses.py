"""Steps of training worked out by plain loops: the first losses of the released recipe, and a divided epoch."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ceca.config import AugmentationConfig, LossConfig, ModelConfig, OptimiserConfig, TrainConfig
from ceca.model.backbone import tokenize
from ceca.model.ceca import CECA
from ceca.model.embed import normalize
from ceca.training.division import divide
from ceca.training.engine import make_engine
from ceca.training.order import Batches
from ceca.training.step import train_step

BATCH, STEPS, EPOCHS, WARMUP = 8, 2, 6, 2  # steps of an epoch; five losses are of three epochs
CLIP_RATE, NEW_RATE = 1e-4, 1e-3
COLOURS = ("red", "blue", "green", "black", "white", "pink", "grey", "brown")


def batch(step: int) -> dict[str, np.ndarray]:
    """Images [B, 32, 32, 3] of noise, texts about them, and two people who are there twice."""
    source = np.random.default_rng(step)
    coats = [f"a {'man' if source.random() < 0.5 else 'woman'} in a {colour} coat" for colour in COLOURS]
    hair = [f"{coat} with {'long' if source.random() < 0.5 else 'short'} hair" for coat in coats]
    images = source.integers(0, 256, (BATCH, 32, 32, 3)).astype(np.uint8)
    texts = {"caption": tokenize(coats).numpy(), "summary": tokenize(hair).numpy()}
    return {"image": images, **texts, "identity": np.array([0, 1, 2, 0, 3, 1, 4, 5])}


def tal(text: Tensor, image: Tensor, same: Tensor) -> Tensor:
    """Losses of the samples, [B]."""
    s, loss = F.normalize(text) @ F.normalize(image).T, torch.zeros(len(text))
    for rows in (s, s.T):
        alpha = (rows.detach() / 0.015).masked_fill(~same, -math.inf).softmax(dim=1)
        negative = 0.015 * (rows / 0.015).masked_fill(same, -math.inf).logsumexp(dim=1)
        loss = loss + (0.1 - (alpha * rows).sum(dim=1) + negative).clamp(min=0)
    return loss


def cawl(image: Tensor, text: Tensor, summary: Tensor, same: Tensor) -> Tensor:
    def probability(one: Tensor, other: Tensor) -> Tensor:
        return ((50 * F.normalize(one) @ F.normalize(other).T).softmax(dim=1) * same).sum(dim=1).clamp(min=1e-8)

    st, si, it, ti = (probability(*pair) for pair in ((summary, text), (summary, image), (image, text), (text, image)))
    weight = (st * si).detach()
    weight = (weight / weight.mean()).clamp(0.2, 5)
    return (weight * -(st.log() + si.log()) - (1 - weight) * 0.5 * (it.log() + ti.log())).mean()


def plain_losses(model: CECA, count: int) -> list[float]:
    groups = []
    for name, parameter in model.named_parameters():
        rate = NEW_RATE if not name.startswith("backbone.") else CLIP_RATE * (2 if name.endswith("bias") else 1)
        decay = 0.0 if name.endswith("bias") else 4e-5
        groups.append({"params": [parameter], "lr": rate, "weight_decay": decay, "rate": rate})
    adam, losses = torch.optim.Adam(groups, betas=(0.9, 0.999), eps=1e-3), []
    for step in range(count):
        epoch = step // STEPS
        cosine = 0.5 * (1 + math.cos(math.pi * (epoch - WARMUP) / (EPOCHS - WARMUP)))
        factor = 0.1 + 0.9 * epoch / WARMUP if epoch < WARMUP else cosine
        for group in adam.param_groups:
            group["lr"] = group["rate"] * factor
        b = {name: torch.from_numpy(values) for name, values in batch(step).items()}
        f, same = model(normalize(b["image"]), b["caption"], b["summary"]), b["identity"][:, None] == b["identity"]
        loss = (tal(f.text, f.visual, same) + tal(f.local_text, f.local_visual, same)).sum()
        loss = loss + cawl(f.image, f.text, f.summary, same)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return losses


PLAIN = AugmentationConfig(flip=0, pad=0, erase=0, word_mask=0)


def test_the_first_five_losses_are_those_of_a_plain_loop(one_worker: None) -> None:
    config = TrainConfig(
        model=ModelConfig(
            backbone="ceca-tiny", image_height=32, image_width=32, mixer_heads=4, local_dim=32, mixer_order="released"
        ),
        optimiser=OptimiserConfig(
            learning_rate=CLIP_RATE, new_learning_rate=NEW_RATE, epsilon=1e-3, schedule="epoch", warmup_epochs=WARMUP
        ),
        augmentation=PLAIN,
        global_batch=BATCH,
        epochs=EPOCHS,
        precision="fp32",
    )
    torch.manual_seed(0)
    model = CECA(config.model).train()
    expected = plain_losses(copy.deepcopy(model), 5)
    engine = make_engine(model, config, STEPS)
    found = []
    for step in range(5):
        _, _, terms = train_step(engine, batch(step), config, step // STEPS, step % STEPS, torch.device("cpu"))
        found.append(sum(value.item() for value in terms.values()))
    assert found == pytest.approx(expected, rel=1e-4)
    assert len({round(loss, 2) for loss in found}) == 5


def test_a_divided_epoch_learns_from_the_pairs_that_its_model_calls_clean(one_worker: None) -> None:
    """Two batches of eight and a last one of four; the division compares all pairs before the first step."""
    from jobs.training.worker import _divide, _of_step

    config = TrainConfig(
        model=ModelConfig(
            backbone="ceca-tiny", image_height=32, image_width=32, summary_weight=0, mixer="none", local_dim=32
        ),
        losses=LossConfig(terms=("tal_global", "tal_local")),
        augmentation=PLAIN,
        global_batch=BATCH,
        precision="fp32",
        division="consensus",
        last_batch="keep",
    )
    batches = Batches.of(20, config)
    parts = [{name: values[: batches.size(step)] for name, values in batch(step).items()} for step in range(3)]
    torch.manual_seed(0)
    model = CECA(config.model).train()
    plain = copy.deepcopy(model).eval()
    found = []
    with torch.no_grad():
        for part in parts:
            b = {name: torch.from_numpy(values) for name, values in part.items()}
            f, same = plain(normalize(b["image"]), b["caption"], None), b["identity"][:, None] == b["identity"]
            found.append(torch.stack([tal(f.text, f.visual, same), tal(f.local_text, f.local_visual, same)]))
    expected = divide(torch.cat(found, dim=1).numpy(), config.seed, 0)
    engine = make_engine(model, config, len(batches))
    cpu = torch.device("cpu")
    clean = _divide(engine, iter(parts), batches, config, 0, cpu)
    assert np.array_equal(clean, expected)
    assert 0 < clean.sum() < 20
    chosen = _of_step(clean, batches, 2, cpu)
    assert chosen is not None
    assert chosen.tolist() == expected[16:].tolist()
    _, _, terms = train_step(engine, parts[2], config, 0, 2, cpu, 4, chosen)
    f = copy.deepcopy(plain).train()(normalize(b["image"]), b["caption"], None)
    assert terms["tal_global"].item() == pytest.approx(tal(f.text, f.visual, same)[chosen].sum().item(), rel=1e-5)
    assert terms["tal_local"].item() == pytest.approx(
        tal(f.local_text, f.local_visual, same)[chosen].sum().item(), rel=1e-5
    )
