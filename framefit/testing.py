"""Tiny random checkpoints of every row's architecture: the real classes made small, in the row's folder layout.

Every parameter is random, norms and zero-initialised layers too: on a freshly built model a wrong chunking can change
the output by exactly nothing. They are for tests, ours and a user's; what they draw means nothing.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from framefit.families import CHECKPOINTS, Checkpoint, Component, easyanimate_v5, recognise
from framefit.families.filed import by_default
from framefit.families.parts import Parts, build

__all__ = ["random_parts", "randomise", "save_tiny", "tiny_row"]

CHARACTERS = sorted(set(string.printable.strip()) | {c for row in CHECKPOINTS.values() for c in row.negative_prompt})
BYTES = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 324))]
"""The 256 symbols that byte-level BPE spells bytes with."""

VOCABULARY = len(CHARACTERS) * 2 + 512
"""At least as large as any tokenizer below."""

CLIP_VISION = {
    "hidden_size": 16, "intermediate_size": 32, "projection_dim": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 28,
}  # fmt: skip
T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}

TINY: Mapping[str, Mapping[str, Any]] = {
    "WanTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32,
        "num_layers": 2,
    },
    "AutoencoderKLWan": {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    "UMT5EncoderModel": T5,
    "CLIPVisionModel": CLIP_VISION,
    "CLIPVisionModelWithProjection": CLIP_VISION,
    "CLIPImageProcessorPil": {"size": {"height": 28, "width": 28}, "crop_size": {"height": 28, "width": 28}},
    "EasyAnimateTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "time_embed_dim": 8, "text_embed_dim": 16,
    },
    "AutoencoderKLMagvit": {"block_out_channels": [4, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 2},
    "Qwen2VLForConditionalGeneration": {
        "text_config": {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 2,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        },
        "vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16},
    },
    "BertModel": {
        "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32,
    },
    "T5EncoderModel": T5,
    "I2VGenXLUNet": {
        "block_out_channels": [4, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 2, "cross_attention_dim": 16,
        "attention_head_dim": 4,
    },
    "AutoencoderKL": {"block_out_channels": [4, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 2},
    "CLIPTextModel": {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "projection_dim": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3,
    },
}  # fmt: skip
"""Class -> what is smaller than in the row."""


def tiny_row(id: str) -> Checkpoint:
    """The row `id` with every component's configuration made small."""
    row = CHECKPOINTS[id]
    return replace(row, components=tuple(replace(c, config=_tiny_config(c)) for c in row.components))


def save_tiny(id: str, folder: Path, *, seed: int = 0) -> Checkpoint:
    """Write a tiny random checkpoint of row `id` into `folder`, and return its row.

    Takes under a second once the model classes are imported.
    """
    row = tiny_row(id)
    generator = torch.Generator().manual_seed(seed)
    for component in row.components:
        target = folder / component.name
        if component.params:
            randomise(build(component), generator).save_pretrained(target)
        elif "Tokenizer" in component.class_name:
            _tokenizer(component.class_name, row).save_pretrained(target)
        else:
            build(component).save_pretrained(target)
    if row.layout == "easyanimate-v5":
        easyanimate_v5.to_native(folder / "transformer")
    index: dict[str, Any] = {c.name: [c.package, c.class_name] for c in row.components}
    index |= {"_class_name": PIPELINES[row.family], "boundary_ratio": row.boundary_ratio}
    index |= {"expand_timesteps": row.first_frame_clean}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return recognise(folder)


def random_parts(
    row: Checkpoint, *, dtype: torch.dtype, device: torch.device, models: Collection[str] | None = None
) -> Parts:
    """Every component of `row` at its full size with random weights, built on `device` with nothing downloaded.

    With `models`, of those that have weights only these.
    Enough for speed and memory, which do not depend on the weights. Modules that a class keeps in fp32 are in fp32.
    """
    components: dict[str, Any] = {}
    for component in row.components:
        if component.params and models is not None and component.name not in models:
            continue
        if component.params:
            components[component.name] = _random_model(
                component, torch.float32 if component.keep_fp32 else dtype, device
            )
        elif "Tokenizer" in component.class_name:
            components[component.name] = _tokenizer(component.class_name, row)
        else:
            components[component.name] = build(component)
    return Parts(row, components, device, dtype)


def _random_model(component: Component, dtype: torch.dtype, device: torch.device) -> Any:
    with by_default(dtype), device:
        model = build(component)
    kept = getattr(model, "_keep_in_fp32_modules", None) or []
    keeps = component.package == "diffusers" or dtype == torch.float16  # transformers keeps them for fp16 alone
    for name, parameter in model.named_parameters():
        if keeps and set(name.split(".")) & set(kept):
            parameter.data = parameter.data.float()
    return model


PIPELINES = {
    "wan": "WanImageToVideoPipeline",
    "easyanimate": "EasyAnimateInpaintPipeline",
    "i2vgen": "I2VGenXLPipeline",
}


@torch.no_grad()
def randomise(model: Any, generator: torch.Generator) -> Any:
    """Fill every parameter: matrices shrink their input a little, gains stay near 1, biases near 0.

    A generator of the model's own device fills a large model there in seconds.
    Without the shrinking, I2VGen-XL's deep chain of residual blocks amplifies rounding tenfold a forward.
    """
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, device=generator.device)
        if parameter.ndim > 1:
            parameter.copy_(0.7 * noise / math.sqrt(math.prod(parameter.shape[1:])))
        else:
            parameter.copy_((1.0 if name.endswith("weight") else 0.0) + 0.2 * noise)
    return model


def _tiny_config(component: Component) -> dict[str, Any]:
    small = dict(TINY.get(component.class_name, {}))
    for width in ("image_dim", "text_embed_dim_t5"):
        if component.config.get(width):
            small[width] = 16
    if component.config.get("added_kv_proj_dim"):
        small["added_kv_proj_dim"] = small["num_attention_heads"] * small["attention_head_dim"]
    if component.config.get("decoder_base_dim"):
        small["decoder_base_dim"] = 4
    layers = component.config.get("mmdit_layers")
    if layers:
        small["mmdit_layers"] = 1 if layers < component.config["num_layers"] else 2
    merged = dict(component.config) | small
    for nested in ("text_config", "vision_config"):
        if nested in small:
            merged[nested] = component.config[nested] | small[nested]
    return merged


def _tokenizer(class_name: str, row: Checkpoint) -> Any:
    """A tokenizer that spells: every character or byte is a token of its own."""
    import transformers

    cls = getattr(transformers, class_name)
    if class_name == "T5TokenizerFast":
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in CHARACTERS)]
        return cls(vocab=pieces, extra_ids=0, model_max_length=row.max_tokens)
    if class_name == "BertTokenizerFast":
        specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        words = specials + CHARACTERS + ["##" + c for c in CHARACTERS]
        return cls(vocab={word: i for i, word in enumerate(words)}, model_max_length=77)
    if class_name == "CLIPTokenizerFast":
        symbols = ["!", "<|pad|>", "<|startoftext|>", "<|endoftext|>"] + [c for c in BYTES if c != "!"]
        symbols += [c + "</w>" for c in BYTES]
        return cls(
            vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[], model_max_length=row.max_tokens
        )  # fmt: skip
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = cls(vocab={symbol: i for i, symbol in enumerate(specials + BYTES)}, merges=[])
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer
