"""CPU time that the process of a dialogue worker takes per image, beside the model: prompts, images, answers.

    python benchmarks/front.py

A worker's process prepares what vLLM's engine core computes, in another process. With a fast GPU it sets the limit: at
10 ms per image, a worker does a hundred images per second at most. Each arm holds the same six turns about the same
images with a tiny model:

    AsyncLLM        vLLM's engine as its guide uses it: each turn hands over the whole text and the image with its id
    thread          ceca with `--vllm.image-processes 0`, the default without a GPU
    process         ceca with `--vllm.image-processes 1`
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import ArmFailed, in_own_process, machine, run_benchmark

WARMING = 8  # images that are not counted


@dataclasses.dataclass(frozen=True)
class Settings:
    """Size of the work."""

    images: int = 400
    answer_tokens: int = 8
    """Tokens of each answer and of the summary."""
    conversations: int = 64
    width: int = 128
    """Pixels of an image in width; the height is twice that."""


def main(settings: Settings) -> None:
    from ceca.dialogue.tiny import make_tiny_vlm

    print(
        f"{settings.images} images of {settings.width}×{2 * settings.width}, {settings.answer_tokens} tokens per turn"
    )
    print(f"{machine()}\n\n{'':10} {'CPU ms per image':>17} {'ratio':>6} {'images/s':>9}")
    with tempfile.TemporaryDirectory(prefix="ceca-benchmark-") as folder:
        place = Path(folder)
        make_tiny_vlm(place / "model")
        environment = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
        figures: dict[str, dict[str, Any]] = {}
        for arm in ARMS:
            print(f"{arm:10} ", end="", flush=True)  # it takes half a minute
            try:
                of_arm = in_own_process(__file__, arm, settings, place, environment=environment)
            except ArmFailed as error:
                sys.exit(f"{arm} failed:\n{error}")
            figures[arm] = of_arm
            ratio = of_arm["cpu_ms"] / figures["AsyncLLM"]["cpu_ms"]
            print(f"{of_arm['cpu_ms']:17.2f} {ratio:6.2f} {of_arm['rate']:9.1f}", flush=True)
        if figures["thread"]["said"] != figures["process"]["said"]:
            sys.exit("the answers of thread and process differ")


def draw(number: int, width: int) -> bytes:
    """A JPEG of noise."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(number).integers(0, 255, (2 * width, width, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, "JPEG")
    return content.getvalue()


async def measure(engine: Any, settings: Settings) -> dict[str, Any]:
    """Hold all conversations.

    Args:
        engine: has the methods of `ceca.dialogue.conversation.Engine`.
        settings: size of the work.
    """
    from ceca.dialogue.conversation import Subject, converse

    await engine.start()
    subjects = [Subject(f"{number:016x}", draw(number, settings.width)) for number in range(settings.images + WARMING)]
    gate = asyncio.Semaphore(settings.conversations)
    lengths = {"answer_tokens": settings.answer_tokens, "summary_tokens": settings.answer_tokens}

    async def talk(subject: Subject) -> Any:
        async with gate:
            return await converse(engine, subject, questions=5, **lengths)

    await asyncio.gather(*map(talk, subjects[settings.images :]))
    began, cpu = time.perf_counter(), time.process_time()
    held = await asyncio.gather(*map(talk, subjects[: settings.images]))
    cpu, seconds = time.process_time() - cpu, time.perf_counter() - began
    await engine.close()
    return {
        "cpu_ms": 1e3 * cpu / settings.images,
        "rate": settings.images / seconds,
        "said": [[turn.answer for turn in dialogue.turns] + [dialogue.summary] for dialogue in held],
    }


class Plain:
    """vLLM's asynchronous engine without anything of ceca, behind the methods of our engines.

    Args:
        model: folder of the model.
    """

    def __init__(self, model: Path):
        self.model = str(model)
        self.asked = 0

    async def start(self) -> None:
        from transformers import AutoProcessor
        from vllm import SamplingParams
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(
            self.model, max_model_len=4096, limit_mm_per_prompt={"image": 1, "video": 0}, seed=0, block_size=32
        )
        self.processor, self.sampling = AutoProcessor.from_pretrained(self.model), SamplingParams
        self.engine = await asyncio.to_thread(AsyncLLM.from_engine_args, arguments)

    async def answer(
        self, subject: Any, history: Sequence[Any], question: str, max_tokens: int, choices: None = None
    ) -> Any:
        from PIL import Image

        from ceca.dialogue.conversation import Answer, chat_messages

        text = self.processor.apply_chat_template(
            chat_messages(history, question, {"type": "image"}), tokenize=False, add_generation_prompt=True
        )
        prompt = {
            "prompt": text,
            "multi_modal_data": {"image": Image.open(io.BytesIO(subject.image)).convert("RGB")},
            "multi_modal_uuids": {"image": subject.image_id},
        }
        sampling = self.sampling(max_tokens=max_tokens, temperature=0.0, seed=0)
        self.asked += 1
        async for streamed in self.engine.generate(prompt, sampling, str(self.asked)):
            result = streamed
        said = result.outputs[0]
        return Answer(said.text, len(result.prompt_token_ids), result.num_cached_tokens, len(said.token_ids))

    async def close(self) -> None:
        self.engine.shutdown()


def measure_plain(settings: Settings, place: Path) -> dict[str, Any]:
    return asyncio.run(measure(Plain(place / "model"), settings))


def measure_ceca(settings: Settings, place: Path, processes: int) -> dict[str, Any]:
    from ceca.config import VLLMConfig
    from ceca.dialogue.vllm import VLLMEngine

    config = VLLMConfig(model=str(place / "model"), gpus=0, image_processes=processes)
    return asyncio.run(measure(VLLMEngine(config, temperature=0.0, seed=0), settings))


ARMS = {
    "AsyncLLM": measure_plain,
    "thread": lambda settings, place: measure_ceca(settings, place, 0),
    "process": lambda settings, place: measure_ceca(settings, place, 1),
}

if __name__ == "__main__":
    run_benchmark(main, Settings, ARMS, __doc__)
