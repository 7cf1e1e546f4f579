"""Other programs' weights: what a checkpoint holds under our names, and a model under theirs.

Notable: CLIP's towers alone (OpenAI, open_clip), IRRA's format, RDE's, the released CECA program's, and published
models of ours are read alike, to import them and to start a training. A weight of the towers or of the local branch
that cannot be placed is an error; other names that nothing here uses are listed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from ceca.config import Format, ModelConfig
from ceca.data.store import Store
from ceca.errors import UserError
from ceca.model.archive import read_weights
from ceca.model.backbone import WeightsError
from ceca.model.ceca import CECA
from ceca.model.clip import describe
from ceca.model.embed import MEAN, STD
from ceca.model.registry import find_named, read_stored
from ceca.model.tokens import CONTEXT
from ceca.settings import from_mapping

# What files of CLIP carry besides weights, and the scale that nothing here uses.
NOT_WEIGHTS = ("logit_scale", "logit_bias", "input_resolution", "context_length", "vocab_size", "attn_mask")
KEPT_POSITIONS = 20  # of a text: they are trained well, and short texts have no others
LOCAL = ("visual_mixer", "textual_mixer", "visual_embedding", "textual_embedding")  # taken whole or not at all

# RDE's sides, misspelt there, and the released CECA program's mixers → ours.
SIDES = {"visul_emb_layer": "visual", "texual_emb_layer": "textual"}
PARTS = {
    "mlp.layers.0.": "embedding.hidden.",
    "mlp.bns.0.": "embedding.norm.",
    "mlp.layers.1.": "embedding.out.",
    "refiner.g": "mixer.gate",
    "refiner.ln_q.": "mixer.self_norm.",
    "refiner.ln_c.": "mixer.cross_norm.",
    "refiner.sa.out_proj.": "mixer.self_attention.out.",
    "refiner.ca.out_proj.": "mixer.cross_attention.out.",
    "refiner.sa.in_proj_": "mixer.self_attention.in_proj_",  # q, k and v in one tensor
    "refiner.ca.in_proj_": "mixer.cross_attention.in_proj_",
    "refiner.mlp.": "mixer.mlp.",
}
LINEAR = {"visul_emb_layer": "fc.", "texual_emb_layer": "linear."}
THEIR_NAMES = {
    f"{SIDES[side]}_{ours}": f"{side}.{theirs}"
    for side in SIDES
    for theirs, ours in {LINEAR[side]: "embedding.linear.", **PARTS}.items()
}
# Two modules of RDE that it creates and never uses: the images' second projection and the output's normalisation.
UNUSED = re.compile(r"visul_emb_layer\.linear\.|(visul|texual)_emb_layer\.mlp\.bns\.1\.|.*num_batches_tracked$")


class Checkpoint(NamedTuple):
    """Weights of some program, in fp32 under our names.

    Attributes:
        source: where it was read.
        kind: `CLIP`, `IRRA`, `RDE`, `CECA` or `published model`.
        state: the weights.
        origin: their names in the file, by ours.
        not_used: names in the file that no model of ours takes.
        config: settings of a published model; other files do not state any.
    """

    source: str
    kind: str
    state: dict[str, Tensor]
    origin: dict[str, str]
    not_used: list[str]
    config: ModelConfig | None = None


# --- in ---------------------------------------------------------------------------------------------------


def read_checkpoint(source: str, config: ModelConfig, store: Store | None = None) -> Checkpoint:
    """Read a checkpoint of any known program.

    Args:
        source: local file, URI of a file, open_clip tag, or a published model by name or URI.
        config: names the backbone; open_clip lists its tags.
        store: the dataset, in which names of published models are looked up.

    Raises:
        WeightsError: it is not found or of no known program, holds code, or has weights that would be lost.
    """
    home = Store(source) if store is None and "/" in source else store  # a URI needs no dataset
    published = find_named(home, source) if home is not None else None
    if home is not None and published is not None:
        stored = read_stored(home, source, published.digest)
        state = safetensors.torch.load(stored.weights)
        settings = from_mapping(ModelConfig, stored.settings, f"{stored.place} config.json")
        return Checkpoint(source, "published model", state, {name: name for name in state}, [], settings)
    content = read_weights(config.backbone, source)
    weights = {name.removeprefix("module."): name for name in content.weights}  # PyTorch's wrapper for many GPUs
    behind = weights.pop("positional_embedding_res", None)  # Long-CLIP's places behind the kept ones
    kind = _kind(weights, source)
    found = Checkpoint(source, kind, {}, {}, list(content.others))
    lost = []
    for name, theirs in weights.items():
        ours = _our_name(f"base_model.{name}" if kind == "CLIP" else name)
        if ours is not None:
            for part, value in _split(ours, content.weights[theirs].float()).items():
                found.state[part], found.origin[part] = value, theirs
        elif name.startswith(tuple(SIDES)) and not UNUSED.match(name):
            lost.append(theirs)
        else:
            found.not_used.append(theirs)
    if behind is not None:
        name = "backbone.clip.positional_embedding"
        others = content.weights[behind].float()[KEPT_POSITIONS:]
        found.state[name] = torch.cat([found.state[name][:KEPT_POSITIONS], others])
    if lost:
        raise WeightsError(
            f"{source!r} has {len(lost)} weights in its local branch that neither RDE nor CECA has, e.g. "
            f"{sorted(lost)[0]}; a model without them would give other embeddings"
        )
    return found


def _kind(names: dict[str, str], source: str) -> str:
    if "visual.conv1.weight" in names:
        return "CLIP"
    if "base_model.visual.conv1.weight" not in names:
        first = ", ".join(sorted(names)[:3])
        raise WeightsError(
            f"{source!r} is no checkpoint of CLIP, IRRA or RDE: it has no visual.conv1.weight (found {first}, …)"
        )
    if any(".refiner." in name for name in names):
        return "CECA"
    return "RDE" if any(name.startswith(tuple(SIDES)) for name in names) else "IRRA"


def _our_name(name: str) -> str | None:
    """Our name of a checkpoint's weight; None if it is not used or not known."""
    if name.startswith("base_model."):
        rest = name.removeprefix("base_model.")
        return None if rest in NOT_WEIGHTS else f"backbone.clip.{rest}"
    if UNUSED.match(name):
        return None
    for ours, theirs in THEIR_NAMES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return None


def _split(name: str, value: Tensor) -> dict[str, Tensor]:
    """A tensor under our names: q apart from k and v of a joint projection, and a gate of shape [1]."""
    place, joint, kind = name.rpartition(".in_proj_")
    if joint and not name.startswith("backbone."):
        width = len(value) // 3
        return {f"{place}.query.{kind}": value[:width], f"{place}.key_value.{kind}": value[width:]}
    return {name: value.reshape(1) if name.endswith(".gate") else value}


def import_checkpoint(
    source: str | Checkpoint, config: ModelConfig, store: Store | None = None
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Take a checkpoint as a model that embeds as its own program does.

    Args:
        source: what `read_checkpoint` takes or returned.
        config: backbone and image size, which most checkpoints do not state, and the context.
        store: the dataset, in which names of published models are looked up.

    Returns:
        The settings of the model and its weights.

    Raises:
        WeightsError: the checkpoint is of another backbone, image size or a longer context, or `read_checkpoint`
            raises.
    """
    checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source, config, store)
    state = dict(checkpoint.state)
    if checkpoint.config is not None:
        context = max(config.context, checkpoint.config.context)
        state |= _text_positions(state, context, checkpoint.source)
        return dataclasses.replace(checkpoint.config, pretrained=None, context=context), state
    local, mixed = checkpoint.kind in ("RDE", "CECA"), checkpoint.kind == "CECA"
    width = state.get("visual_embedding.out.bias")
    config = dataclasses.replace(
        config,
        pretrained=None,
        summary_weight=0.3 if mixed else 0.0,
        local_branch=local,
        mixer="bidirectional" if mixed else "none",
        mixer_order="released" if mixed else "alternating",
        token_ratio=0.3 if local and not mixed else 1.0,
        local_dim=config.local_dim if width is None else len(width),
        image_resize=config.image_resize if checkpoint.kind == "CLIP" else "bilinear",
    )
    model = CECA(config)
    if checkpoint.kind == "CLIP":  # CLIP was not trained on images of this shape
        state |= _image_positions(state, model)
    state |= _text_positions(state, config.context, checkpoint.source)
    problems = _differences({name: value.shape for name, value in model.state_dict().items()}, state)
    if problems:
        others = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise WeightsError(
            f"{checkpoint.source!r} does not fit {config.backbone} at {config.image_height}x{config.image_width}: "
            f"{problems[0]}{others}"
        )
    return config, state


def fitting_weights(checkpoint: Checkpoint, model: CECA) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The weights of a checkpoint with which a model can start training.

    The towers must fit, but for the size of images and a longer context: positions are interpolated. A module of the
    local branch is taken if all its weights fit.

    Returns:
        The weights; the names in the file that are not taken; the modules of the model that the file does not have.

    Raises:
        WeightsError: the towers are of another backbone, or of a longer context.
    """
    own = model.published_state()
    state = checkpoint.state | _image_positions(checkpoint.state, model)
    state |= _text_positions(state, model.config.context, checkpoint.source)
    taken: dict[str, Tensor] = {}
    not_used, at_random = list(checkpoint.not_used), []
    for module in ("backbone", *LOCAL):
        mine = {name: value.shape for name, value in own.items() if name.startswith(f"{module}.")}
        theirs = {name: value for name, value in state.items() if name.startswith(f"{module}.")}
        problems = _differences(mine, theirs)
        if problems and module == "backbone":
            raise WeightsError(
                f"{checkpoint.source!r} does not hold the weights of {model.config.backbone} ({len(problems)} "
                f"differences, e.g. {problems[0].removeprefix('backbone.clip.')}); choose the matching --model.backbone"
            )
        if not problems:
            taken |= theirs
            continue
        not_used += dict.fromkeys(checkpoint.origin[name] for name in theirs)
        at_random += [module] if mine else []
    return taken, not_used, at_random


def _differences(shapes: dict[str, torch.Size], state: dict[str, Tensor]) -> list[str]:
    """What keeps weights from having these names and shapes, in words, sorted."""
    problems = [f"{name} is missing" for name in shapes.keys() - state.keys()]
    problems += [f"{name} is not known" for name in state.keys() - shapes.keys()]
    problems += [
        f"{name} is {list(state[name].shape)} and not {list(shapes[name])}"
        for name in shapes.keys() & state.keys()
        if state[name].shape != shapes[name]
    ]
    return sorted(problems)


def _image_positions(state: dict[str, Tensor], model: CECA) -> dict[str, Tensor]:
    """The position embeddings of a state for a model's images, by name; nothing if they cannot be interpolated."""
    name = "backbone.clip.visual.positional_embedding"
    visual = model.backbone.clip.visual
    if name not in state or state[name].shape[1] != visual.positional_embedding.shape[1]:
        return {}
    return {name: interpolate_positions(state[name], visual.grid_size)}


def interpolate_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """[1 + n, D] position embeddings, class first → [1 + h·w, D], bilinearly.

    Args:
        positions: of a square image, or of one that is two or three times as high as wide.
        grid: height h and width w in patches of the result.

    Raises:
        WeightsError: n patches are no such image.
    """
    start, patches = positions[:1], positions[1:]
    if len(patches) == grid[0] * grid[1]:
        return positions
    widths = {ratio: math.isqrt(len(patches) // ratio) for ratio in (1, 2, 3)}
    ratio = next((ratio for ratio, width in widths.items() if ratio * width**2 == len(patches)), None)
    if ratio is None:
        raise WeightsError(
            f"position embeddings of {len(patches)} patches are from no square grid, nor from one 2 or 3 times as high"
        )
    image = patches.reshape(1, ratio * widths[ratio], widths[ratio], -1).permute(0, 3, 1, 2)
    resized = F.interpolate(image, size=grid, mode="bilinear", align_corners=False)
    return torch.cat([start, resized.flatten(2).transpose(1, 2)[0]])


def _text_positions(state: dict[str, Tensor], context: int, source: str) -> dict[str, Tensor]:
    """The position embeddings of a state for texts of this context, by name; nothing if it has none.

    Raises:
        WeightsError: they are of a longer context.
    """
    name = "backbone.clip.positional_embedding"
    if name not in state:
        return {}
    if len(state[name]) > context:
        raise WeightsError(
            f"{source!r} reads {len(state[name])} tokens and this model {context}: set its context to "
            f"{len(state[name])} or more (--model.context, or --context of ceca weights import)"
        )
    return {name: lengthen_positions(state[name], context)}


def lengthen_positions(positions: Tensor, context: int) -> Tensor:
    """[n, D] position embeddings of texts → [context, D]; the first 20 are kept, so short texts embed as before.

    The others are interpolated linearly: place p ≥ 20 takes the embedding at 20 + (p - 20)/f, with
    f = (context - 20)/(n - 20). The last places lie behind the last embedding and go on along its line. From 77 to 248
    tokens f is 4, the rule of Long-CLIP (Zhang et al., ECCV 2024).

    Args:
        positions: of a context n above 20.
        context: tokens of a text, n or more.
    """
    known = len(positions)
    if context == known:
        return positions
    at = KEPT_POSITIONS + torch.arange(context - KEPT_POSITIONS) * (known - KEPT_POSITIONS) / (context - KEPT_POSITIONS)
    before = at.long().clamp(max=known - 2)
    share = (at - before)[:, None].to(positions.dtype)
    between = (1 - share) * positions[before] + share * positions[before + 1]
    return torch.cat([positions[:KEPT_POSITIONS], between])


# --- out --------------------------------------------------------------------------------------------------


def write_checkpoint(model: CECA, out: Path, form: Format, scale: float = 50.0) -> list[str]:
    """Write a model in another program's format.

    Args:
        model: the model.
        out: the file: .safetensors for `open_clip`, .pt or .pth for the others.
        form: the format.
        scale: factor of the cosines, written as `logit_scale` for CLIP's own programs; our models have none.

    Returns:
        Names of the model's weights that the format has no place for.

    Raises:
        UserError: the suffix is another, or the format cannot hold the model's local branch or its context.
    """
    suffixes = (".safetensors",) if form == "open_clip" else (".pt", ".pth")
    if out.suffix not in suffixes:
        raise UserError(f"--out must end in {' or '.join(suffixes)} for the format {form}, found {out}")
    own = {name: value.detach().cpu().contiguous() for name, value in model.published_state().items()}
    clip = {name.removeprefix("backbone.clip."): own.pop(name) for name in list(own) if name.startswith("backbone.")}
    if form in ("open_clip", "openai"):
        clip["logit_scale"] = torch.tensor(math.log(scale))
    if form == "openai":
        context, words = len(clip["positional_embedding"]), len(clip["token_embedding.weight"])
        size = model.config.image_height
        numbers = {"input_resolution": size, "context_length": context, "vocab_size": words}
        clip |= {name: torch.tensor(number) for name, number in numbers.items()}
    content = clip
    if form in ("irra", "rde", "ceca"):
        if model.config.context > CONTEXT:
            raise UserError(
                f"the format {form} cannot hold a context of {model.config.context}: its program reads {CONTEXT} "
                "tokens; formats that can: open_clip, openai"
            )
        content = {f"base_model.{name}": value for name, value in clip.items()}
    if form in ("rde", "ceca"):
        _require_local_branch(model, form)
        content |= _their_names(own)
        own = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    if form == "open_clip":
        safetensors.torch.save_file(content, out)
    else:
        torch.save(content if form == "openai" else {"model": content}, out)
    return sorted(own)


def open_clip_config(name: str, image_size: tuple[int, int], context: int) -> dict[str, Any]:
    """The content of open_clip_config.json, by which open_clip loads a folder's or the hub's weights.

    Args:
        name: name of the backbone.
        image_size: height and width in pixels.
        context: tokens of a text.
    """
    described = describe(name)
    vision = {**described["vision_cfg"], "image_size": list(image_size)}
    model = {**described, "vision_cfg": vision, "text_cfg": {**described["text_cfg"], "context_length": context}}
    preprocess = {"mean": list(MEAN), "std": list(STD), "interpolation": "bicubic", "resize_mode": "squash"}
    return {"model_cfg": model, "preprocess_cfg": {"size": list(image_size), **preprocess}}


def _require_local_branch(model: CECA, form: str) -> None:
    config = model.config
    has = (config.local_branch, config.mixer, config.mixer_order if config.mixer != "none" else "")
    needed = {"rde": (True, "none", ""), "ceca": (True, "bidirectional", "released")}[form]
    if has != needed or (form == "ceca" and not model.uses_summaries):
        fitting = ", ".join(["open_clip", "openai", "irra"])
        raise UserError(
            f"the format {form} has no place for this model (mixer {config.mixer}, mixer_order {config.mixer_order}, "
            f"local_branch {config.local_branch}); formats of the towers alone: {fitting}"
        )


def _their_names(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The local branch under the names of RDE and of the released CECA program."""
    found: dict[str, Tensor] = {}
    for name, value in own.items():
        place, _, part = name.partition("attention.query.")
        if part:
            name, value = (
                f"{place}attention.in_proj_{part}",
                torch.cat([value, own[f"{place}attention.key_value.{part}"]]),
            )
        elif "attention.key_value." in name:
            continue
        ours = next(start for start in THEIR_NAMES if name.startswith(start))
        found[THEIR_NAMES[ours] + name.removeprefix(ours)] = value.reshape(()) if name.endswith(".gate") else value
    return found
