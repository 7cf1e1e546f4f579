"""How fast ceca is on a device, each figure with a check that the work was done right."""

from __future__ import annotations

import functools
import importlib.util
import io
import os
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.bench import Bench, distance, require, timed
from benchmarks.samples import text_tokens
from ceca.config import AugmentationConfig, TrainConfig
from ceca.datasets.images import decode_image
from ceca.search.topk import Rows, top_k
from ceca.training.augment import augment_images, draw, generator, mask_words
from ceca.training.flops import step_flops
from ceca.training.plain import PlainEngine
from ceca.training.step import train_step

STEPS = {"cuda": 10, "cpu": 2}  # timed; two before them are not


def speed(bench: Bench) -> dict[str, Any]:
    """Steps at several batches: time, the host's time, utilisation, memory, and the straightforward program."""
    precision = "bf16" if bench.on_gpu else "fp32"
    size = 8192 if bench.on_gpu else 256
    a, b = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16).to(bench.dtype) for _ in range(2))
    peak = 2 * size**3 / timed(bench, lambda: a @ b)
    figures: dict[str, Any] = {}
    for size in bench.batches:
        config, batch = bench.config(size, precision), bench.batch(size)
        engine = PlainEngine(bench.make_model(), config, steps=1000)
        measured = _measure(bench, engine, config, batch)
        needed = step_flops(bench.model, size, text_tokens(batch))
        measured["mfu"] = needed / (measured["ms"] / 1000) / peak
        del engine
        figures |= {f"{size}: {name}": value for name, value in measured.items() if name != "loss"}
        require(bool(np.isfinite(measured["loss"])), f"the loss at batch {size} is {measured['loss']}")
        if size > bench.straightforward:
            continue
        if importlib.util.find_spec("open_clip"):
            plain = _straightforward(bench, batch)
            figures |= {f"{size}: straightforward ms": plain["ms"], f"{size}: faster by": plain["ms"] / measured["ms"]}
            gap = abs(plain["loss"] / measured["loss"] - 1)
            require(gap < (0.05 if bench.on_gpu else 1e-4), f"the straightforward program's loss differs by {gap:.1e}")
        if bench.on_gpu and importlib.util.find_spec("deepspeed"):
            figures[f"{size}: deepspeed ms"] = _with_deepspeed(bench, config, batch)["ms"]
    return figures


def _measure(bench: Bench, engine: Any, config: TrainConfig, batch: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of a step, those after which the host is done, samples/s, memory, and the first loss."""

    def step(number: int) -> Tensor:
        _, _, terms = train_step(engine, batch, config, 0, number, bench.device)
        return torch.stack(list(terms.values())).sum()

    if bench.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    first = float(step(0).detach())
    step(1)
    bench.wait()
    started, host = time.perf_counter(), 0.0
    steps = STEPS[bench.device.type]
    for number in range(steps):
        before = time.perf_counter()
        step(number + 2)
        host += time.perf_counter() - before
    bench.wait()
    seconds = (time.perf_counter() - started) / steps
    figures = {"ms": seconds * 1000, "host ms": host / steps * 1000, "samples/s": config.global_batch / seconds}
    if bench.on_gpu:
        figures["memory GB"] = torch.cuda.max_memory_allocated() / 1e9
    return {**figures, "loss": first}


def _straightforward(bench: Bench, batch: dict[str, Any]) -> dict[str, float]:
    """The same of benchmarks/straightforward.py: its first loss and the milliseconds of a step."""
    from benchmarks.straightforward import Straightforward, total_loss

    config = bench.config(len(batch["identity"]))
    model = Straightforward(bench.model).train()
    model.load(bench.make_model().state_dict())
    model.to(bench.device)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-5)
    draws = draw(len(batch["identity"]), 77, generator(config.seed, 0, 0))

    def step() -> Tensor:
        images = augment_images(torch.tensor(batch["image"]).to(bench.device), draws, config.augmentation)
        captions = mask_words(torch.tensor(batch["caption"]).long(), draws, config.augmentation.word_mask)
        summaries = torch.tensor(batch["summary"]).long()
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.on_gpu):
            features = model(images, captions.to(bench.device), summaries.to(bench.device))
        loss = total_loss(features, torch.tensor(batch["identity"]).to(bench.device), config.losses)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()

    first = float(step())
    seconds = timed(bench, step, 2)
    return {"loss": first, "ms": seconds * 1000}


def _with_deepspeed(bench: Bench, config: TrainConfig, batch: dict[str, Any]) -> dict[str, float]:
    """The same with DeepSpeed's engine."""
    from ceca.training.engine import make_deepspeed

    os.environ |= {"DS_ACCELERATOR": bench.device.type, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    engine = make_deepspeed(bench.make_model(), config, steps=1000)
    figures = _measure(bench, engine, config, batch)
    engine.destroy()
    return figures


# --- input ------------------------------------------------------------------------------------------------


def decoding(bench: Bench) -> dict[str, float]:
    """Decoding and resizing of JPEG images on one core of the CPU."""
    height, width = bench.model.image_height, bench.model.image_width
    down, right = np.meshgrid(np.linspace(0, 255, 300), np.linspace(0, 255, 120), indexing="ij")
    ramp = np.stack([down, right, 255 - right], axis=2).astype(np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(ramp).save(encoded, "JPEG", quality=90)
    pixels = decode_image(encoded.getvalue(), height, width)
    wanted = np.asarray(Image.fromarray(ramp).resize((width, height)), np.float32)
    gap = float(np.abs(pixels.astype(np.float32) - wanted).mean())
    require(pixels.shape == (height, width, 3) and gap < 3, f"a decoded image differs by {gap:.1f} of 255")
    seconds = timed(bench, lambda: [decode_image(encoded.getvalue(), height, width) for _ in range(20)], 3) / 20
    return {"images/s on a core": 1 / seconds, "difference": gap}


def augmentation(bench: Bench) -> dict[str, float]:
    """Augmentation on the device against that on the CPU."""
    size = 64 if bench.on_gpu else 8
    pixels = torch.tensor(bench.batch(size)["image"])
    draws, config = draw(size, 77, generator(0)), AugmentationConfig()
    found = augment_images(pixels.to(bench.device), draws, config).cpu()
    for sample in range(size):  # one by one, from the definition
        wanted = augment_images(pixels[sample : sample + 1], draws.rows(slice(sample, sample + 1)), config)
        gap = float((found[sample] - wanted[0]).abs().max())
        require(gap < 1e-4, f"image {sample} is augmented otherwise than alone on the CPU, by {gap:.1e}")
    require(not torch.equal(found[0], found[1]), "all images look alike")
    on_device = pixels.to(bench.device)
    seconds = timed(bench, lambda: augment_images(on_device, draws, config))
    return {"images/s": size / seconds}


# --- embeddings and search --------------------------------------------------------------------------------


def embedding(bench: Bench) -> dict[str, float]:
    """Embedding of a gallery in fp32 and in low precision, and how far their rankings agree."""
    size = 256 if bench.on_gpu else 8
    pixels, captions, summaries, _ = (value.to(bench.device) for value in bench.inputs(size))
    model = bench.make_model().eval()
    figures: dict[str, float] = {}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model.to(dtype)
        images = pixels.to(dtype)
        with torch.inference_mode():
            gallery = model.embed_gallery(images, summaries)
            seconds = timed(bench, functools.partial(model.embed_gallery, images, summaries), 3)
            found[name] = gallery[0].float(), model.embed_queries(captions)[0].float()
        figures[f"{name} images/s"] = size / seconds
        norms = gallery[0].float().norm(dim=1)
        require(bool(((norms - 1).abs() < 0.01).all()), f"{name}: an embedding's norm is {float(norms.max()):.3f}")
    cosine = F.cosine_similarity(found["fp32"][0], found["bf16"][0]).min()
    ranks = [(queries @ images.T).argsort(dim=1).argsort(dim=1).float() for images, queries in found.values()]
    figures |= {"least cosine": float(cosine), "rank correlation": float(_correlation(*ranks))}
    require(figures["least cosine"] > 0.99, f"bf16 changes an embedding: its cosine is {float(cosine):.4f}")
    return figures


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]


def search(bench: Bench) -> dict[str, float]:
    """Exact search, one query and 64, as a share of the time that a copy of the gallery takes to read."""
    figures: dict[str, float] = {}
    width = 1536
    source = torch.Generator(bench.device).manual_seed(0)
    for count in bench.rows:
        rows = torch.empty(count, width, dtype=torch.float16, device=bench.device)
        for part in rows.split(2**17):
            part.copy_(F.normalize(torch.randn(part.shape, generator=source, device=bench.device), dim=1))
        queries = F.normalize(torch.randn(64, width, generator=source, device=bench.device), dim=1)
        held = Rows([rows])
        best = top_k(held, queries, 10)
        exact = torch.cat([queries @ part.float().T for part in rows.split(2**17)], dim=1)
        wanted = exact.topk(10, dim=1)
        gap = distance(best.similarity, wanted.values)
        require(gap < 1e-5, f"the similarities of {count} rows are off by {gap:.1e}")
        same = float((best.row.to(bench.device) == wanted.indices).float().mean())
        require(same > 0.99, f"{1 - same:.1%} of the best of {count} rows are others")
        del exact, wanted
        part = rows[: max(1, min(count, 2**20))]
        target = torch.empty_like(part)
        read = timed(bench, functools.partial(target.copy_, part)) / 2 * count / len(part)
        for many in (1, 64):
            seconds = timed(bench, functools.partial(top_k, held, queries[:many], 10), 3)
            figures[f"{count} rows, {many}: ms"] = seconds * 1000
            figures[f"{count} rows, {many}: of copy bandwidth"] = read / seconds
        del rows, held, part, target
    return figures
