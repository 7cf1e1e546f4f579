"""Other programs' weights: import checkpoints of IRRA and RDE, export a model's CLIP part for open_clip.

Notable: files are read as tensors and nothing else; a pickle that holds code is refused, and the code never runs. A
weight that cannot be placed is an error, so that no import silently loses a part of a model.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ceca.config import ModelConfig
from ceca.model.backbone import WeightsError
from ceca.model.ceca import CECA
from ceca.model.weights import NOT_WEIGHTS, read_weights

# RDE's names, misspelt there → ours. Two modules that RDE creates and never uses are left out: the images' second
# projection (`linear`) and the normalisation of the output.
RDE_NAMES = {
    r"visul_emb_layer\.fc\.": "visual_embedding.linear.",
    r"texual_emb_layer\.linear\.": "textual_embedding.linear.",
    r"visul_emb_layer\.mlp\.layers\.0\.": "visual_embedding.hidden.",
    r"texual_emb_layer\.mlp\.layers\.0\.": "textual_embedding.hidden.",
    r"visul_emb_layer\.mlp\.bns\.0\.": "visual_embedding.norm.",
    r"texual_emb_layer\.mlp\.bns\.0\.": "textual_embedding.norm.",
    r"visul_emb_layer\.mlp\.layers\.1\.": "visual_embedding.out.",
    r"texual_emb_layer\.mlp\.layers\.1\.": "textual_embedding.out.",
}
# The mixers of the released CECA program, in which an attention's q, k and v are one tensor.
for _side, _ours in (("visul", "visual"), ("texual", "textual")):
    RDE_NAMES |= {
        rf"{_side}_emb_layer\.refiner\.g$": f"{_ours}_mixer.gate",
        rf"{_side}_emb_layer\.refiner\.ln_q\.": f"{_ours}_mixer.self_norm.",
        rf"{_side}_emb_layer\.refiner\.ln_c\.": f"{_ours}_mixer.cross_norm.",
        rf"{_side}_emb_layer\.refiner\.sa\.out_proj\.": f"{_ours}_mixer.self_attention.out.",
        rf"{_side}_emb_layer\.refiner\.ca\.out_proj\.": f"{_ours}_mixer.cross_attention.out.",
        rf"{_side}_emb_layer\.refiner\.sa\.in_proj_": f"{_ours}_mixer.self_attention.in_proj_",
        rf"{_side}_emb_layer\.refiner\.ca\.in_proj_": f"{_ours}_mixer.cross_attention.in_proj_",
        rf"{_side}_emb_layer\.refiner\.mlp\.": f"{_ours}_mixer.mlp.",
    }
UNUSED = re.compile(
    r"visul_emb_layer\.linear\.|(visul|texual)_emb_layer\.mlp\.bns\.1\.|.*num_batches_tracked$|logit_scale$"
    # IRRA's heads, which only training needs
    r"|classifier\.|cross_attn\.|cross_modal_transformer\.|ln_pre_[ti]\.|ln_post\.|mlm_head\."
)


def import_checkpoint(source: str, config: ModelConfig) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read a checkpoint of IRRA or RDE as a model of this program.

    Args:
        source: local file or URI.
        config: backbone and image size, which a checkpoint does not state.

    Returns:
        The settings of the model and its weights.

    Raises:
        WeightsError: the file is no such checkpoint, is of another backbone or image size, or holds more than tensors.
    """
    checkpoint = read_weights(config.backbone, source)
    checkpoint = {name.removeprefix("module."): value for name, value in checkpoint.items()}
    if "base_model.visual.conv1.weight" not in checkpoint:
        first = ", ".join(sorted(checkpoint)[:3])
        raise WeightsError(
            f"{source!r} is no checkpoint of IRRA or RDE: it has no base_model.visual.conv1.weight (found {first}, …)"
        )
    local = any(name.startswith("visul_emb_layer.") for name in checkpoint)
    state = _translate(checkpoint, source)
    mixed = "visual_mixer.gate" in state
    config = dataclasses.replace(
        config,
        pretrained=None,
        summary_weight=0.3 if mixed else 0.0,
        local_branch=local,
        mixer="bidirectional" if mixed else "none",
        mixer_order="released" if mixed else "alternating",
        token_ratio=0.3 if local and not mixed else 1.0,
        local_dim=len(state["visual_embedding.out.bias"]) if local else config.local_dim,
    )
    _require_fit(state, config, source)
    return config, state


def _translate(checkpoint: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The weights of a checkpoint in fp32 under our names, without those that retrieval never uses.

    Raises:
        WeightsError: neither IRRA nor RDE has a weight of some name.
    """
    state: dict[str, Tensor] = {}
    unknown = []
    for name, value in checkpoint.items():
        ours = _our_name(name)
        if ours is not None:
            state |= _split(ours, value.float())
        elif not UNUSED.match(name) and name.removeprefix("base_model.") not in NOT_WEIGHTS:
            unknown.append(name)
    if unknown:
        raise WeightsError(
            f"{source!r} has {len(unknown)} weights that neither IRRA nor RDE has, e.g. {sorted(unknown)[0]}; "
            "the imported model would lose them"
        )
    return state


def _our_name(name: str) -> str | None:
    """Our name of a checkpoint's weight; None if it is not used or not known."""
    if name.startswith("base_model."):
        rest = name.removeprefix("base_model.")
        return None if rest in NOT_WEIGHTS else f"backbone.clip.{rest}"
    if UNUSED.match(name):
        return None
    for theirs, ours in RDE_NAMES.items():
        if re.match(theirs, name):
            return re.sub(theirs, ours, name, count=1)
    return None


def _split(name: str, value: Tensor) -> dict[str, Tensor]:
    """A tensor under our names: q apart from k and v of a joint projection, and a gate of shape [1]."""
    place, joint, kind = name.rpartition(".in_proj_")
    if joint and not name.startswith("backbone."):
        width = len(value) // 3
        return {f"{place}.query.{kind}": value[:width], f"{place}.key_value.{kind}": value[width:]}
    return {name: value.reshape(1) if name.endswith(".gate") else value}


def _require_fit(state: dict[str, Tensor], config: ModelConfig, source: str) -> None:
    """Check that weights have the names and shapes of a model.

    Raises:
        WeightsError: they do not; the message gives one difference and the number of others.
    """
    shapes = {name: value.shape for name, value in CECA(config).state_dict().items()}
    problems = [f"{name} is missing" for name in shapes.keys() - state.keys()]
    problems += [f"{name} is not known" for name in state.keys() - shapes.keys()]
    problems += [
        f"{name} is {list(state[name].shape)} and not {list(shapes[name])}"
        for name in shapes.keys() & state.keys()
        if state[name].shape != shapes[name]
    ]
    if problems:
        others = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise WeightsError(
            f"{source!r} does not fit {config.backbone} at {config.image_height}x{config.image_width}: "
            f"{sorted(problems)[0]}{others}"
        )


def export_clip(model: CECA, out: Path, scale: float = 50.0) -> None:
    """Write a model's CLIP part as safetensors; open_clip loads it as `pretrained=`, with `force_image_size`.

    Args:
        model: its text and image towers are written.
        out: the file.
        scale: factor of the cosines, written as `logit_scale`; our models have none.
    """
    state = {name: value.contiguous() for name, value in model.backbone.clip.state_dict().items()}
    state["logit_scale"] = torch.tensor(math.log(scale))
    out.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(state, out)
