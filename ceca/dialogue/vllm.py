"""A model inside vLLM's asynchronous engine.

The turns of a conversation follow each other on one engine, so that its prefix cache holds the image and the
history. A turn is the token ids of the one before, those the model answered, and the new question's: text that is
tokenised again need not give the same ids, and would then be computed again. An image is named by its id, so that
it is neither hashed nor encoded again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import multiprocessing
import os
import subprocess
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from PIL import Image

from ceca.config import VLLMConfig
from ceca.datasets.images import ImageError, open_image
from ceca.dialogue.attributes import Choices, json_schema
from ceca.dialogue.conversation import Answer, DialogueError, EngineDied, EngineError, Subject, Turn, one_line
from ceca.dialogue.fetch import fetch_model
from ceca.environment import usable_gpus

CONVERSATIONS_KEPT = 512  # those in flight, whose next turns continue them
ANSWER_HERE = "\u2603answer\u2603"  # stands for the last answer where only what follows it is wanted
CPU_BLOCK = 32  # tokens of one block of the prefix cache
SHUTDOWN_S = 30.0  # a clean end takes 6 s on two cores; vLLM's own 5 s would end it by force


@dataclasses.dataclass
class _Conversation:
    """What the next turn builds on: the decoded image, and once it was answered, its prompt and answer as token ids.

    `ids` hold the image as the one placeholder that vLLM expands; `context` counts its tokens expanded.
    """

    image: Image.Image
    turns: tuple[str, ...] = ()  # the answers so far, as the history will tell them
    ids: list[int] = dataclasses.field(default_factory=list)
    context: int = 0


class VLLMEngine:
    """vLLM in this process's event loop; its engine core is a child process that close() ends."""

    def __init__(self, config: VLLMConfig, temperature: float, seed: int):
        self.config, self.temperature, self.seed = config, temperature, seed
        self.model = config.model
        self.requests = itertools.count()
        self.conversations: OrderedDict[str, _Conversation] = OrderedDict()
        self.engine: Any = None
        self.guard: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        if not usable_gpus(self.config.gpus):  # read when vLLM is imported
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(self.config.kv_cache_gib)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        try:
            from transformers import AutoProcessor
            from vllm import SamplingParams
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise EngineError(
                f"vLLM cannot be imported ({error}); install requirements/gpu.txt on a machine with a GPU, "
                "requirements/cpu.txt on one without"
            ) from error
        self.sampling = SamplingParams
        self.final_only = RequestOutputKind.FINAL_ONLY
        self.structured = StructuredOutputsParams
        weights = await asyncio.to_thread(fetch_model, self.config.model)
        arguments: dict[str, Any] = {
            "model": weights,
            "dtype": self.config.dtype,
            "max_model_len": self.config.max_model_len,
            "tensor_parallel_size": self.config.tensor_parallel,
            "enforce_eager": self.config.enforce_eager,
            "enable_prefix_caching": self.config.prefix_caching,
            "limit_mm_per_prompt": {"image": 1, "video": 0},
            "seed": self.seed,
            "disable_log_stats": True,
            # Between the brackets of an answer in JSON, a model might go on with spaces for ever.
            "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        }
        if usable_gpus(self.config.gpus):
            arguments["gpu_memory_utilization"] = self.config.memory_fraction
        else:
            # The prefix cache reuses whole blocks, and a turn is short against the CPU backend's own 128 tokens:
            # with 32, its least, 69 % of prompt tokens came from the cache instead of 38 %.
            arguments["block_size"] = CPU_BLOCK
        try:
            self.processor = AutoProcessor.from_pretrained(weights)
            self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
            self.special = set(self.tokenizer.all_special_ids)
            told = self._render((Turn("Who?", ANSWER_HERE),), "Who?")  # without a usable chat template, it fails here
            if ANSWER_HERE not in told:
                raise ValueError("its chat template leaves answers out")
            others = set(multiprocessing.active_children())
            self.engine = await asyncio.to_thread(AsyncLLM.from_engine_args, AsyncEngineArgs(**arguments))
        except Exception as error:
            raise EngineError(self._explain(error)) from error
        self.block: int = self.engine.vllm_config.cache_config.block_size
        started = [child.pid for child in multiprocessing.active_children() if child not in others]
        self.guard = end_with_this_process([pid for pid in started if pid is not None])

    def _explain(self, error: Exception) -> str:
        text = f"vLLM cannot start {self.config.model!r}: {type(error).__name__}: {error}"
        memory = (
            "lower --vllm.max-model-len, --vllm.max-pixels or --vllm.memory-fraction (on a CPU --vllm.kv-cache-gib), "
            "or raise --vllm.tensor-parallel"
        )
        if "out of memory" in text.lower() or "no available memory" in text.lower():
            return f"{text}; {memory}"
        if "initialization failed" in text:  # the cause stays in the child process, which has logged it
            return f"{text} If the log above says that memory ran out: {memory}"
        if isinstance(error, OSError):
            return f"{text}; name a model of the hub that this machine can reach, or a local folder of weights"
        return text

    async def close(self) -> None:
        if self.engine is None:
            return
        engine, self.engine = self.engine, None
        if engine.output_handler is not None:
            engine.output_handler.cancel()  # or it logs the engine's end as a failure
        await asyncio.to_thread(engine.shutdown, SHUTDOWN_S)
        if self.guard is not None:
            self.guard.communicate(b"closed\n")

    async def abandon(self) -> None:
        """End an engine that may not answer any more: its processes by the guard, then what is left here."""
        if self.guard is not None:
            self.guard.communicate()
            self.guard = None
        await self.close()

    async def answer(
        self, subject: Subject, history: Sequence[Turn], question: str, max_tokens: int, choices: Choices | None = None
    ) -> Answer:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        conversation = await self._conversation(subject)
        ids, continues = self._prompt(conversation, history, question)
        prompt = {
            "prompt_token_ids": ids,
            "multi_modal_data": {"image": conversation.image},
            "multi_modal_uuids": {"image": subject.image_id},
        }
        sampling = self.sampling(
            max_tokens=max_tokens,
            temperature=self.temperature,
            seed=self.seed,
            output_kind=self.final_only,
            structured_outputs=self.structured(json=json_schema(choices)) if choices else None,
        )
        result = None
        try:
            name = f"{subject.image_id}-{next(self.requests)}"
            async for streamed in self.engine.generate(prompt, sampling, name):
                result = streamed
        except VLLMClientError as error:
            reason = "conversation_too_long" if "length" in str(error) else "refused_prompt"
            raise DialogueError(reason, " ".join(str(error).split())) from error
        except EngineGenerateError as error:  # hides its cause, such as a shape that the model's processor refuses
            cause = error.__cause__ or error
            raise DialogueError("refused_prompt", f"{type(cause).__name__}: {cause}") from error
        except EngineDeadError as error:
            raise EngineDied(
                f"vLLM's engine has died ({error}); its log above says why. Out of memory: lower --conversations, "
                "--vllm.max-model-len or --vllm.memory-fraction. Start the same command again: finished images are kept"
            ) from error
        assert result is not None, "vLLM ended a request without an output"
        output = result.outputs[0]
        if output.finish_reason in ("abort", "error"):
            raise DialogueError("engine_error", f"vLLM ended the request by {output.finish_reason!r}; see its log")
        prompt_tokens, said = len(result.prompt_token_ids or ()), list(output.token_ids)
        reusable = conversation.context // self.block * self.block if continues else 0
        conversation.turns = (*(turn.answer for turn in history), one_line(output.text))
        conversation.context = prompt_tokens + len(said)
        if said and said[-1] in self.special:  # the next turn ends this one in its own way
            said.pop()
        conversation.ids = ids + said
        return Answer(
            text=output.text,
            prompt_tokens=prompt_tokens,
            cached_tokens=result.num_cached_tokens or 0,
            reusable_tokens=reusable,
            completion_tokens=len(output.token_ids),
            cut_off=output.finish_reason == "length",
        )

    def _prompt(self, conversation: _Conversation, history: Sequence[Turn], question: str) -> tuple[list[int], bool]:
        """Token ids of a turn, and whether they continue those of the turn before."""
        if history and conversation.turns == tuple(turn.answer for turn in history):
            last = Turn(history[-1].question, ANSWER_HERE)
            following = self._render((*history[:-1], last), question).partition(ANSWER_HERE)[2]
            return conversation.ids + self.tokenizer.encode(following, add_special_tokens=False), True
        return self.tokenizer.encode(self._render(history, question)), False

    def _render(self, history: Sequence[Turn], question: str) -> str:
        """The conversation by the model's own chat template, the image in its first turn."""
        asked = [*(turn.question for turn in history), question]
        messages: list[dict[str, Any]] = []
        for position, text in enumerate(asked):
            image = [{"type": "image"}] if position == 0 else []
            messages.append({"role": "user", "content": [*image, {"type": "text", "text": text}]})
            if position < len(history):
                said = [{"type": "text", "text": history[position].answer}]
                messages.append({"role": "assistant", "content": said})
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    async def _conversation(self, subject: Subject) -> _Conversation:
        """The conversation about a subject; its image is decoded once, beside the event loop."""
        found = self.conversations.get(subject.image_id)
        if found is None:
            found = _Conversation(await asyncio.to_thread(self._decode, subject))
            self.conversations[subject.image_id] = found
            if len(self.conversations) > CONVERSATIONS_KEPT:
                self.conversations.popitem(last=False)
        self.conversations.move_to_end(subject.image_id)
        return found

    def _decode(self, subject: Subject) -> Image.Image:
        """The image within the pixel budget."""
        try:
            return fit_pixels(open_image(subject.image), self.config.max_pixels)
        except ImageError as error:
            raise DialogueError(error.reason, error.detail) from None


def fit_pixels(image: Image.Image, max_pixels: int) -> Image.Image:
    """The image scaled down to at most `max_pixels`, its aspect kept; smaller ones as they are.

    Here and not in a model's own processor, whose options differ from model to model.
    """
    pixels = image.width * image.height
    if pixels <= max_pixels:
        return image
    scale = (max_pixels / pixels) ** 0.5
    width, height = (min(max_pixels, max(1, int(side * scale))) for side in image.size)  # also of a line of pixels
    return image.resize((width, height), Image.Resampling.BICUBIC)


def end_with_this_process(pids: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start a guard that ends the processes `pids` when this process is gone, by whatever signal.

    A killed worker cannot close its engine, and vLLM's engine core does not notice: it would keep the GPU. The
    guard's standard input ends with this process; a line written to it dismisses the guard.
    """
    # A session of its own: what interrupts or ends this process's group must not end the guard first.
    return subprocess.Popen(
        ["/bin/sh", "-c", 'read -r _ || kill -9 "$@" 2>/dev/null', "guard", *map(str, pids)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
