"""What ceca does on a GPU: is it right, does the host wait, how fast is it. The exit status is 1 if a check fails.

    python benchmarks/gpu.py                            # one GPU, less than ten minutes
    python benchmarks/gpu.py --device cpu               # the same checks with the tiny model, less than two minutes
    python benchmarks/gpu.py --out figures.json --only exactness search

It needs torch 2.11 or later and ceca's own packages; no Ray and no vLLM. The straightforward program is measured where
open_clip is installed, and the step with DeepSpeed where that is. Figures are reported; only wrong results fail.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent.parent))

import ceca.model.backbone as towers
from benchmarks.bench import Bench, CheckFailed, distance, make_bench, require, timed
from benchmarks.common import machine
from benchmarks.speed import augmentation, decoding, embedding, search, speed
from benchmarks.waits import MetaEngine, Operations, Waits
from ceca.model.backbone import Packing
from ceca.model.ceca import CECA
from ceca.training.engine import skipped_steps, take_step
from ceca.training.plain import PlainEngine
from ceca.training.step import loss_terms, train_step


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run, and where."""

    device: Literal["cuda", "cpu"] = "cuda"
    out: Path | None = None
    """Also write the figures as JSON."""
    only: tuple[str, ...] = ()
    """Names of the checks to run; none runs all."""


# --- results ----------------------------------------------------------------------------------------------


def peaks(bench: Bench) -> dict[str, Any]:
    """The machine, the speed of a large matrix product, and that of a copy."""
    size = 8192 if bench.on_gpu else 256
    figures: dict[str, Any] = {"machine": machine(), "torch": torch.__version__, "python": sys.version.split()[0]}
    if bench.on_gpu:
        properties = torch.cuda.get_device_properties(bench.device)
        figures |= {"gpu": properties.name, "gpu memory GB": properties.total_memory / 1e9, "cuda": torch.version.cuda}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if dtype is torch.float16 and not bench.on_gpu:
            continue
        a, b = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
        figures[f"{name} TFLOP/s"] = 2 * size**3 / timed(bench, functools.partial(torch.matmul, a, b)) / 1e12
    values = torch.empty(2**30 if bench.on_gpu else 2**24, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(values)
    figures["copy GB/s"] = 2 * values.nbytes / timed(bench, lambda: target.copy_(values)) / 1e9
    speeds = [value for name, value in figures.items() if name.endswith("/s")]
    require(all(0 < value < 1e6 for value in speeds), f"impossible speeds: {speeds}")
    return figures


def exactness(bench: Bench) -> dict[str, float]:
    """Features, losses and gradients in fp32 on the device against fp64 on the CPU."""
    pixels, captions, summaries, identities = bench.inputs(8)
    model = bench.make_model()
    exact = CECA(bench.model).train()
    exact.load_state_dict(model.state_dict())
    exact.double()
    found: list[tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]] = []
    for program, device in ((model, bench.device), (exact, torch.device("cpu"))):
        dtype = next(program.parameters()).dtype
        features = program(pixels.to(device, dtype), captions.to(device), summaries.to(device))
        terms = loss_terms(features, identities.to(device), bench.config(8).losses)
        sum(terms.values(), torch.zeros((), device=device)).backward()
        gradients = {name: p.grad for name, p in program.named_parameters() if p.grad is not None}
        found.append(({k: v for k, v in features._asdict().items() if v is not None}, terms, gradients))
    figures = {}
    for kind, ours, wanted, most in zip(("features", "losses"), *found, (1e-4, 1e-3), strict=False):
        figures[kind] = max(distance(ours[name], wanted[name]) for name in wanted)
        require(figures[kind] < most, f"{kind} differ by {figures[kind]:.1e} from fp64, more than {most}")
    ours, wanted = (torch.cat([of[2][name].flatten().cpu() for name in found[1][2]]) for of in found)
    figures["gradients"] = distance(ours, wanted)
    require(figures["gradients"] < 1e-3, f"gradients differ by {figures['gradients']:.1e} from fp64, more than 1e-3")
    return figures


def padding(bench: Bench) -> dict[str, float]:
    """Features of padded texts on the device against those of texts without padding on the CPU."""
    _, captions, _, _ = bench.inputs(8)
    model = bench.make_model().eval()
    with torch.no_grad():
        packed = model.cpu().embed_queries(captions)
        with without_packing():
            padded = model.to(bench.device).embed_queries(captions.to(bench.device))
    gap = max(distance(ours, wanted) for ours, wanted in zip(padded, packed, strict=True))
    require(gap < 1e-4, f"padded and packed texts differ by {gap:.1e}, more than 1e-4")
    return {"features": gap}


@contextmanager
def without_packing() -> Iterator[None]:
    """Let texts pass their tower with their padding, on a CPU too."""
    before = Packing.of
    Packing.of = classmethod(lambda cls, there: cls(None, *there.shape))
    try:
        yield
    finally:
        Packing.of = before


def attention(bench: Bench) -> dict[str, float]:
    """Every backend of fused attention that this device has against the formula, with its gradients."""
    figures = {}
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 8, 193, 64, generator=source, dtype=torch.float64) for _ in range(3))
    causal = torch.ones(193, 193, dtype=torch.bool).tril()
    dtypes = {torch.float32: 1e-4, torch.bfloat16: 2e-2, **({torch.float16: 4e-3} if bench.on_gpu else {})}
    for is_causal in (False, True):
        logits = (q @ k.mT / 8).masked_fill(~causal, -torch.inf) if is_causal else q @ k.mT / 8
        wanted = logits.softmax(dim=-1) @ v
        for backend in (getattr(SDPBackend, name) for name in ("MATH", *fused_backends())):
            for dtype, most in dtypes.items():
                inputs = [value.to(bench.device, dtype) for value in (q, k, v)]
                try:
                    with sdpa_kernel(backend):
                        found = F.scaled_dot_product_attention(*inputs, is_causal=is_causal)
                except RuntimeError:
                    continue  # this backend does not take this precision here
                name = f"{backend.name} {str(dtype)[6:]}{' causal' if is_causal else ''}"
                figures[name] = distance(found, wanted)
                require(figures[name] < most, f"attention by {name} is off by {figures[name]:.1e}, more than {most}")
    require(len(figures) >= 4, f"hardly a backend works: {sorted(figures)}")
    return figures


def fused_backends() -> list[str]:
    """Names of the fused backends that this torch has."""
    return [name for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION") if hasattr(SDPBackend, name)]


def compiled(bench: Bench) -> dict[str, float]:
    """Image features with compiled blocks against those without. A CPU captures the graph and compiles nothing."""
    pixels = bench.inputs(4)[0].to(bench.device)
    model = bench.make_model().eval()
    eager = towers._block
    with torch.no_grad():
        wanted = model.backbone.encode_images(pixels).summit
        towers._block = torch.compile(eager, backend="inductor" if bench.on_gpu else "aot_eager", fullgraph=True)
        try:
            found = model.backbone.encode_images(pixels).summit
        finally:
            towers._block = eager
    gap = distance(found, wanted)
    require(gap < 1e-4, f"compiled blocks differ by {gap:.1e}, more than 1e-4")
    return {"features": gap}


def precision(bench: Bench) -> dict[str, float]:
    """Steps in low precision learn; one with a gradient that is no number is counted and changes nothing."""
    figures = {}
    batch, steps = bench.batch(8), 12 if bench.on_gpu else 5
    for name in ("fp32", "bf16", *(("fp16",) if bench.on_gpu else ())):
        config = bench.config(8, name, rate=1e-4)
        engine = PlainEngine(bench.make_model(), config, steps=1000)
        before = [parameter.detach().clone() for parameter in engine.module.parameters()]
        engine.backward(sum(p.float().sum() for p in engine.module.parameters()) * torch.nan)
        take_step(engine)
        same = all(torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True))
        require(same, f"{name}: a gradient that is no number changed the parameters")
        require(skipped_steps(engine) == 1, f"{name}: a skipped step was not counted")
        losses = []
        for _ in range(steps):
            _, _, terms = train_step(engine, batch, config, epoch=0, step=0, device=bench.device)
            losses.append(torch.stack(list(terms.values())).sum().detach())
        first, last, skipped = float(losses[0]), float(losses[-1]), skipped_steps(engine) - 1
        figures |= {f"{name} first": first, f"{name} last": last, f"{name} skipped": skipped}
        require(last < 0.9 * first, f"{name} does not learn: the loss went from {first:.3f} to {last:.3f}")
        require(skipped <= steps // 2, f"{name}: {skipped} of {steps} steps were skipped")
    gap = abs(figures["bf16 first"] / figures["fp32 first"] - 1)
    require(gap < 0.05, f"the first loss in bf16 differs from fp32 by {gap:.1%}")
    return figures


def resume(bench: Bench) -> dict[str, float]:
    """Three steps against two steps, a checkpoint, and one more in another engine."""
    batch = bench.batch(4)
    config = bench.config(4, "bf16", rate=1e-4)

    def steps(engine: PlainEngine, numbers: range) -> Tensor:
        for step in numbers:
            _, _, terms = train_step(engine, batch, config, epoch=0, step=step, device=bench.device)
        return torch.stack(list(terms.values())).sum()

    whole = PlainEngine(bench.make_model(), config, steps=1000)
    steps(whole, range(2))
    other = PlainEngine(bench.make_model(), config, steps=1000)
    with tempfile.TemporaryDirectory() as folder:
        whole.save_checkpoint(Path(folder))
        other.load_checkpoint(Path(folder))
    wanted = steps(whole, range(2, 3))
    gap = distance(steps(other, range(2, 3)), wanted)
    expected = whole.weights()
    moved = max(distance(weight, expected[name]) for name, weight in other.weights().items())
    require(max(gap, moved) < 1e-5, f"a resumed run differs: loss by {gap:.1e}, parameters by {moved:.1e}")
    return {"loss": gap, "parameters": moved}


# --- the host ---------------------------------------------------------------------------------------------


def waits(bench: Bench) -> dict[str, Any]:
    """A steady step during which the host may not wait for the device; on a CPU, on a device that cannot be read."""
    config = bench.config(4)
    batch = bench.batch(4)
    if not bench.on_gpu:
        engine = MetaEngine(config)
        with Waits() as found:
            try:
                train_step(engine, batch, config, 0, 0, torch.device("meta"))
            except (RuntimeError, NotImplementedError) as error:
                raise CheckFailed(f"the host reads the device: {error}") from None
        require(not found.found, f"the host waits for copies: {found.found}")
        return {"waits": 0}
    config = bench.config(64, "bf16")
    engine, batch = PlainEngine(bench.make_model(), config, steps=1000), bench.batch(64)
    for step in range(3):
        train_step(engine, batch, config, 0, step, bench.device)
    bench.wait()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(engine, batch, config, 0, 3, bench.device)
    except RuntimeError as error:
        raise CheckFailed(f"the host waits for the GPU: {error}") from None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"waits": 0}


def launches(bench: Bench) -> dict[str, Any]:
    """Operations that a step dispatches, and on a GPU the kernels that it launches."""
    config = bench.config(bench.batches[0], "bf16")
    engine, batch = PlainEngine(bench.make_model(), config, steps=1000), bench.batch(bench.batches[0])
    train_step(engine, batch, config, 0, 0, bench.device)
    with Operations() as operations:
        train_step(engine, batch, config, 0, 1, bench.device)
    figures: dict[str, Any] = {"operations": operations.total}
    if bench.on_gpu:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            train_step(engine, batch, config, 0, 2, bench.device)
            bench.wait()
        figures["launches"] = sum(event.count for event in profile.key_averages() if "LaunchKernel" in event.key)
    require(
        operations.total <= bench.operations, f"a step dispatches {operations.total} operations; {bench.operations}"
    )
    return figures


CHECKS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "peaks": peaks,
    "exactness": exactness,
    "padding": padding,
    "attention": attention,
    "compiled": compiled,
    "precision": precision,
    "resume": resume,
    "waits": waits,
    "launches": launches,
    "speed": speed,
    "decoding": decoding,
    "augmentation": augmentation,
    "embedding": embedding,
    "search": search,
}


def main(settings: Settings) -> int:
    """Run the checks, print and write their figures; 1 if one fails."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        print("error: torch finds no GPU here; try --device cpu", file=sys.stderr)
        return 2
    unknown = set(settings.only) - CHECKS.keys()
    if unknown:
        print(f"error: no check {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    bench = make_bench(settings.device)
    report: dict[str, Any] = {}
    for name, check in CHECKS.items():
        if settings.only and name not in settings.only:
            continue
        started = time.perf_counter()
        try:
            report[name] = {"ok": True, "figures": check(bench)}
        except Exception as error:  # whatever goes wrong in one check, the others are still of use
            told = str(error) if isinstance(error, CheckFailed) else f"{type(error).__name__}: {error}"
            report[name] = {"ok": False, "error": told}
        report[name]["seconds"] = round(time.perf_counter() - started, 1)
        told = report[name].get("error") or ", ".join(f"{k} {shown(v)}" for k, v in report[name]["figures"].items())
        print(
            f"{'ok    ' if report[name]['ok'] else 'FAILED'} {name:13}{report[name]['seconds']:6.1f} s  {told}",
            flush=True,
        )
    if settings.out is not None:
        settings.out.write_text(json.dumps(report, indent=1))
    return int(not all(result["ok"] for result in report.values()))


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
