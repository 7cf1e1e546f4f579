"""Preparation of images for vLLM: decoded, scaled down and turned into the tensors that a model takes.

vLLM does this in its engine's own process, one image at a time, and looks at the whole prompt again in every turn. Here
processes beside the engine can do it, once for each image. Later turns put the image's tokens into their prompt by
themselves.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import dataclasses
import multiprocessing
import os
import threading
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from PIL import Image

from ceca.datasets.images import ImageError, open_image
from ceca.dialogue.conversation import DialogueError, EngineDied, Subject

_here = threading.local()  # the renderer of a thread


@dataclasses.dataclass
class Prepared:
    """An image as a model takes it.

    Attributes:
        tensors: what the model's vision tower takes, in vLLM's form; None after they were sent.
        place: vLLM's range of the image in a prompt, as `offset` and `length` in tokens.
        prompt: ids of the prompt that it was prepared with, with the image expanded.
        mark: ids that stand for the image where it is not expanded, at the same offset; None if the model's processor
            also changes the rest of a prompt.
    """

    tensors: Any
    place: Any
    prompt: list[int]
    mark: list[int] | None

    def expand(self, ids: list[int]) -> list[int] | None:
        """The ids of another prompt with the image expanded; None if it must be prepared with it."""
        offset = self.place.offset
        if self.mark is None or ids[offset : offset + len(self.mark)] != self.mark:
            return None
        return [*ids[:offset], *self.prompt[offset : offset + self.place.length], *ids[offset + len(self.mark) :]]


@dataclasses.dataclass
class _Refused:
    """Why an image cannot be prepared: reason and detail of a DialogueError."""

    reason: str
    detail: str


class Preparer:
    """Prepares images in processes, or in a thread.

    Args:
        config: vLLM's settings of the engine.
        max_pixels: larger images are scaled down to this number of pixels.
        processes: number of processes; 0 is one thread of this process.
    """

    def __init__(self, config: Any, max_pixels: int, processes: int):
        self.max_pixels = max_pixels
        own = copy.deepcopy(config)
        own.model_config.multimodal_config.mm_processor_cache_gb = 0  # the engine keeps the tensors
        self.pool: concurrent.futures.Executor
        if processes:
            spawn = multiprocessing.get_context("spawn")
            self.pool = concurrent.futures.ProcessPoolExecutor(processes, spawn, _start_process, (own,))
        else:
            self.pool = concurrent.futures.ThreadPoolExecutor(1, "image", _start, (own,))

    async def start(self) -> None:
        """Start the processes."""
        await self._run(_nothing)

    async def prepare(self, subject: Subject, ids: list[int]) -> Prepared:
        """Prepare an image.

        Args:
            subject: the image.
            ids: a prompt, in which the image is not expanded.

        Raises:
            DialogueError: the image cannot be decoded, or the model refuses it.
            EngineDied: a process has died.
        """
        found: Prepared | _Refused = await self._run(_prepare, subject, ids, self.max_pixels)
        if isinstance(found, _Refused):
            raise DialogueError(found.reason, found.detail)
        return found

    async def _run(self, work: Any, *arguments: Any) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, work, *arguments)
        except BrokenProcessPool as error:
            raise EngineDied(
                "a process that prepares images has died; if memory ran out, lower --vllm.image-processes or "
                "--vllm.max-pixels. Start the same command again: finished images are kept"
            ) from error

    def close(self) -> None:
        """End the processes."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def fit_pixels(image: Image.Image, max_pixels: int) -> Image.Image:
    """Scale an image down to at most `max_pixels`, keeping its aspect ratio. Smaller images are returned unchanged.

    The processors of models could do this too, but their options differ from model to model.
    """
    pixels = image.width * image.height
    if pixels <= max_pixels:
        return image
    scale = (max_pixels / pixels) ** 0.5
    # The bounds matter for an image that is only a few pixels wide or high.
    width, height = (min(max_pixels, max(1, int(side * scale))) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _start(config: Any) -> None:
    """Make this thread's renderer, which knows the model's processor and chat tokens."""
    from vllm.renderers.registry import renderer_from_config

    _here.renderer = renderer_from_config(config)


def _start_process(config: Any) -> None:
    """As `_start`, in a process of its own."""
    end_with_parent()
    _start(config)
    # Torch would pass each tensor through a file, and its other way takes 0.6 ms more for an image.
    ForkingPickler.register(torch.Tensor, _reduce)


def end_with_parent() -> None:
    """End this process when the one that started it has ended, whatever signal ended that one.

    A process of a pool waits for work on a pipe that it holds open itself, so it would wait for ever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process was not started by multiprocessing"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _reduce(tensor: torch.Tensor) -> tuple[Any, ...]:
    """How a tensor is pickled: as an array of bytes."""
    return _rebuild, (tensor.reshape(-1).view(torch.uint8).numpy(), tensor.dtype, tensor.shape)


def _rebuild(content: np.ndarray, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    return torch.from_numpy(content).view(dtype).reshape(shape)


def _nothing() -> None: ...


def _prepare(subject: Subject, ids: list[int], max_pixels: int) -> Prepared | _Refused:
    try:
        image = fit_pixels(open_image(subject.image), max_pixels)
    except ImageError as error:
        return _Refused(error.reason, error.detail)
    prompt = {
        "prompt_token_ids": ids,
        "multi_modal_data": {"image": image},
        "multi_modal_uuids": {"image": subject.image_id},
    }
    try:
        (given,) = _here.renderer.render_cmpl([prompt])
    except Exception as error:  # its cause says more, for example that the processor refuses the shape
        cause = error.__cause__ or error
        return _Refused("refused_prompt", f"{type(cause).__name__}: {cause}")
    ((tensors,), (place,)) = given["mm_kwargs"]["image"], given["mm_placeholders"]["image"]
    whole = given["prompt_token_ids"]
    length = place.length + len(ids) - len(whole)  # of the mark
    prepared = Prepared(tensors, place, whole, ids[place.offset : place.offset + length])
    return prepared if prepared.expand(ids) == whole else dataclasses.replace(prepared, mark=None)
