"""Floating-point operations of a training step."""

from __future__ import annotations

from ceca.config import ModelConfig
from ceca.model.clip import describe


def step_flops(config: ModelConfig, batch: int, text_tokens: int) -> float:
    """Floating-point operations that a training step needs: forward, and twice that backward.

    Counted are matrix products; padding and what is computed twice do not count.

    Args:
        batch: samples. text_tokens: of their captions and summaries together, start and end included.
    """
    clip = describe(config.backbone)
    vision, text, width = clip["vision_cfg"], clip["text_cfg"], clip["embed_dim"]
    patch = vision["patch_size"]
    patches = (config.image_height // patch) * (config.image_width // patch)
    texts = batch * (2 if config.summary_weight else 1)
    length = text_tokens / texts
    forward = 6 * batch * patches * patch**2 * vision["width"]
    for tower, tokens, span in ((vision, batch * (patches + 1), patches + 1), (text, text_tokens, length)):
        size = tower["width"]
        block = (8 + 4 * tower.get("mlp_ratio", 4)) * size**2 + 4 * span * size
        forward += tokens * (tower["layers"] * block + 2 * size * width)
    if config.local_branch:
        own = batch * patches + text_tokens
        forward += own * (4 * width * config.local_dim + 2 * width**2)
        if config.mixer != "none":
            forward += own * 16 * width**2 + 4 * width * (batch * patches**2 + text_tokens * length)
        for side in ("image", "text") if config.summary_weight else ():
            if config.mixer in (side, "bidirectional"):  # queries and outputs of own tokens, keys and values of others
                ends = (batch * patches, batch * length) if side == "image" else (batch * length, batch * patches)
                conditions = config.condition_ratio * ends[1]
                forward += 4 * width**2 * (ends[0] + conditions) + 4 * width * ends[0] * conditions / batch
    return 3 * forward
