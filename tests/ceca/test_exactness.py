"""N workers with B/N samples each compute the loss and the gradient of one worker with B."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ceca.config import LossConfig, ModelConfig
from ceca.model.backbone import tokenize, trim
from ceca.model.ceca import CECA
from ceca.training import gather_features, gather_identities, loss_terms, scaled_loss

BATCH = 8
CONFIG = ModelConfig(backbone="ceca-tiny", image_height=32, image_width=32, mixer_heads=4, local_dim=32)
COLOURS = ("red", "blue", "green", "black", "white", "pink", "grey", "brown")
CAPTIONS = [
    f"a {'man' if n % 2 else 'woman'} in a {colour} coat" + ", with a bag" * (n % 3) for n, colour in enumerate(COLOURS)
]
SUMMARIES = [f"{caption} and long {'black' if n % 3 else 'blond'} hair" for n, caption in enumerate(CAPTIONS)]
IDENTITIES = torch.tensor([0, 1, 2, 0, 3, 1, 4, 5])  # some people lie on two workers


def step(rank: int, size: int) -> dict[str, torch.Tensor]:
    """One worker's share of a step: its loss terms, its gradients, and its running statistics."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = CECA(CONFIG).double().train()
    rows = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    images = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.double)[rows]
    captions, summaries = trim(tokenize(CAPTIONS[rows] + SUMMARIES[rows])).split(BATCH // size)
    features = gather_features(model(images, captions, summaries), BATCH)
    terms = loss_terms(features, gather_identities(IDENTITIES[rows], BATCH), LossConfig(temperature=0.1, scale=5.0))
    scaled_loss(terms).backward()
    found = {f"loss {name}": value.detach() for name, value in terms.items()}
    found |= {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {f"buffer {name}": value for name, value in model.named_buffers() if "running" in name}


def work(rank: int, size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    found = step(rank, size)
    for name, value in found.items():
        if name.startswith("grad"):  # as trainers do: the mean over workers
            dist.all_reduce(value)
            value /= size
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 4])
def test_many_workers_compute_the_loss_gradient_and_statistics_of_one(size, tmp_path: Path):
    mp.spawn(work, args=(size, str(tmp_path)), nprocs=size)
    many, one = torch.load(tmp_path / "found.pt", weights_only=True), step(0, 1)
    assert many.keys() == one.keys()
    assert sum(name.startswith("grad") for name in one) > 50
    for name, expected in one.items():
        # fp32 inside the losses and the normalisation bounds the agreement.
        torch.testing.assert_close(
            many[name].float(), expected.float(), rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
