"""Other programs' checkpoints: IRRA's and RDE's become models of this one; a model's CLIP part goes to open_clip.

Files are read as tensors and nothing else: code in a pickle is refused, never run.
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

# RDE's names (misspelt there) → ours. What it makes and never uses is left out: a second projection of the images
# (`linear`), the normalisation of an output.
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
# The released CECA program's mixers; the attention's q, k and v lie in one tensor there.
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
    # IRRA's heads, which training alone needs
    r"|classifier\.|cross_attn\.|cross_modal_transformer\.|ln_pre_[ti]\.|ln_post\.|mlm_head\."
)


def import_checkpoint(source: str, config: ModelConfig) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model that a checkpoint of IRRA or RDE holds: its settings and weights.

    Args:
        source: local file or URI. config: backbone and image size, which a checkpoint does not name.

    Raises:
        WeightsError: not such a checkpoint, of another backbone or image size, or not plain tensors.
    """
    found = {name.removeprefix("module."): value for name, value in read_weights(config.backbone, source).items()}
    if "base_model.visual.conv1.weight" not in found:
        first = ", ".join(sorted(found)[:3])
        raise WeightsError(
            f"{source!r} is no checkpoint of IRRA or RDE: it has no base_model.visual.conv1.weight (found {first}, …)"
        )
    local = any(name.startswith("visul_emb_layer.") for name in found)
    state: dict[str, Tensor] = {}
    unknown = []
    for name, value in found.items():
        own = _own_name(name)
        if own is not None:
            state |= _split(own, value.float())
        elif not UNUSED.match(name) and name.removeprefix("base_model.") not in NOT_WEIGHTS:
            unknown.append(name)
    if unknown:
        raise WeightsError(
            f"{source!r} has {len(unknown)} weights that neither IRRA nor RDE has, e.g. {sorted(unknown)[0]}; "
            "such a model would lose them"
        )
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
    wanted = {name: value.shape for name, value in CECA(config).state_dict().items()}
    problems = [f"{name} is missing" for name in wanted.keys() - state.keys()]
    problems += [f"{name} is not known" for name in state.keys() - wanted.keys()]
    problems += [
        f"{name} is {list(state[name].shape)} and not {list(wanted[name])}"
        for name in wanted.keys() & state.keys()
        if state[name].shape != wanted[name]
    ]
    if problems:
        raise WeightsError(
            f"{source!r} does not fit {config.backbone} at {config.image_height}x{config.image_width}: "
            f"{sorted(problems)[0]}{f' and {len(problems) - 1} more' if len(problems) > 1 else ''}"
        )
    return config, state


def _own_name(name: str) -> str | None:
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
    """A tensor under our names: of an attention's joint projection, q, and k and v; a gate as [1]."""
    place, joint, kind = name.rpartition(".in_proj_")
    if joint and not name.startswith("backbone."):
        width = len(value) // 3
        return {f"{place}.query.{kind}": value[:width], f"{place}.key_value.{kind}": value[width:]}
    return {name: value.reshape(1) if name.endswith(".gate") else value}


def export_clip(model: CECA, out: Path, scale: float = 50.0) -> None:
    """Write a model's CLIP part as safetensors that open_clip loads as `pretrained=` (with `force_image_size`).

    `scale` is the factor of cosines that its `logit_scale` gets, for our models have none.
    """
    state = {name: value.contiguous() for name, value in model.backbone.clip.state_dict().items()}
    state["logit_scale"] = torch.tensor(math.log(scale))
    out.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(state, out)
