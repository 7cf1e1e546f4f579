"""Qwen2.5-VL with random weights, about 1 MB: tests the real engine without a download. Its answers are noise."""

from __future__ import annotations

import json
from pathlib import Path

from ceca.dialogue.conversation import QUESTIONS, SUMMARY_REQUEST

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCABULARY_SIZE = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_vlm(folder: Path, seed: int = 0, *, width: int = 128, layers: int = 2, vision_depth: int = 2) -> Path:
    """Write a model with its tokenizer and processor, in the files of a hub.

    Args:
        folder: output folder, created if missing.
        seed: seed of the weights.
        width: hidden size of the text and vision parts; a multiple of 32.
        layers: number of text layers.
        vision_depth: number of vision layers.

    Returns:
        The folder.
    """
    import torch
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_make_tokenizer(), eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=32768
    )
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    config = _make_config(ids, width, layers, vision_depth)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16)
    # A zero row gives the logit 0, which is never the largest of hundreds. So greedy answers consist of letters, and
    # they always reach the length limit: the model never ends an answer.
    mute = [i for i in range(VOCABULARY_SIZE) if not tokenizer.decode([i]).strip().isalpha()]
    with torch.no_grad():
        model.lm_head.weight[mute] = 0
    model.save_pretrained(folder)
    limits = {"min_pixels": 28 * 28, "max_pixels": 512 * 28 * 28}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**limits),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**limits),
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    settings = {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def _make_config(ids, width, layers, vision_depth):  # type: ignore[no-untyped-def]
    from transformers import Qwen2_5_VLConfig

    heads = max(2, width // 32)
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY_SIZE,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 2),
            "max_position_embeddings": 32768,
            "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "depth": vision_depth,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_heads": heads,
            "out_hidden_size": width,
            "fullatt_block_indexes": [vision_depth - 1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def _make_tokenizer():  # type: ignore[no-untyped-def]
    """Train a byte-pair encoding on the questions. It is byte-level, so it can encode every text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*QUESTIONS, SUMMARY_REQUEST] * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer
