"""Settings of `train`: model, losses, optimiser, augmentation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ceca.config.ingest import Split
from ceca.settings import Name, NonNegative, Positive, PositiveFloat, Share, added, config, execution


@config
class ModelConfig:
    """CLIP and the local branch (method: Encoders, Global branch, Local branch)."""

    backbone: str = "ViT-B-16-quickgelu"
    """Name of an open_clip ViT, or `ceca-tiny`, a small ViT that trains from random weights on a CPU."""
    pretrained: str | None = None
    """Weights to start from: a file or URI (CLIP, IRRA, RDE, CECA), an open_clip tag, or a published model by name or
    URI. None means random weights, and nothing is downloaded."""
    image_height: Positive = 384
    """Height in pixels to which images are resized."""
    image_width: Positive = 128
    """Width in pixels to which images are resized."""
    image_resize: Literal["bicubic", "bilinear"] = added("bicubic")
    """How images are resized, in training and in use, antialiased; the released programs take `bilinear`."""
    context: Annotated[int, Field(ge=77)] = added(77)
    """Tokens of a text that the model reads, 77 or more; longer texts are cut. Above 77, the positions of CLIP's
    weights are interpolated, all but the first 20."""
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

    def __post_init__(self) -> None:
        if self.context > 77 and self.mixer_order == "released" and self.local_branch and self.mixer != "none":
            raise ValueError(
                f"mixer_order released computes with the padding of 77 tokens, found context {self.context}: set "
                "mixer_order alternating, or context 77"
            )


Format = Literal["open_clip", "openai", "irra", "rde", "ceca"]  # of weights for other programs
Protocol = Literal["validation", "released"]
OMEGA: dict[Protocol, float] = {"validation": 0.3, "released": 0.5}  # ω by protocol, where no setting says another

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
    soft_labels: Share = added(0.0)
    """Share of common words, above 0 to 1, from which two captions count as one description. For an image whose person
    nobody named, others of the same description are no negatives, and those of a similar one are less of one; 0 is
    off."""

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
    """Train CECA, or a method that it is compared with, on Ray Train."""

    name: Name = "ceca"
    """Name of the model below the dataset URI. Training under the same name resumes."""
    model: ModelConfig = ModelConfig()
    losses: LossConfig = LossConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    epochs: Positive = 60
    """Number of passes over the training pairs."""
    global_batch: Positive = 64
    """Samples per step over all workers; it does not depend on their number."""
    last_batch: Literal["drop", "keep"] = added("drop")
    """Pairs at the end of an epoch that fill no batch: left out, or `keep`, a smaller batch as in the released
    programs."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Number type of the computation; fp16 needs a GPU."""
    backward: Literal["same", "bf16"] = "same"
    """`bf16`: fp32 training with gradients from bf16 products, for CPUs with avx512_bf16 or AMX. `same`: off."""
    seed: NonNegative = 0
    """Seed of all random choices."""
    split: Split = "train"
    """Split to train on, in every set."""
    sets: tuple[str, ...] = execution(())
    """URIs of further datasets to learn from, beside `--data`. Their people are others, whatever their numbers are.
    The epoch is chosen on `--data` alone."""
    set_weights: tuple[PositiveFloat, ...] = added(())
    """One number per further dataset: how often an epoch visits each of its pairs, e.g. 0.5 for half of them; none
    means 1 for all."""
    pairs_per_identity: Positive = 1
    """Number of consecutive pairs of one identity in the training order; 1 shuffles all pairs."""
    caption_noise: Share = 0.0
    """Fraction of training pairs, 0 to 1, that exchange captions with each other (noisy correspondence); 0 is off."""
    noise_file: str | None = execution(None)
    """Path or URI of a published index file of noisy correspondence (.npy), used instead of `caption_noise`. It is for
    the pairs of `--data`."""
    division: Literal["none", "consensus"] = added("none")
    """`consensus` finds noisy pairs before each epoch by the losses of both branches, and learns from the others only,
    as RDE does."""
    division_fit: Literal["quick", "close"] = added("quick")
    """Fit of the consensus division: RDE's program takes `close` for RSTPReid and for noise above 40 %."""
    summary_swap: Share = 0.0
    """Probability, 0 to 1, that a sample takes the summary of another image of its identity; 0 is off."""
    caption_swap: Share = 0.0
    """Probability, 0 to 1, that a sample takes the caption of another image of its identity; 0 is off."""
    validate_every: NonNegative = 1
    """Epochs between validations; 0 never validates and keeps the last epoch."""
    validation_omega: Share = added(0.3)
    """ω of the validations that choose the epoch, unless `protocol` is `released`."""
    protocol: Protocol = added("validation")
    """How the epoch is chosen: on the split `val`, or as the released programs choose it, on `test` with ω 0.5. All
    figures of such a model name the protocol."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = execution(1)
    """ZeRO stage: 1 splits optimiser states across workers, 2 also gradients, 3 also weights; 0 is off. DeepSpeed takes
    the steps with 2 and 3."""
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
    checkpoint_minutes: Annotated[float, Field(ge=0)] = execution(15.0)
    """Minutes after which the next logged step takes a checkpoint, too; 0 never looks at the clock."""
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
        if self.set_weights and len(self.set_weights) != len(self.sets):
            raise ValueError(
                f"set_weights needs one number per dataset of sets, found {len(self.set_weights)} for {len(self.sets)}"
            )
        if self.noise_file is not None and self.caption_noise:
            raise ValueError("caption_noise makes noise and noise_file reads it: choose one of them")
        if self.workers_min is not None and self.workers_min > self.workers:
            raise ValueError(f"workers_min {self.workers_min} must be at most workers {self.workers}")
        if self.offload and self.zero_stage == 0:
            raise ValueError("offload needs zero_stage 1 or more: without it DeepSpeed has no optimiser state to move")
        if self.backward == "bf16" and (self.precision != "fp32" or self.zero_stage == 3):
            raise ValueError("backward bf16 is for precision fp32 with zero_stage 0, 1 or 2")
        if self.division == "consensus" and not self.model.local_branch:
            raise ValueError("division consensus compares the losses of both branches: set local_branch")
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
