"""Configuration: one frozen dataclass per stage, validated when it is made.

A value comes from the field's default, then from the recipe (a YAML file with one section per stage), then
from the command line, whose options `commandline.py` makes of these same types. An unknown key, loss name or engine
is an error that lists the valid ones. Where data lies (`--data`) is not a setting: it never changes a result,
so it never changes a version.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ceca.settings import NonNegative, Positive, PositiveFloat, Share, added, config, execution

Split = Literal["train", "val", "test"]


# --- ingest -----------------------------------------------------------------------------------------------


@config
class DrawConfig:
    """Drawn pedestrians: a deterministic synthetic benchmark in one of the published layouts."""

    seed: NonNegative = 0
    identities: Positive = 360
    images_per_identity: Positive = 4
    layout: Literal["cuhk_pedes", "icfg_pedes", "rstpreid"] = "cuhk_pedes"
    split_identities: tuple[int, int, int] | None = None
    """Identities in train, val and test; by default about 70, 10 and 20 %."""
    lookalike_share: Share = 0.3
    """Share of people who differ from another one in two or three attributes only."""
    workers: Positive | None = execution(None)


@config
class IngestConfig:
    """Read a published layout (annotation file and imgs/) into the tables `images` and `captions`."""

    source: str = ""
    """Folder (or URI) that holds the annotation file and imgs/."""
    layout: Literal["auto", "cuhk_pedes", "icfg_pedes", "rstpreid"] = "auto"
    """`auto` looks for the annotation file of each benchmark."""
    images_per_part: Positive = 1024
    """Images in one Parquet file; at pedestrian crops of 5-30 kB that stays far below 128 MB."""
    limit: Positive | None = None
    """Only the first so many records."""
    cpus_per_task: PositiveFloat = execution(1.0)


# --- dialogue ---------------------------------------------------------------------------------------------


@config
class VLLMConfig:
    """A model served by vLLM inside the dialogue workers."""

    model: str = "Qwen/Qwen2-VL-7B-Instruct"
    """Name on the hub, a local folder, or a URI of one (s3://…), which each node fetches once."""
    max_model_len: Positive = 4096
    """Longest conversation in tokens, image included."""
    max_pixels: Positive = 200_704
    """Pixel budget of the vision encoder; pedestrian crops are small (200,704 = 256 patches of 28 x 28)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    tensor_parallel: Positive = execution(1)
    gpus: NonNegative = execution(1)
    """GPUs of one replica; 0 runs vLLM's CPU build."""
    memory_fraction: Share = execution(0.9)
    """Share of the GPU's memory that vLLM may take."""
    kv_cache_gib: Positive = execution(1)
    """Size of the key-value cache where vLLM runs on CPU."""
    enforce_eager: bool = execution(False)
    prefix_caching: bool = execution(True)
    """Keep a conversation's history in the key-value cache; off only to compare."""
    stall_s: PositiveFloat = execution(600.0)
    """An engine that answers nothing for so long while questions wait is started anew."""
    restarts: NonNegative = execution(2)
    """How often one worker replaces an engine that died or stalled."""


@config
class OpenAIConfig:
    """Any endpoint that speaks OpenAI's chat completions with images."""

    base_url: str = "http://localhost:8000/v1"
    model: str = ""
    api_key_variable: str = execution("OPENAI_API_KEY")
    """Environment variable that holds the key; the key itself is never stored."""
    timeout_s: PositiveFloat = execution(120.0)
    retries: NonNegative = execution(5)
    """Attempts after the first one, with back-off; a Retry-After answer is honoured."""


@config
class OracleConfig:
    """A simulated annotator: it reads the answers from the drawn pedestrians' attribute table."""

    error_rate: Share = 0.05
    """Chance that an attribute is reported wrongly, drawn once per image and attribute."""
    hidden_error_rate: Share | None = None
    """The same for an attribute of which the image's view shows little (ceca/dialogue/oracle.py); none: no difference.
    A high one makes the summaries of one person's views disagree."""
    seed: NonNegative = 0


@config
class DialogueConfig:
    """Conversation Attribute Mining: ask a multimodal model about every image, then for a summary."""

    engine: Literal["vllm", "openai", "oracle"] = "vllm"
    published: str | None = None
    """Import the authors' published dialogues from this file (path or URI) instead of asking."""
    questions: Annotated[int, Field(ge=1, le=5)] = 5
    """How many of the five questions are asked before the summary."""
    answer_tokens: Positive = 48
    """Longest answer to one question, in tokens."""
    summary_tokens: Positive = 128
    attributes: bool = False
    """Ask for attributes with a vocabulary (gender, colours, clothes) besides free text, for filters in search."""
    attribute_tokens: Positive = 384
    """Longest structured answer, in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 is greedy."""
    seed: NonNegative = 0
    split: Split | None = None
    """Only images of this split."""
    limit: Positive | None = None
    """Only the first so many images."""
    only_missing: bool = False
    """Ask only about images that the published table lacks, and publish both together."""
    canary: bool = execution(True)
    """Before the work, see that a model answers differently about different images."""
    images_per_part: Positive = 128
    """Images in one published file, which is also what a killed job may lose."""
    replicas: Positive = execution(1)
    """Dialogue workers; each holds one engine."""
    conversations: Positive = execution(64)
    """Conversations in flight on one worker."""
    vllm: VLLMConfig = VLLMConfig()
    openai: OpenAIConfig = OpenAIConfig()
    oracle: OracleConfig = OracleConfig()

    def __post_init__(self) -> None:
        if self.published is not None and self.only_missing:
            raise ValueError("only_missing asks a model about images, and published imports a file: choose one of them")


# --- train ------------------------------------------------------------------------------------------------


@config
class ModelConfig:
    """CLIP and the local branch (method: Encoders, Global branch, Local branch)."""

    backbone: str = "ViT-B-16-quickgelu"
    """Any open_clip ViT by name, or `ceca-tiny`, a small one that trains from nothing on a CPU."""
    pretrained: str | None = None
    """open_clip tag, local file or URI of CLIP weights. Nothing is downloaded unless this asks for it."""
    image_height: Positive = 384
    image_width: Positive = 128
    summary_weight: Share = 0.3
    """λ: share of the summary in the visual embeddings; 0 leaves the summaries out."""
    local_branch: bool = True
    """Match tokens besides whole embeddings; without it a model has its global embedding alone."""
    mixer: Literal["bidirectional", "image", "text", "none"] = "bidirectional"
    """Which side of the mixer is conditioned on the other: `image` conditions image tokens on the summary's, `text`
    the summary's on the image's; `none` embeds the tokens as they are, as RDE does."""
    token_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of a side's own tokens that enter the local branch, by importance."""
    condition_ratio: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of the other side's tokens that condition the mixer in training; all at inference."""
    mixer_order: Literal["alternating", "released"] = added("alternating")
    """The mixer as the paper describes it (`alternating`), or as the authors' program computes it (`released`)."""
    mixer_heads: Positive = 8
    local_dim: Positive = 1024
    """Width of a local embedding."""
    gate_start: float = -3.0
    """Start of γ: the mixer begins as `query + sigmoid(γ)·Δ`."""


Term = Literal["tal_global", "tal_local", "cawl", "infonce", "sdm", "identity", "words"]


@config
class LossConfig:
    """Total = the sum of the named terms (method: Losses, The IRRA baseline)."""

    terms: Annotated[tuple[Term, ...], Field(min_length=1)] = ("tal_global", "tal_local", "cawl")
    """CECA: tal_global, tal_local, cawl. Plain CLIP: infonce. IRRA: sdm, identity, words."""
    temperature: PositiveFloat = 0.015
    """τ of the triplet alignment loss."""
    margin: Annotated[float, Field(ge=0)] = 0.1
    scale: PositiveFloat = 50.0
    """Factor of the cosines in cawl (κ), infonce and sdm (1/0.02)."""
    identity_weight: PositiveFloat = 0.5
    """Factor of the two cross-entropies' sum in the term identity: 0.5 takes their mean, as IRRA's program does."""
    gamma: Annotated[float, Field(ge=0)] = 1.0
    weight_range: tuple[float, float] = (0.2, 5.0)

    def __post_init__(self) -> None:
        low, high = self.weight_range
        if not 0 <= low <= high:
            raise ValueError(f"weight_range must be (low, high) with 0 <= low <= high, found {self.weight_range}")


@config
class OptimiserConfig:
    """Adam with warm-up and cosine decay (method: Optimisation)."""

    learning_rate: PositiveFloat = 1e-5
    """For CLIP; its biases run at twice this rate."""
    new_learning_rate: PositiveFloat = 1e-3
    """For the modules that start from random weights."""
    weight_decay: Annotated[float, Field(ge=0)] = 4e-5
    """None on biases."""
    batch_rule: Literal["fixed", "linear", "sqrt"] = "fixed"
    """How the rates follow the global batch: as they stand, or times (global_batch / 64), or its square root."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    epsilon: PositiveFloat = added(1e-8)
    """Adam's ε, the smallest scale of an update; 1e-3 in the published recipes of IRRA, RDE and CECA."""
    schedule: Literal["step", "epoch"] = added("step")
    """When the rates change: after every step, or once per epoch as in the released programs."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 5.0
    warmup_start: Share = 0.1
    """Where the warm-up begins, as a share of the rate."""
    gradient_clip: Annotated[float, Field(ge=0)] = 0.0
    """Largest norm of the gradient; 0 leaves it alone."""


@config
class AugmentationConfig:
    """Changes made to a training sample (method: Optimisation)."""

    flip: Share = 0.5
    pad: NonNegative = 10
    """Pixels of padding before the random crop."""
    erase: Share = 0.5
    """Chance of random erasing."""
    erase_area: tuple[Share, Share] = (0.02, 0.4)
    erase_value: tuple[float, float, float] = added((0.0, 0.0, 0.0))
    """Colour of an erased area after normalisation; 0 is the mean. IRRA and RDE fill with CLIP's mean instead."""
    word_mask: Share = 0.2
    """Chance that a caption's token is touched: then masked 60 %, replaced 20 %, dropped 20 %."""


@config
class TrainConfig:
    """Train CECA, or a method it is compared with, with Ray Train and DeepSpeed."""

    name: str = "ceca"
    """The model's name below the dataset URI; the same name resumes."""
    model: ModelConfig = ModelConfig()
    losses: LossConfig = LossConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    epochs: Positive = 60
    global_batch: Positive = 64
    """Samples of one step over all workers together; it does not change with their number."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    backward: Literal["same", "bf16"] = "same"
    """`bf16`: fp32 training whose gradients are made of bf16 products, for CPUs that have those (avx512_bf16, AMX)."""
    seed: NonNegative = 0
    split: Split = "train"
    pairs_per_identity: Positive = 1
    """1 shuffles all pairs; with more, the pairs of an identity come so many at a time."""
    caption_noise: Share = 0.0
    """Share of the training pairs whose captions are exchanged among them (noisy correspondence)."""
    summary_swap: Share = 0.0
    """Chance that a sample takes the summary of another image of its identity, so that views come to agree."""
    caption_swap: Share = 0.0
    """The same for its caption: an image learns to answer to what people say of another view."""
    validate_every: NonNegative = 1
    """Epochs between validations; 0 never validates and keeps the last epoch."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = execution(1)
    offload: bool = execution(False)
    """Keep the optimiser's state in the CPU's memory (ZeRO 1 or more)."""
    micro_batch: Positive | None = execution(None)
    """Samples that pass a tower at once: less memory, one more forward pass, the same gradient (GradCache)."""
    recompute: bool = execution(False)
    """Keep no activations inside a tower's blocks and compute them again in the backward pass."""
    workers: Positive = execution(1)
    workers_min: Positive | None = execution(None)
    """Go on with as few workers as this where nodes are lost, and with more when they come back."""
    gpus_per_worker: NonNegative = execution(1)
    cpus_per_worker: PositiveFloat = execution(1.0)
    cpus_per_loader: PositiveFloat = execution(0.5)
    """CPUs that Ray reserves for one process that decodes images."""
    loaders_per_worker: Positive = execution(4)
    """At most so many of them feed one worker."""
    checkpoint_every: NonNegative = execution(200)
    """Steps between checkpoints, besides one at the end of every epoch; 0 leaves it at those."""
    checkpoints_kept: Positive = execution(2)
    failures_allowed: NonNegative = execution(3)
    """How often a lost worker or node restarts training from the last checkpoint by itself."""
    log_every: Positive = execution(10)
    """Steps between points of the curves."""
    watch: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = execution(("tensorboard",))
    """Where the curves go."""

    def __post_init__(self) -> None:
        if self.global_batch < self.workers:
            raise ValueError(
                f"global_batch {self.global_batch} must be at least workers {self.workers}: every worker takes a "
                "share of each step"
            )
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
            has, what = needs.get(term, (True, ""))
            if not has:
                raise ValueError(f"the loss {term} needs {what}; set it or leave {term} out of losses.terms")
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
    """Retrieval metrics of a model on one split."""

    model: str = "ceca"
    """Name below the dataset URI, or a URI of its own."""
    split: Split = "test"
    omega: Share = 0.3
    """ω: share of the local similarity in the fused one."""
    neighbours: NonNegative = 0
    """So many nearest images lend their embeddings to a gallery image's, so that views of one person agree."""
    rerank: NonNegative = 0
    """So many best images of a sentence are ranked again by how much they look like the first five of them."""
    rows_per_part: Positive = execution(2048)
    batch: Positive = execution(64)
    replicas: Positive = execution(1)
    gpus: NonNegative = execution(0)


@config
class IndexConfig:
    """Embed a split's images into the table `gallery`."""

    model: str = "ceca"
    split: Split | None = "test"
    """Which images; none means all."""
    only_missing: bool = False
    """Embed only images that the published gallery lacks or that have another summary now, and keep its other rows.
    An image's path is taken for its identity."""
    images_per_part: Positive = 2048
    batch: Positive = execution(64)
    replicas: Positive = execution(1)
    gpus: NonNegative = execution(0)


@config
class ServeConfig:
    """The search service."""

    model: str = ""
    """Name below the dataset URI or a URI of its own; empty takes the one that made the gallery."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    keys: str | None = None
    """File of API keys (`python -m serve.access NAME` makes one). Needed where others can reach the service."""
    open: bool = False
    """Answer without keys although others can reach the service: where something before it asks who they are."""
    omega: Share = 0.3
    """ω where a query names none."""
    neighbours: NonNegative = 0
    """So many nearest images lend their embeddings to an image's, so that views of one person agree; at its start the
    service then compares all images with all, some minutes for 100,000 on a CPU."""
    rerank: NonNegative = 0
    """So many best images of a query are ranked again by how much they look like the first five of them."""
    top_k_limit: Annotated[int, Field(ge=10)] = 200
    """Most images that one query may reach, page by page; one that does not say gets 10."""
    text_limit: Positive = 2000
    """Longest query in characters."""
    image_bytes_limit: Positive = 8 * 1024 * 1024
    """Largest image that is sent, in bytes."""
    image_pixels_limit: Positive = 16_000_000
    """And in pixels, which are counted before anything is decoded."""
    batch: Positive = 32
    """Queries that are embedded together at most."""
    batch_wait_s: Annotated[float, Field(ge=0)] = 0.002
    """How long a query waits for others to fill its batch."""
    ingress_replicas: Positive = 1
    ingress_replicas_max: Positive | None = None
    """With it, this deployment grows with its load and shrinks without; so for the others."""
    encoder_replicas: Positive = 1
    encoder_replicas_max: Positive | None = None
    shards: Positive = 1
    """Shares that the gallery is cut into, each with replicas of its own; every query asks one replica of each."""
    search_replicas: Positive = 1
    """Of each share of the gallery."""
    search_replicas_max: Positive | None = None
    shrink_s: PositiveFloat = 600.0
    """Seconds of less load after which replicas go that had come with more, and so the engine of added images."""
    cpus: Positive | None = None
    """CPUs, and torch threads, of one encoder or search replica; without it 1 on a cluster, and on a machine whose Ray
    this command starts all there are, at most 8: replicas wait for each other more than they work at the same time."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of one encoder or search replica; a share such as 0.5 lets both use one GPU, 0 runs on CPUs."""
    queue: Positive = 256
    """Requests at work or waiting on one ingress replica; one more is answered 503, to come again in a second."""
    timeout_s: PositiveFloat = 20.0
    """After which a request is answered 503."""
    follow_s: PositiveFloat = 5.0
    """Seconds between looks for a newer gallery, for images added and removed, each followed without a restart."""
    engine_url: str = ""
    """Where the `openai` engine that describes added images is; empty: where it was for the dataset's dialogues."""
    engine_gpus: NonNegative = 1
    """GPUs of a `vllm` engine that describes them, taken when an image comes that needs it; 0: vLLM's CPU build."""

    def __post_init__(self) -> None:
        for name in ("ingress", "encoder", "search"):
            least, most = getattr(self, f"{name}_replicas"), getattr(self, f"{name}_replicas_max")
            if most is not None and most < least:
                raise ValueError(f"{name}_replicas_max {most} must be at least {name}_replicas {least}")
        if self.neighbours and self.shards > 1:
            raise ValueError("neighbours compares all images with all, so it needs shards 1")


# --- from a mapping, a recipe, a command line -------------------------------------------------------------


STAGES: dict[str, type] = {
    "draw": DrawConfig,
    "ingest": IngestConfig,
    "dialogue": DialogueConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "index": IndexConfig,
    "serve": ServeConfig,
}
