"""Settings of `dialogue`: its engines and what it asks."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import Field

from ceca.config.ingest import Split
from ceca.settings import NonNegative, Positive, PositiveFloat, Share, added, config, execution

# Arguments of vLLM's engine and the settings that they follow from.
OWN_SETTING = {
    "model": "model",
    "max_model_len": "max_model_len",
    "dtype": "dtype",
    "quantization": "quantization",
    "kv_cache_dtype": "kv_cache_dtype",
    "max_num_batched_tokens": "batched_tokens",
    "max_num_seqs": "sequences",
    "tensor_parallel_size": "tensor_parallel",
    "distributed_executor_backend": "several_machines",
    "gpu_memory_utilization": "memory_fraction",
    "enforce_eager": "enforce_eager",
    "enable_prefix_caching": "prefix_caching",
    "seed": "the stage's seed",
}


@config
class VLLMConfig:
    """A model that vLLM runs inside the dialogue workers."""

    model: str = "Qwen/Qwen2-VL-7B-Instruct"
    """Name on the Hugging Face hub, local folder, or URI of a folder (s3://…), which each node fetches once."""
    max_model_len: Positive = 4096
    """Maximum length of a conversation in tokens, image included."""
    max_pixels: Positive = 200_704
    """Maximum number of pixels per image, by default 256 patches of 28 x 28; larger images are scaled down."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type of the weights; `auto` takes the model's own."""
    quantization: str | None = added(None)
    """vLLM's name of a quantisation of the weights, such as `fp8`; none takes the weights as they are."""
    kv_cache_dtype: str = added("auto")
    """vLLM's name of the cache's number type, such as `fp8`; `auto` takes the model's own."""
    batched_tokens: Positive | None = execution(None)
    """Tokens that one step of the engine processes; none leaves it to vLLM, which takes 16,384 on large GPUs."""
    sequences: Positive | None = execution(None)
    """Sequences that one step of the engine processes; none leaves it to vLLM, which takes 1,024 on large GPUs."""
    image_processes: NonNegative | None = execution(None)
    """Processes that decode images and prepare them for the model; 0 does it in the worker's own, none takes two where
    the model runs on a GPU, else 0."""
    arguments: str = execution("{}")
    """Further arguments of vLLM's engine, as a JSON object. They are not part of a result's version."""
    accelerator_type: str | None = execution(None)
    """Ray's name of the kind of GPU that workers need, such as `H100`; none takes any."""
    tensor_parallel: Positive = execution(1)
    """Number of GPUs that one model is split across."""
    several_machines: bool = execution(False)
    """These GPUs may be on several machines: vLLM places its workers with Ray. Without it, one machine has them all."""
    gpus: NonNegative = execution(1)
    """GPUs per replica, multiplied by tensor_parallel; 0 uses vLLM's CPU build."""
    memory_fraction: Share = execution(0.9)
    """Fraction of the GPU's memory, 0 to 1, that vLLM may use."""
    kv_cache_gib: Positive = execution(1)
    """Size of the key-value cache in GiB when vLLM runs on CPUs."""
    enforce_eager: bool = execution(False)
    """Run the model without CUDA graphs and compilation: a faster start, slower answers."""
    prefix_caching: bool = execution(True)
    """Keep a conversation's history in the key-value cache. Turn it off only for comparison."""
    stall_s: PositiveFloat = execution(600.0)
    """Restart an engine that has given no answer for this number of seconds while questions wait."""
    restarts: NonNegative = execution(2)
    """Maximum number of restarts of a dead or stalled engine per worker; 0 never restarts."""

    def __post_init__(self) -> None:
        if self.several_machines and self.gpus * self.tensor_parallel < 2:
            raise ValueError("several_machines needs two GPUs or more: raise tensor_parallel")
        if self.several_machines and "://" in self.model:
            raise ValueError("several_machines needs a model of the hub, or a folder that all machines share")
        try:
            given = json.loads(self.arguments)
        except ValueError as error:
            raise ValueError(f"arguments must be a JSON object: {error}") from None
        if not isinstance(given, dict):
            raise ValueError(f"arguments must be a JSON object, found {self.arguments}")
        if taken := sorted(OWN_SETTING.keys() & given.keys()):
            names = ", ".join(f"{name} (set {OWN_SETTING[name]})" for name in taken)
            raise ValueError(f"arguments may not name what has a setting of its own: {names}")


@config
class OpenAIConfig:
    """Any endpoint that serves OpenAI's chat completions API with images."""

    base_url: str = "http://localhost:8000/v1"
    """URL of the API."""
    model: str = ""
    """Name of the model at the endpoint."""
    api_key_variable: str = execution("OPENAI_API_KEY")
    """Environment variable that holds the API key; the key itself is never stored."""
    timeout_s: PositiveFloat = execution(120.0)
    """Request timeout in seconds."""
    retries: NonNegative = execution(5)
    """Maximum number of retries of a request, with back-off; a Retry-After header is honoured. 0 never retries."""


@config
class OracleConfig:
    """A simulated annotator that reads its answers from the attribute table of drawn pedestrians."""

    error_rate: Share = 0.05
    """Probability, 0 to 1, that an attribute is reported wrongly; drawn once per image and attribute."""
    hidden_error_rate: Share | None = None
    """Error rate, 0 to 1, of attributes that a view hardly shows, so that views disagree; none means error_rate."""
    seed: NonNegative = 0
    """Seed of the errors."""


Agree = Literal["none", "tracklet", "identity"]


@config
class DialogueConfig:
    """Conversation Attribute Mining: ask a multimodal model about every image, then for a summary."""

    engine: Literal["vllm", "openai", "oracle"] = "vllm"
    """Who answers: a model in vLLM, an endpoint with OpenAI's API, or the simulated annotator of drawn pedestrians."""
    published: str | None = None
    """Path or URI of the authors' published dialogues, which are imported instead of asking a model."""
    questions: Annotated[int, Field(ge=1, le=5)] = 5
    """Number of questions, 1 to 5, asked before the summary."""
    answer_tokens: Positive = 48
    """Maximum length of an answer in tokens."""
    summary_tokens: Positive = 128
    """Maximum length of the summary in tokens."""
    attributes: bool = False
    """Also ask for attributes from a fixed vocabulary (gender, colours, clothes), for filters in search."""
    attribute_tokens: Positive = 384
    """Maximum length of the structured answer in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Sampling temperature; 0 is greedy decoding."""
    seed: NonNegative = 0
    """Seed of sampling."""
    split: Split | None = None
    """Split whose images are asked about; none means all splits."""
    limit: Positive | None = None
    """Ask only about this number of images, from the first; none means all."""
    only_missing: bool = False
    """Ask only about images that are not in the published table, and publish old and new dialogues together."""
    agree: Agree = added("none")
    """Which images get one common summary, written from their own ones: those of a tracklet, or of the split train also
    those of an identity."""
    canary: bool = execution(True)
    """First check that the model answers differently for different images."""
    images_per_part: Positive = 128
    """Images per published file. A killed job loses at most the files in progress."""
    replicas: Positive = execution(1)
    """Number of dialogue workers, with one engine each."""
    conversations: Positive | None = execution(None)
    """Number of concurrent conversations per worker; none takes vLLM's number of sequences on a GPU, else 64."""
    vllm: VLLMConfig = VLLMConfig()
    openai: OpenAIConfig = OpenAIConfig()
    oracle: OracleConfig = OracleConfig()

    def __post_init__(self) -> None:
        if self.published is not None and self.only_missing:
            raise ValueError("only_missing asks a model, and published imports a file: choose one of them")
