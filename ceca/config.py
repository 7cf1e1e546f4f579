"""Settings: one frozen dataclass per stage, validated when it is made.

A field's default is replaced by the recipe (a YAML file with one section per stage), and the recipe by the command
line, whose options are generated from these types (ceca/commandline.py); the text below a field is its help text. An
unknown key, loss or engine is an error that lists the valid ones. Names of versions are digests of these settings,
except the fields made by `execution`. The location of the data (`--data`) is not a setting: it never changes a result.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ceca.settings import NonNegative, Positive, PositiveFloat, Share, added, config, execution

Split = Literal["train", "val", "test"]


# --- ingest -----------------------------------------------------------------------------------------------


@config
class DrawConfig:
    """Draw pedestrians: a deterministic synthetic benchmark in one of the published layouts."""

    seed: NonNegative = 0
    """Seed of all random choices."""
    identities: Positive = 360
    """Number of people."""
    images_per_identity: Positive = 4
    """Number of images of each person."""
    layout: Literal["cuhk_pedes", "icfg_pedes", "rstpreid"] = "cuhk_pedes"
    """Benchmark whose annotation file and folders are imitated."""
    split_identities: tuple[int, int, int] | None = None
    """Number of people in train, val and test; none means about 70, 10 and 20 %."""
    lookalike_share: Share = 0.3
    """Share of people, 0 to 1, who differ from another person in only two or three attributes."""
    workers: Positive | None = execution(None)
    """Number of drawing processes; none means one per CPU."""


@config
class IngestConfig:
    """Read a published layout (annotation file and imgs/) into the tables `images` and `captions`."""

    source: str = ""
    """Folder or URI that holds the annotation file and imgs/."""
    layout: Literal["auto", "cuhk_pedes", "icfg_pedes", "rstpreid"] = "auto"
    """Benchmark layout of the source; `auto` detects it by the annotation file."""
    images_per_part: Positive = 1024
    """Images per Parquet file; with pedestrian crops of 5-30 kB a file stays far below 128 MB."""
    limit: Positive | None = None
    """Read only this number of records, from the first; none means all."""
    cpus_per_task: PositiveFloat = execution(1.0)
    """CPUs that Ray reserves for each task."""


# --- dialogue ---------------------------------------------------------------------------------------------


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
    tensor_parallel: Positive = execution(1)
    """Number of GPUs that one model is split across."""
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
    canary: bool = execution(True)
    """First check that the model answers differently for different images."""
    images_per_part: Positive = 128
    """Images per published file. A killed job loses at most the files in progress."""
    replicas: Positive = execution(1)
    """Number of dialogue workers, with one engine each."""
    conversations: Positive = execution(64)
    """Number of concurrent conversations per worker."""
    vllm: VLLMConfig = VLLMConfig()
    openai: OpenAIConfig = OpenAIConfig()
    oracle: OracleConfig = OracleConfig()

    def __post_init__(self) -> None:
        if self.published is not None and self.only_missing:
            raise ValueError("only_missing asks a model, and published imports a file: choose one of them")


# --- train ------------------------------------------------------------------------------------------------


@config
class ModelConfig:
    """CLIP and the local branch (method: Encoders, Global branch, Local branch)."""

    backbone: str = "ViT-B-16-quickgelu"
    """Name of an open_clip ViT, or `ceca-tiny`, a small ViT that trains from random weights on a CPU."""
    pretrained: str | None = None
    """CLIP weights: an open_clip tag, a local file or a URI. None means random weights, and nothing is downloaded."""
    image_height: Positive = 384
    """Height in pixels to which images are resized."""
    image_width: Positive = 128
    """Width in pixels to which images are resized."""
    summary_weight: Share = 0.3
    """λ: weight of the summary in the visual embeddings, 0 to 1; 0 uses no summaries."""
    local_branch: bool = True
    """Add local embeddings, which match tokens. Without it a model has only global embeddings."""
    mixer: Literal["bidirectional", "image", "text", "none"] = "bidirectional"
    """`image` conditions image tokens on summary tokens, `text` summary tokens on image tokens, `bidirectional` both.
    `none` embeds tokens without mixing, as RDE does."""
    token_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of tokens, above 0 to 1, that enter the local branch; the most important ones are kept."""
    condition_ratio: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Fraction of the other side's tokens, above 0 to 1, that condition the mixer in training. Inference uses all."""
    mixer_order: Literal["alternating", "released"] = added("alternating")
    """`alternating` computes the mixer as the paper describes it, `released` as the authors' program does."""
    mixer_heads: Positive = 8
    """Number of attention heads in the mixer."""
    local_dim: Positive = 1024
    """Width of a local embedding."""
    gate_start: float = -3.0
    """Initial value of γ in the mixer's gate, `query + sigmoid(γ)·Δ`."""


Term = Literal["tal_global", "tal_local", "cawl", "infonce", "sdm", "identity", "words"]


@config
class LossConfig:
    """Total loss: the sum of the named terms (method: Losses, The IRRA baseline)."""

    terms: Annotated[tuple[Term, ...], Field(min_length=1)] = ("tal_global", "tal_local", "cawl")
    """Loss terms. CECA: tal_global, tal_local, cawl. Plain CLIP: infonce. IRRA: sdm, identity, words."""
    temperature: PositiveFloat = 0.015
    """τ of the triplet alignment loss (tal_global, tal_local)."""
    margin: Annotated[float, Field(ge=0)] = 0.1
    """Margin of the triplet alignment loss, a difference of cosines."""
    scale: PositiveFloat = 50.0
    """Factor of the cosines in cawl (κ), infonce and sdm (1/0.02)."""
    identity_weight: PositiveFloat = 0.5
    """Factor of the sum of both cross-entropies in the term identity; 0.5 takes their mean, as IRRA's code does."""
    gamma: Annotated[float, Field(ge=0)] = 1.0
    """γ of cawl's confidence weights; 0 gives all samples the same weight."""
    weight_range: tuple[float, float] = (0.2, 5.0)
    """Smallest and largest confidence weight in cawl."""

    def __post_init__(self) -> None:
        low, high = self.weight_range
        if not 0 <= low <= high:
            raise ValueError(f"weight_range must be (low, high) with 0 <= low <= high, found {self.weight_range}")


@config
class OptimiserConfig:
    """Adam with warm-up and cosine decay (method: Optimisation)."""

    learning_rate: PositiveFloat = 1e-5
    """Learning rate of CLIP's weights; its biases use twice this rate."""
    new_learning_rate: PositiveFloat = 1e-3
    """Learning rate of modules that start from random weights."""
    weight_decay: Annotated[float, Field(ge=0)] = 4e-5
    """Weight decay; 0 is off. Not applied to biases."""
    batch_rule: Literal["fixed", "linear", "sqrt"] = "fixed"
    """Factor of the learning rates by global batch: `fixed` 1, `linear` global_batch / 64, `sqrt` its square root."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Adam's β1 and β2."""
    epsilon: PositiveFloat = added(1e-8)
    """Adam's ε; 1e-3 in the published recipes of IRRA, RDE and CECA."""
    schedule: Literal["step", "epoch"] = added("step")
    """When the learning rates change: `step` after every step, `epoch` once per epoch, as in the released programs."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 5.0
    """Length of the linear warm-up in epochs; 0 is off."""
    warmup_start: Share = 0.1
    """Learning rate at the start of the warm-up, as a fraction (0 to 1) of the full rate."""
    gradient_clip: Annotated[float, Field(ge=0)] = 0.0
    """Maximum norm of the gradient; 0 does not clip."""


@config
class AugmentationConfig:
    """Random changes of a training sample (method: Optimisation)."""

    flip: Share = 0.5
    """Probability, 0 to 1, of a horizontal flip; 0 is off."""
    pad: NonNegative = 10
    """Padding in pixels on each side before the random crop; 0 is off."""
    erase: Share = 0.5
    """Probability, 0 to 1, of random erasing; 0 is off."""
    erase_area: tuple[Share, Share] = (0.02, 0.4)
    """Smallest and largest erased area, as fractions (0 to 1) of the image."""
    erase_value: tuple[float, float, float] = added((0.0, 0.0, 0.0))
    """Colour of an erased area after normalisation; 0 is the mean. IRRA and RDE use CLIP's mean once more."""
    word_mask: Share = 0.2
    """Probability, 0 to 1, that a caption token is changed: 60 % masked, 20 % replaced, 20 % dropped. 0 is off."""


@config
class TrainConfig:
    """Train CECA, or a method that it is compared with, on Ray Train and DeepSpeed."""

    name: str = "ceca"
    """Name of the model below the dataset URI. Training under the same name resumes."""
    model: ModelConfig = ModelConfig()
    losses: LossConfig = LossConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    epochs: Positive = 60
    """Number of passes over the training pairs."""
    global_batch: Positive = 64
    """Samples per step over all workers; it does not depend on their number."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Number type of the computation; fp16 needs a GPU."""
    backward: Literal["same", "bf16"] = "same"
    """`bf16`: fp32 training with gradients from bf16 products, for CPUs with avx512_bf16 or AMX. `same`: off."""
    seed: NonNegative = 0
    """Seed of all random choices."""
    split: Split = "train"
    """Split to train on."""
    pairs_per_identity: Positive = 1
    """Number of consecutive pairs of one identity in the training order; 1 shuffles all pairs."""
    caption_noise: Share = 0.0
    """Fraction of training pairs, 0 to 1, that exchange captions with each other (noisy correspondence); 0 is off."""
    noise_file: str | None = execution(None)
    """Path or URI of a published index file of noisy correspondence (.npy), used instead of `caption_noise`."""
    summary_swap: Share = 0.0
    """Probability, 0 to 1, that a sample takes the summary of another image of its identity; 0 is off."""
    caption_swap: Share = 0.0
    """Probability, 0 to 1, that a sample takes the caption of another image of its identity; 0 is off."""
    validate_every: NonNegative = 1
    """Epochs between validations; 0 never validates and keeps the last epoch."""
    validation_omega: Share = added(0.3)
    """ω of the validations that choose the epoch; the released programs take 0.5."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = execution(1)
    """DeepSpeed ZeRO stage: 1 splits optimiser states across workers, 2 also gradients, 3 also weights; 0 is off."""
    offload: bool = execution(False)
    """Keep optimiser states in CPU memory; needs zero_stage 1 or more."""
    micro_batch: Positive | None = execution(None)
    """Samples per pass through a tower (GradCache: less memory, one more forward pass); none is all at once."""
    recompute: bool = execution(False)
    """Discard activations inside a tower's blocks, and compute them again in the backward pass: less memory, slower."""
    workers: Positive = execution(1)
    """Number of training processes."""
    workers_min: Positive | None = execution(None)
    """Continue with this number of workers or more while nodes are missing; none always waits for `workers`."""
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] = execution(1)
    """GPUs per worker, 0 or 1; 0 trains on CPUs. More GPUs need more workers."""
    cpus_per_worker: PositiveFloat = execution(1.0)
    """CPUs that Ray reserves for each worker."""
    cpus_per_loader: PositiveFloat = execution(0.5)
    """CPUs that Ray reserves for each process that decodes images."""
    loaders_per_worker: Positive = execution(4)
    """Maximum number of image-decoding processes per worker."""
    checkpoint_every: NonNegative = execution(200)
    """Steps between checkpoints, in addition to one after each epoch; 0 saves only after epochs."""
    checkpoints_kept: Positive = execution(2)
    """Number of most recent checkpoints that are kept."""
    failures_allowed: NonNegative = execution(3)
    """Maximum number of restarts from the last checkpoint after a worker or node is lost; 0 never restarts."""
    log_every: Positive = execution(10)
    """Steps between points of the training curves."""
    watch: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = execution(("tensorboard",))
    """Where the training curves are written."""

    def __post_init__(self) -> None:
        if self.global_batch < self.workers:
            raise ValueError(f"global_batch {self.global_batch} must be at least workers {self.workers}")
        if self.noise_file is not None and self.caption_noise:
            raise ValueError("caption_noise makes noise and noise_file reads it: choose one of them")
        if self.workers_min is not None and self.workers_min > self.workers:
            raise ValueError(f"workers_min {self.workers_min} must be at most workers {self.workers}")
        if self.offload and self.zero_stage == 0:
            raise ValueError("offload needs zero_stage 1 or more: without it DeepSpeed has no optimiser state to move")
        if self.backward == "bf16" and (self.precision != "fp32" or self.zero_stage == 3):
            raise ValueError("backward bf16 is for precision fp32 with zero_stage 0, 1 or 2")
        needs = {
            "tal_local": (self.model.local_branch, "local_branch"),
            "cawl": (self.model.summary_weight > 0, "summary_weight above 0"),
        }
        for term in self.losses.terms:
            fulfilled, need = needs.get(term, (True, ""))
            if not fulfilled:
                raise ValueError(f"the loss {term} needs {need}; set it or leave {term} out of losses.terms")
        if self.summary_swap and not self.model.summary_weight:
            raise ValueError("summary_swap needs summaries: set summary_weight above 0")
        if self.precision == "fp16" and not self.gpus_per_worker:
            raise ValueError("precision fp16 needs a GPU; CPUs compute in fp32 or bf16")
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError(
                "precision bf16 needs zero_stage 1 or more: without it DeepSpeed keeps no fp32 weights, and steps "
                "finer than bf16 resolves are lost"
            )


# --- evaluate, index, search ------------------------------------------------------------------------------


@config
class EvaluateConfig:
    """Measure retrieval metrics of a model on one split."""

    model: str = "ceca"
    """Name of the model below the dataset URI, or a URI of its own."""
    split: Split = "test"
    """Split to evaluate on."""
    omega: Share = 0.3
    """ω: weight of the local similarity in the fused one, 0 to 1; 0 uses only the global similarity."""
    neighbours: NonNegative = 0
    """Number of nearest images averaged into each gallery embedding, so that views of one person agree; 0 is off."""
    rerank: NonNegative = 0
    """Number of best images per query that are ranked again by similarity to the first five; 0 is off."""
    rows_per_part: Positive = execution(2048)
    """Rows of embeddings per file."""
    batch: Positive = execution(64)
    """Images or captions embedded at once."""
    replicas: Positive = execution(1)
    """Number of processes that embed."""
    gpus: NonNegative = execution(0)
    """GPUs per process; 0 embeds on CPUs."""


@config
class IndexConfig:
    """Embed the images of a split into the table `gallery`."""

    model: str = "ceca"
    """Name of the model below the dataset URI, or a URI of its own."""
    split: Split | None = "test"
    """Split whose images are embedded; none means all images."""
    only_missing: bool = False
    """Embed only images that are new or have another summary now, and keep the other rows of the published gallery.
    Images are recognised by their path."""
    images_per_part: Positive = 2048
    """Images per file of the gallery."""
    batch: Positive = execution(64)
    """Images embedded at once."""
    replicas: Positive = execution(1)
    """Number of processes that embed."""
    gpus: NonNegative = execution(0)
    """GPUs per process; 0 embeds on CPUs."""


@config
class ServeConfig:
    """Run the search service."""

    model: str = ""
    """Name of the model below the dataset URI, or a URI of its own; empty means the model that made the gallery."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 listens on all."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port to listen on."""
    keys: str | None = None
    """File of API keys (`python -m serve.access NAME` makes one). Required if other machines can reach the service."""
    open: bool = False
    """Answer without keys although other machines can reach the service, e.g. behind a proxy that authenticates."""
    omega: Share = 0.3
    """Default ω of a query: weight of the local similarity in the fused one, 0 to 1."""
    neighbours: NonNegative = 0
    """Number of nearest images averaged into each gallery embedding, so that views of one person agree; 0 is off.
    The service then compares all images with all when it starts: some minutes for 100,000 images on a CPU."""
    rerank: NonNegative = 0
    """Number of best images per query that are ranked again by similarity to the first five; 0 is off."""
    top_k_limit: Annotated[int, Field(ge=10)] = 200
    """Maximum number of images that a query can reach over all its pages; a query gets 10 by default."""
    text_limit: Positive = 2000
    """Maximum length of a query in characters."""
    image_bytes_limit: Positive = 8 * 1024 * 1024
    """Maximum size of an uploaded image in bytes."""
    image_pixels_limit: Positive = 16_000_000
    """Maximum size of an uploaded image in pixels, checked before it is decoded."""
    batch: Positive = 32
    """Maximum number of queries embedded at once."""
    batch_wait_s: Annotated[float, Field(ge=0)] = 0.002
    """Seconds that a query waits for others to fill its batch; 0 does not wait."""
    ingress_replicas: Positive = 1
    """Number of ingress replicas, which answer HTTP requests; the minimum if ingress_replicas_max is set."""
    ingress_replicas_max: Positive | None = None
    """Maximum number of ingress replicas, which then follows the load; none keeps the number fixed."""
    encoder_replicas: Positive = 1
    """Number of encoder replicas, which embed queries; the minimum if encoder_replicas_max is set."""
    encoder_replicas_max: Positive | None = None
    """Maximum number of encoder replicas, which then follows the load; none keeps the number fixed."""
    shards: Positive = 1
    """Number of shards that the gallery is split into. Each query is sent to one replica of every shard."""
    search_replicas: Positive = 1
    """Number of search replicas per shard; the minimum if search_replicas_max is set."""
    search_replicas_max: Positive | None = None
    """Maximum number of search replicas per shard, which then follows the load; none keeps the number fixed."""
    shrink_s: PositiveFloat = 600.0
    """Seconds of lower load, and for the engine of added images without work, before they are removed."""
    cpus: Positive | None = None
    """CPUs, and torch threads, per encoder or search replica; none means 1 on a cluster.
    On a machine whose Ray this command starts, none means all CPUs but at most 8: replicas seldom compute together."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs per encoder or search replica; 0.5 lets two replicas share a GPU, 0 runs on CPUs."""
    queue: Positive = 256
    """Maximum number of requests in progress or waiting per ingress replica; further ones get 503."""
    timeout_s: PositiveFloat = 20.0
    """Request timeout in seconds, then 503."""
    follow_s: PositiveFloat = 5.0
    """Seconds between checks for a newer gallery and for added or removed images. Changes need no restart."""
    engine_url: str = ""
    """URL of the `openai` engine that describes added images; empty means the URL used for the dataset's dialogues."""
    engine_gpus: NonNegative = 1
    """GPUs, times tensor_parallel, that the `vllm` engine of added images takes when needed; 0 uses the CPU build."""

    def __post_init__(self) -> None:
        for name in ("ingress", "encoder", "search"):
            least, most = getattr(self, f"{name}_replicas"), getattr(self, f"{name}_replicas_max")
            if most is not None and most < least:
                raise ValueError(f"{name}_replicas_max {most} must be at least {name}_replicas {least}")
        if self.neighbours and self.shards > 1:
            raise ValueError("neighbours compares all images with all, so it needs shards 1")


STAGES: dict[str, type] = {
    "draw": DrawConfig,
    "ingest": IngestConfig,
    "dialogue": DialogueConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "index": IndexConfig,
    "serve": ServeConfig,
}
