"""The floating-point operations of a training step, counted from the settings alone.

Notable: only what the model *needs* is counted. Padding, recomputed activations and everything but matrix products do
not count, so that the utilisation of a GPU falls when a program wastes work.
"""

from __future__ import annotations

from ceca.config import ModelConfig
from ceca.model.clip import describe


def step_flops(config: ModelConfig, batch: int, text_tokens: int) -> float:
    """Count the floating-point operations of a training step: a forward pass, and twice as much backward.

    Args:
        config: the model.
        batch: samples in the batch.
        text_tokens: tokens of all captions and summaries together, start and end tokens included.
    """
    clip = describe(config.backbone)
    vision, text, width = clip["vision_cfg"], clip["text_cfg"], clip["embed_dim"]
    patch = vision["patch_size"]
    patches = (config.image_height // patch) * (config.image_width // patch)
    texts = batch * (2 if config.summary_weight else 1)
    length = text_tokens / texts
    forward = 6 * batch * patches * patch**2 * vision["width"]
    # Towers: every token passes the linear layers of a block and attends to all tokens of its sample.
    for tower, tokens, attended in ((vision, batch * (patches + 1), patches + 1), (text, text_tokens, length)):
        size = tower["width"]
        block = (8 + 4 * tower.get("mlp_ratio", 4)) * size**2 + 4 * attended * size
        forward += tokens * (tower["layers"] * block + 2 * size * width)
    if config.local_branch:
        local_tokens = batch * patches + text_tokens
        forward += local_tokens * (4 * width * config.local_dim + 2 * width**2)
        if config.mixer != "none":
            forward += local_tokens * 16 * width**2 + 4 * width * (batch * patches**2 + text_tokens * length)
        for side in ("image", "text") if config.summary_weight else ():
            if config.mixer in (side, "bidirectional"):
                # Cross-attention: queries and outputs of one side's tokens, keys and values of the other side's.
                image, summary = batch * patches, batch * length
                queries, others = (image, summary) if side == "image" else (summary, image)
                conditions = config.condition_ratio * others
                forward += 4 * width**2 * (queries + conditions) + 4 * width * queries * conditions / batch
    return 3 * forward
