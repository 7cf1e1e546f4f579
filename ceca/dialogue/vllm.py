"""Dialogue engine that runs a model in vLLM's asynchronous engine.

All turns of a conversation go to the same engine, so its prefix cache holds the image and the history. The prompt of a
turn consists of the token ids of the previous prompt, of the model's answer and of the new question. Tokenising the
text again could give other ids, which the cache would not recognise. The image is prepared once
(`ceca.dialogue.preparation`) and sent with the first turn. vLLM keeps it under its id, so it neither hashes nor encodes
it again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import gc
import itertools
import json
import multiprocessing
import os
import subprocess
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ceca.config import VLLMConfig
from ceca.dialogue.answers import one_line
from ceca.dialogue.attributes import Choices, json_schema
from ceca.dialogue.conversation import (
    AT_ONCE,
    Answer,
    DialogueError,
    EngineDied,
    EngineError,
    Subject,
    Turn,
    chat_messages,
)
from ceca.dialogue.fetch import fetch_model
from ceca.dialogue.preparation import Prepared, Preparer
from ceca.environment import cache_folder, socket_folder, usable_gpus

CONVERSATIONS_KEPT = 1536  # conversations in memory; more than are in flight at once, which are 1,024 at most
ANSWER_MARK = "\u2603answer\u2603"  # stands for the last answer in a rendered chat, to cut out the text after it
CPU_BLOCK = 32  # tokens in a block of the prefix cache on a CPU
MEMORY_S = 60.0  # longest wait for a GPU's memory, which the driver gives back seconds after a process has ended
# One process prepares some 400 images of 128 x 256 pixels per second. Without a GPU, the model takes all cores.
GPU_IMAGE_PROCESSES = 2
SHUTDOWN_S = 30.0  # time limit of a clean shutdown, which takes 6 s on two cores; vLLM's default of 5 s is too short


@dataclasses.dataclass
class _Conversation:
    """State that the next turn continues.

    Attributes:
        image: the prepared image; None before the first turn.
        turns: answers so far, as they will stand in the history.
        ids: token ids of the last prompt and answer.
    """

    image: Prepared | None = None
    turns: tuple[str, ...] = ()
    ids: list[int] = dataclasses.field(default_factory=list)


class _Prompt(NamedTuple):
    """Token ids of a prompt, and whether they continue those of the previous turn."""

    ids: list[int]
    continues: bool


class VLLMEngine:
    """vLLM in the event loop of this process. Its engine core is a child process, which `close` ends.

    Args:
        config: settings of vLLM.
        temperature: sampling temperature; 0 is greedy.
        seed: sampling seed.
    """

    def __init__(self, config: VLLMConfig, temperature: float, seed: int):
        self.config, self.temperature, self.seed = config, temperature, seed
        self.model = config.model
        self.at_once = AT_ONCE
        self.requests = itertools.count()
        self.conversations: OrderedDict[str, _Conversation] = OrderedDict()
        self.engine: Any = None
        self.preparer: Preparer | None = None
        self.guard: subprocess.Popen[bytes] | None = None
        self.children: list[Any] = []  # processes of vLLM

    async def start(self) -> None:
        if not usable_gpus(self.config.gpus):  # vLLM reads these variables when it is imported
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(self.config.kv_cache_gib)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        # Answers are greedy. FlashInfer's sampler would be compiled at the first start, for which many machines lack
        # nvcc or a library.
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        # Their defaults are below TMPDIR, whose path may be too long for sockets, and which is open to other users.
        os.environ.setdefault("VLLM_RPC_BASE_PATH", str(socket_folder("vllm")))
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder("inductor")))
        try:
            from transformers import AutoProcessor
            from vllm import SamplingParams
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.multimodal.cache import MultiModalProcessorSenderCache
            from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
            from vllm.usage.usage_lib import UsageContext
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise EngineError(
                f"vLLM cannot be imported ({error}); install requirements/gpu.txt on a machine with a GPU, "
                "requirements/cpu.txt on a machine without one"
            ) from error
        self.sampling = SamplingParams
        self.final_only = RequestOutputKind.FINAL_ONLY
        self.structured = StructuredOutputsParams
        self._first = functools.lru_cache(maxsize=1024)(self._render_first)
        self._following = functools.lru_cache(maxsize=1024)(self._render_following)  # the same for all images
        weights = await asyncio.to_thread(fetch_model, self.config.model)
        arguments = self._engine_arguments(weights)
        if unknown := sorted(arguments.keys() - {field.name for field in dataclasses.fields(AsyncEngineArgs)}):
            raise EngineError(f"vLLM's engine has no argument {', '.join(unknown)}; correct --vllm.arguments")
        try:
            self._use_processor(AutoProcessor.from_pretrained(weights, trust_remote_code=False))
            # On several machines this process has no GPU of its own, and others' may be full.
            if usable_gpus(self.config.gpus) and not self.config.several_machines:
                await wait_for_memory(self.config.memory_fraction, free_shares)
            children = set(multiprocessing.active_children())
            # The first gives vLLM's sizes for work that nobody waits for, by the GPU's memory.
            context = UsageContext.LLM_CLASS if usable_gpus(self.config.gpus) else UsageContext.ENGINE_CONTEXT
            given = AsyncEngineArgs(**arguments)
            settings = await asyncio.to_thread(given.create_engine_config, context)
            self.preparer = Preparer(settings, self.config.max_pixels, self._image_processes())
            starting = asyncio.create_task(self.preparer.start())  # beside the engine
            self.engine = await asyncio.to_thread(
                AsyncLLM.from_vllm_config,
                settings,
                usage_context=context,
                enable_log_requests=given.enable_log_requests,
                disable_log_stats=given.disable_log_stats,
            )
            await starting
        except Exception as error:
            await self.close()
            raise EngineError(self._explain(error)) from error
        if usable_gpus(self.config.gpus):
            self.at_once = self.engine.vllm_config.scheduler_config.max_num_seqs
        # Else each turn sends the image again.
        self.keeps_images = isinstance(self.engine.renderer.mm_processor_cache, MultiModalProcessorSenderCache)
        self.block: int = self.engine.vllm_config.cache_config.block_size
        self.children = [child for child in multiprocessing.active_children() if child not in children]
        self.guard = end_with_this_process([child.pid for child in self.children])
        # What vLLM has loaded stays. To look through it at each collection would cost 1 ms per image.
        gc.collect()
        gc.freeze()

    def _image_processes(self) -> int:
        if self.config.image_processes is not None:
            return self.config.image_processes
        return GPU_IMAGE_PROCESSES if usable_gpus(self.config.gpus) else 0

    def _engine_arguments(self, weights: str) -> dict[str, Any]:
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
            # With whitespace allowed, a model may write spaces inside the JSON without end.
            "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        }
        chosen = {
            "quantization": self.config.quantization,
            "kv_cache_dtype": self.config.kv_cache_dtype,
            "max_num_batched_tokens": self.config.batched_tokens,
            "max_num_seqs": self.config.sequences,
        }
        arguments |= {name: value for name, value in chosen.items() if value is not None}
        if self.config.several_machines:
            arguments["distributed_executor_backend"] = "ray"
        if usable_gpus(self.config.gpus):
            arguments["gpu_memory_utilization"] = self.config.memory_fraction
        else:
            # The prefix cache reuses whole blocks, and a turn is short compared with the CPU backend's default block
            # of 128 tokens. With the minimum, 32, 69 % of prompt tokens came from the cache instead of 38 %.
            arguments["block_size"] = CPU_BLOCK
        return arguments | json.loads(self.config.arguments)

    def _use_processor(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.special = set(self.tokenizer.all_special_ids)
        # A model without a usable chat template fails here instead of in its first conversation.
        if ANSWER_MARK not in self._render((Turn("Who?", ANSWER_MARK),), "Who?"):
            raise ValueError("its chat template leaves answers out")

    def _explain(self, error: Exception) -> str:
        """Return the message of a failed start, with advice."""
        text = f"vLLM cannot start {self.config.model!r}: {type(error).__name__}: {error}"
        memory = (
            "lower --vllm.max-model-len, --vllm.max-pixels or --vllm.memory-fraction (on a CPU --vllm.kv-cache-gib), "
            "or raise --vllm.tensor-parallel"
        )
        if "out of memory" in text.lower() or "no available memory" in text.lower():
            return f"{text}; {memory}"
        if "initialization failed" in text:  # only the child process knows the cause; it has logged it
            return f"{text} If the log above reports too little memory: {memory}"
        if isinstance(error, OSError):
            return f"{text}; name a model of the hub that this machine can reach, or a local folder of weights"
        return text

    async def close(self) -> None:
        if self.preparer is not None:
            self.preparer.close()
        if self.engine is None:
            return
        engine, self.engine = self.engine, None
        if engine.output_handler is not None:
            engine.output_handler.cancel()  # otherwise it logs the shutdown as a failure
        await asyncio.to_thread(engine.shutdown, SHUTDOWN_S)
        if self.guard is not None:
            self.guard.communicate(b"closed\n")

    async def abandon(self) -> None:
        """End an engine that may no longer respond: the guard kills its processes, then this process cleans up."""
        if self.guard is not None:
            self.guard.communicate()
            self.guard = None
        for child in self.children:  # they hold memory until they have ended
            await asyncio.to_thread(child.join, SHUTDOWN_S)
        await self.close()

    async def answer(
        self, subject: Subject, history: Sequence[Turn], question: str, max_tokens: int, choices: Choices | None = None
    ) -> Answer:
        conversation = self._conversation(subject)
        ids, continues = await self._prompt(subject, conversation, history, question)
        sampling = self.sampling(
            max_tokens=max_tokens,
            temperature=self.temperature,
            seed=self.seed,
            output_kind=self.final_only,
            structured_outputs=self.structured(json=json_schema(choices)) if choices else None,
        )
        known = len(conversation.ids) if continues else 0
        result = await self._ask(subject, conversation, question, ids, sampling)
        output = result.outputs[0]
        answer_ids = list(output.token_ids)
        # An answer with thoughts differs from what will stand in the history, so the next prompt is rendered anew.
        conversation.turns = (*(turn.answer for turn in history), one_line(output.text))
        if answer_ids and answer_ids[-1] in self.special:  # the next prompt ends this answer in its own way
            answer_ids.pop()
        conversation.ids = ids + answer_ids
        return Answer(
            text=output.text,
            prompt_tokens=len(ids),
            cached_tokens=result.num_cached_tokens or 0,
            reusable_tokens=known // self.block * self.block,
            completion_tokens=len(output.token_ids),
            cut_off=output.finish_reason == "length",
        )

    async def _ask(
        self, subject: Subject, conversation: _Conversation, question: str, ids: list[int], sampling: Any
    ) -> Any:
        """Run a request and return vLLM's output. The image goes with it, unless vLLM has it.

        Raises:
            DialogueError: vLLM refuses the prompt or ends the request.
            EngineDied: the engine core, or a process that prepares images, has died.
        """
        image = conversation.image
        assert image is not None
        assert self.preparer is not None
        sent = image.tensors is not None
        if sent or self.keeps_images:
            try:
                return await self._generate(subject.image_id, image, ids, sampling)
            except DialogueError as error:
                if sent or error.reason != "engine_error":
                    raise
        # vLLM has dropped the image, as it does with the oldest ones where its memory for them is full.
        again = await self.preparer.prepare(subject, self._first(question))
        return await self._generate(subject.image_id, dataclasses.replace(image, tensors=again.tensors), ids, sampling)

    async def _generate(self, image_id: str, image: Prepared, ids: list[int], sampling: Any) -> Any:
        """As `_ask`, with the tensors that the image still has."""
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        tensors, image.tensors = image.tensors, None
        prompt = {
            "type": "multimodal",
            "prompt_token_ids": ids,
            "mm_kwargs": {"image": [tensors]},
            "mm_hashes": {"image": [image_id]},
            "mm_placeholders": {"image": [image.place]},
        }
        result = None
        try:
            async for streamed in self.engine.generate(prompt, sampling, f"{image_id}-{next(self.requests)}"):
                result = streamed
        except VLLMClientError as error:
            reason = "conversation_too_long" if "length" in str(error) else "refused_prompt"
            raise DialogueError(reason, one_line(str(error))) from error
        except EngineGenerateError as error:  # its cause says more, for example that the processor refuses the shape
            cause = error.__cause__ or error
            raise DialogueError("refused_prompt", f"{type(cause).__name__}: {cause}") from error
        except EngineDeadError as error:
            raise EngineDied(
                f"vLLM's engine has died ({error}); see the log file named at the start. If memory "
                "ran out, lower --conversations, --vllm.max-model-len or --vllm.memory-fraction. "
                "Start the same command again: finished images are kept"
            ) from error
        assert result is not None, "vLLM ended a request without an output"
        finish_reason = result.outputs[0].finish_reason
        if finish_reason in ("abort", "error"):
            raise DialogueError("engine_error", f"vLLM ended the request with {finish_reason!r}; see its log")
        return result

    async def _prompt(
        self, subject: Subject, conversation: _Conversation, history: Sequence[Turn], question: str
    ) -> _Prompt:
        """Return the prompt of the next turn, and prepare the image where that is needed.

        Raises:
            DialogueError: the image cannot be decoded, or the model refuses it.
            EngineDied: a process that prepares images has died.
        """
        if history and conversation.turns == tuple(turn.answer for turn in history):
            following = self._following(tuple(turn.question for turn in history), question)
            return _Prompt(conversation.ids + following, continues=True)
        ids = self.tokenizer.encode(self._render(history, question)) if history else self._first(question)
        expanded = conversation.image.expand(ids) if conversation.image is not None else None
        if expanded is None:
            assert self.preparer is not None, "the engine has not started"
            conversation.image = await self.preparer.prepare(subject, ids)
            expanded = conversation.image.prompt
        return _Prompt(expanded, continues=False)

    def _render_first(self, question: str) -> list[int]:
        """Ids of a conversation that begins with a question."""
        return self.tokenizer.encode(self._render((), question))

    def _render_following(self, questions: tuple[str, ...], question: str) -> list[int]:
        """Ids of what a chat template writes after the last answer: its end, and the next question.

        Args:
            questions: those that were answered.
            question: the next one.
        """
        history = tuple(Turn(asked, ANSWER_MARK) for asked in questions)
        following = self._render(history, question).rpartition(ANSWER_MARK)[2]
        return self.tokenizer.encode(following, add_special_tokens=False)

    def _render(self, history: Sequence[Turn], question: str) -> str:
        """Render the conversation with the model's chat template."""
        messages = chat_messages(history, question, {"type": "image"})
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _conversation(self, subject: Subject) -> _Conversation:
        """Return the conversation about an image."""
        conversation = self.conversations.setdefault(subject.image_id, _Conversation())
        self.conversations.move_to_end(subject.image_id)
        if len(self.conversations) > CONVERSATIONS_KEPT:
            self.conversations.popitem(last=False)
        return conversation


def free_shares() -> list[float]:
    """Free share of the memory of each GPU that this process may use; empty if the driver does not tell."""
    from vllm.third_party import pynvml

    shares = []
    try:
        pynvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        numbers = range(pynvml.nvmlDeviceGetCount())
        for name in visible.split(",") if visible else map(str, numbers):
            by_name = pynvml.nvmlDeviceGetHandleByUUID
            gpu = pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.strip().isdigit() else by_name(name.strip())
            memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
            shares.append(memory.free / memory.total)
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return []
    return shares


async def wait_for_memory(share: float, read: Callable[[], list[float]], limit_s: float = MEMORY_S) -> None:
    """Wait until GPUs have this share of their memory free, as vLLM demands at its start.

    After the time limit this returns, and vLLM says what it lacks.

    Args:
        share: free share, 0 to 1.
        read: returns the free share of each GPU.
        limit_s: time limit in seconds.
    """
    deadline = time.monotonic() + limit_s
    while (shares := read()) and min(shares) < share and time.monotonic() < deadline:
        await asyncio.sleep(0.5)


def end_with_this_process(pids: Sequence[int]) -> subprocess.Popen[bytes]:
    """Start a guard process that kills other processes when this process ends, whatever signal ends it.

    A killed worker cannot close its engine, and vLLM's engine core does not notice the death: it would keep the GPU.
    The guard waits for the end of its standard input, which this process holds open. A line on it dismisses the guard.

    Args:
        pids: processes to kill.
    """
    # The guard has its own session, because a signal to this process's group must not end it first.
    return subprocess.Popen(
        ["/bin/sh", "-c", 'read -r _ || kill -9 "$@" 2>/dev/null', "guard", *map(str, pids)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
