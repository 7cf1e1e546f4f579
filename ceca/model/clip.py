"""CLIP's two towers as plain modules, built from open_clip's descriptions of its models.

Notable: open_clip is not imported. Its package brings torchvision, timm and transformers, six seconds of every process
that starts; its descriptions are JSON files that are read where they are installed. Names, shapes, order and random
starts of all parameters equal open_clip's, so weights go in and out as they are, and a seed gives the same model (a
test compares both). The forward passes are in `ceca.model.backbone`.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ceca.errors import UserError

TINY = "ceca-tiny"
MODEL = {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}
VISION = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "ls_init_value"}
TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}


@functools.cache
def descriptions() -> dict[str, Path]:
    """Description files of all models by name: open_clip's, and `ceca-tiny`."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise UserError("the package open_clip_torch is not installed; install the project's requirements")
    files = (Path(package.origin).parent / "model_configs").glob("*.json")
    own = Path(__file__).parent / f"{TINY}.json"
    return {file.stem: file for file in [own, *sorted(files)]}


def describe(name: str) -> dict[str, Any]:
    """The description of a plain ViT CLIP: `embed_dim`, `quick_gelu`, and its `vision_cfg` and `text_cfg`.

    Raises:
        UserError: no such model, or it is built otherwise.
    """
    if name not in descriptions():
        names = [known for known in descriptions() if not _odd(json.loads(descriptions()[known].read_text()))]
        raise UserError(f"unknown backbone {name!r}; valid: {', '.join(names)}")
    described: dict[str, Any] = json.loads(descriptions()[name].read_text())
    if odd := _odd(described):
        raise UserError(f"backbone {name!r} is not a plain ViT CLIP (it has {odd}); choose a ViT-… of open_clip")
    return described


def _odd(described: dict[str, Any]) -> str:
    """What a description has that a plain ViT CLIP has not; empty for a plain one."""
    vision, text = described["vision_cfg"], described["text_cfg"]
    if not isinstance(vision.get("layers"), int):
        return "no ViT as its image tower"
    odd = (described.keys() - MODEL) | (vision.keys() - VISION) | (text.keys() - TEXT)
    return ", ".join(sorted(odd))


class CLIP(nn.Module):
    """Parameters of both towers under open_clip's names, without the scale of the logits.

    Args:
        name: a model that `describe` knows.
        image_size: height and width in pixels; the grid of patches follows from it.
        context: tokens of a text; None takes the description's.
    """

    def __init__(self, name: str, image_size: tuple[int, int], context: int | None = None):
        super().__init__()
        described = describe(name)
        gelu = QuickGELU if described.get("quick_gelu") else nn.GELU
        self.visual = _VisionTower(described["vision_cfg"], described["embed_dim"], image_size, gelu)
        text = described["text_cfg"]
        width, layers = text["width"], text["layers"]
        token_embedding = nn.Embedding(text["vocab_size"], width)
        self.positional_embedding = nn.Parameter(torch.empty(context or text["context_length"], width))
        self.transformer = _Transformer(width, layers, text["heads"], text.get("mlp_ratio", 4.0), gelu)
        self.token_embedding = token_embedding
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, described["embed_dim"]))
        self._start_text_tower(width, layers)

    def _start_text_tower(self, width: int, layers: int) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        block: Any
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(width**-0.5) * ((2 * layers) ** -0.5))
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(width**-0.5) * ((2 * layers) ** -0.5))
        nn.init.normal_(self.text_projection, std=width**-0.5)


class _VisionTower(nn.Module):
    """The image tower; `grid_size` is its patches (rows, columns)."""

    def __init__(self, vision: dict[str, Any], embed_dim: int, image_size: tuple[int, int], gelu: type[nn.Module]):
        super().__init__()
        width, patch = vision["width"], vision["patch_size"]
        self.grid_size = (image_size[0] // patch, image_size[1] // patch)
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(self.grid_size[0] * self.grid_size[1] + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        heads = width // vision.get("head_width", 64)
        layer_scale = vision.get("ls_init_value")
        self.transformer = _Transformer(width, vision["layers"], heads, vision.get("mlp_ratio", 4.0), gelu, layer_scale)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))


class _Transformer(nn.Module):
    def __init__(
        self, width: int, layers: int, heads: int, ratio: float, gelu: type[nn.Module], scale: float | None = None
    ):
        super().__init__()
        self.resblocks = nn.ModuleList([_Block(width, heads, ratio, gelu, scale) for _ in range(layers)])


class _Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and, in some models, before a learned scale."""

    def __init__(self, width: int, heads: int, ratio: float, gelu: type[nn.Module], scale: float | None):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ls_1 = nn.Identity() if scale is None else _LayerScale(width, scale)
        self.ln_2 = nn.LayerNorm(width)
        inner = int(width * ratio)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, inner), gelu=gelu(), c_proj=nn.Linear(inner, width)))
        self.ls_2 = nn.Identity() if scale is None else _LayerScale(width, scale)


class _LayerScale(nn.Module):
    def __init__(self, width: int, start: float):
        super().__init__()
        self.gamma = nn.Parameter(start * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class QuickGELU(nn.Module):
    """x·sigmoid(1.702x), OpenAI's activation, with one tensor kept for the backward pass and none between."""

    def forward(self, x: Tensor) -> Tensor:
        return _QuickGELU.apply(x)


class _QuickGELU(torch.autograd.Function):
    """silu(a·x)/a; torch computes its backward pass in one sweep."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(1.702 * x, inplace=True).mul_(1 / 1.702)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient, 1.702 * x)
