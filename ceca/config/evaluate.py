"""Settings of `evaluate`, `index` and `serve`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ceca.config.dialogue import DialogueConfig, OpenAIConfig, OracleConfig, VLLMConfig
from ceca.config.ingest import Split
from ceca.settings import NonNegative, Positive, PositiveFloat, Share, added, config, execution


@config
class EvaluateConfig:
    """Measure retrieval metrics of a model on one split."""

    model: str = "ceca"
    """Name of the model below the dataset URI, or a URI of its own."""
    split: Split = "test"
    """Split to evaluate on."""
    omega: Share | None = None
    """ω: weight of the local similarity in the fused one, 0 to 1; 0 uses only the global similarity. None means that
    of the model's protocol: 0.5 for `released`, else 0.3."""
    neighbours: NonNegative = 0
    """Number of nearest images averaged into each gallery embedding, so that views of one person agree; 0 is off."""
    rerank: NonNegative = 0
    """Number of best images per query that are ranked again by similarity to the first five; 0 is off."""
    rerank_engine: Literal["vllm", "openai", "oracle"] | None = added(None)
    """Who looks at the best images of each query and says which of its claims they fit: a model in vLLM, an endpoint
    with OpenAI's API, or the simulated annotator of drawn pedestrians; none is off."""
    rerank_images: Annotated[int, Field(ge=2)] = added(10)
    """Number of best images per query that the engine looks at."""
    rerank_margin: PositiveFloat | None = added(None)
    """Ask only where the similarities of the first two images differ by at most this; none asks about every query."""
    rows_per_part: Positive = execution(2048)
    """Rows of embeddings per file."""
    batch: Positive = execution(64)
    """Images or captions embedded at once."""
    replicas: Positive = execution(1)
    """Number of processes that embed, and of engines."""
    gpus: NonNegative = execution(0)
    """GPUs per process; 0 embeds on CPUs."""
    vllm: VLLMConfig = added(VLLMConfig())
    openai: OpenAIConfig = added(OpenAIConfig())
    oracle: OracleConfig = added(OracleConfig())

    def __post_init__(self) -> None:
        if self.rerank and self.rerank_engine:
            raise ValueError("rerank and rerank_engine both rank the best images again: choose one of them")

    @property
    def engine(self) -> DialogueConfig | None:
        """Settings of the engine that looks at the best images; None if none does."""
        if self.rerank_engine is None:
            return None
        return DialogueConfig(
            engine=self.rerank_engine, replicas=self.replicas, vllm=self.vllm, openai=self.openai, oracle=self.oracle
        )


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
    approximate: Share = execution(0.0)
    """Measure how many of the ten best images an approximate search finds that compares this share of the images
    exactly, e.g. 0.005; 0 measures nothing."""
    batch: Positive = execution(64)
    """Images embedded at once."""
    replicas: Positive = execution(1)
    """Number of processes that embed."""
    gpus: NonNegative = execution(0)
    """GPUs per process; 0 embeds on CPUs."""


REPLICATED = ("ingress", "encoder", "search")  # parts of the service that have several replicas


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
    oidc: str | None = None
    """File that names an OIDC issuer whose tokens are accepted beside keys (see serve/tokens.py)."""
    open: bool = False
    """Answer without keys although other machines can reach the service, e.g. behind a proxy that authenticates."""
    audit: str = ""
    """Folder on each node for the log of requests, written with keys only. Empty means ~/.local/state/ceca/audit."""
    omega: Share = 0.3
    """Default ω of a query: weight of the local similarity in the fused one, 0 to 1."""
    neighbours: NonNegative = 0
    """Number of nearest images averaged into each gallery embedding, so that views of one person agree; 0 is off.
    The service then compares all images with all when it starts: some minutes for 100,000 images on a CPU."""
    rerank: NonNegative = 0
    """Number of best images per query that are ranked again by similarity to the first five; 0 is off."""
    rerank_engine: Literal["vllm", "openai", "oracle"] | None = None
    """Who looks at the best images of a query that asks for it and says which of its claims they fit, as in `evaluate`,
    where its verdicts' weight is learned: a model in vLLM, an endpoint with OpenAI's API, or the simulated annotator of
    drawn pedestrians; none is off. Images go where the settings below `vllm` or `openai` say."""
    rerank_images_limit: Annotated[int, Field(ge=10)] = 20
    """Maximum number of best images that a query can have the engine look at; 10 by default."""
    rerank_seconds_limit: PositiveFloat = 5.0
    """Maximum number of seconds that a query can give the engine; at most half of timeout_s."""
    approximate: Share = 0.0
    """Share of the images that a search compares exactly, after a first look at short sketches of all, which may miss
    some; 0 searches exactly. `ceca index --approximate` measures the share of the ten best images that it finds."""
    least_recall: Share = 0.0
    """Do not serve an approximate search that finds a smaller share of the ten best images, or is not measured."""
    top_k_limit: Annotated[int, Field(ge=10)] = 200
    """Maximum number of images that a query can reach over all its pages; a query gets 10 by default."""
    text_limit: Positive = 2000
    """Maximum length of a query in characters."""
    image_bytes_limit: Annotated[int, Field(ge=1, le=64 * 1024 * 1024)] = 8 * 1024 * 1024
    """Maximum size of an uploaded image in bytes; a proxy holds 64 MiB of all images at a time."""
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
    replicas_per_node: Positive | None = None
    """Maximum number of replicas of one kind on one node; with 1, a lost node leaves one of two. None has no limit."""
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
    """URL of the `openai` engine that describes added images. The URL in the dataset is never used."""
    engine_key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key of this engine."""
    engine_model: str = ""
    """Model that the `vllm` engine of added images runs: a name on the hub, a folder or a URI; empty means the model of
    the dataset's dialogues, if it is this program's default or lies in the dataset."""
    engine_gpus: NonNegative = 1
    """GPUs that the `vllm` engine of added images takes when needed, with its model split across them; 0 uses the CPU
    build."""
    vllm: VLLMConfig = VLLMConfig()
    openai: OpenAIConfig = OpenAIConfig()
    oracle: OracleConfig = OracleConfig()

    @property
    def reranker(self) -> DialogueConfig | None:
        """Settings of the engine that looks at the best images of a query; None if none does."""
        if self.rerank_engine is None:
            return None
        return DialogueConfig(engine=self.rerank_engine, vllm=self.vllm, openai=self.openai, oracle=self.oracle)

    def most(self, kind: str) -> int:
        """Largest number of replicas of a kind of `REPLICATED`; of search, per shard."""
        most: int = getattr(self, f"{kind}_replicas_max") or getattr(self, f"{kind}_replicas")
        return most

    def __post_init__(self) -> None:
        for name in REPLICATED:
            least, most = getattr(self, f"{name}_replicas"), getattr(self, f"{name}_replicas_max")
            if most is not None and most < least:
                raise ValueError(f"{name}_replicas_max {most} must be at least {name}_replicas {least}")
        if self.rerank and self.rerank_engine:
            raise ValueError("rerank and rerank_engine both rank the best images again: choose one of them")
        if self.rerank_engine and self.rerank_seconds_limit > self.timeout_s / 2:
            raise ValueError(
                f"rerank_seconds_limit {self.rerank_seconds_limit:g} must be at most half of timeout_s "
                f"{self.timeout_s:g}: a search takes time of its own"
            )
        if self.neighbours and self.shards > 1:
            raise ValueError("neighbours compares all images with all, so it needs shards 1")
        if self.approximate and self.gpus:
            raise ValueError("approximate search is made for CPUs: it needs gpus 0")
