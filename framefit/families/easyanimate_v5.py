"""EasyAnimate V5's native layout: the same transformer under other names.

Upstream keeps the text side of a dual-stream block in an attention of its own (`attn2`); diffusers keeps it as added
projections of `attn1`. Everything else, and the whole VAE, has the same names. Source: aigc-apps/EasyAnimate,
easyanimate/models (attention.py, transformer3d.py), December 2024.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

__all__ = ["NATIVE_TO_DIFFUSERS", "config", "is_native", "rename", "to_native"]

NATIVE_TO_DIFFUSERS = {
    "attn2.to_q": "attn1.add_q_proj",
    "attn2.to_k": "attn1.add_k_proj",
    "attn2.to_v": "attn1.add_v_proj",
    "attn2.to_out.0": "attn1.to_add_out",
    "attn2.norm_q": "attn1.norm_added_q",
    "attn2.norm_k": "attn1.norm_added_k",
}
"""Inside `transformer_blocks.N.`; a name that is not here is the same on both sides."""

YAML = {
    "after_norm": False,
    "enable_text_attention_mask": False,
    "resize_inpaint_mask_directly": True,
    "time_position_encoding_type": "3d_rope",
}
"""What upstream's easyanimate_video_v5_magvit_multi_text_encoder.yaml puts over transformer/config.json."""


def rename(key: str, table: dict[str, str] = NATIVE_TO_DIFFUSERS) -> str:
    """A native parameter name in diffusers' words."""
    block = re.match(r"(transformer_blocks\.\d+\.)(.+)\.(weight|bias)$", key)
    if block is None or block[2] not in table:
        return key
    return f"{block[1]}{table[block[2]]}.{block[3]}"


def is_native(keys: set[str]) -> bool:
    """Whether a transformer's parameter names are upstream's."""
    return any(rename(key) != key for key in keys)


def config(folder: Path) -> dict[str, Any]:
    """transformer/config.json as upstream reads it, without the keys that diffusers' class does not take."""
    from diffusers import EasyAnimateTransformer3DModel

    known = inspect.signature(EasyAnimateTransformer3DModel.__init__).parameters
    stored = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in (stored | YAML).items() if key in known}


def to_native(folder: Path) -> None:
    """Rewrite a transformer that diffusers saved into `folder` under upstream's names."""
    from safetensors.torch import load_file, save_file

    table = {new: old for old, new in NATIVE_TO_DIFFUSERS.items()}
    for file in folder.glob("*.safetensors"):
        save_file({rename(key, table): value for key, value in load_file(file).items()}, file)
