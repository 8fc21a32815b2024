"""Telling from its configuration files what a local folder holds.

A fine-tune or a tiny copy has the architecture of a published model and other numbers: it becomes that row, with its
own configurations and counts.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from framefit.errors import ModelMissing
from framefit.families import easyanimate_v5
from framefit.families.checkpoint import Checkpoint, Component
from framefit.families.files import Shapes, header
from framefit.families.rows import CHECKPOINTS

__all__ = ["recognise"]

CONFIG_NAMES = ("config.json", "scheduler_config.json", "preprocessor_config.json", "tokenizer_config.json")

SCHEDULERS = {
    "UniPCMultistepScheduler": ("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"),
    "FlowMatchEulerDiscreteScheduler": ("FlowMatchEulerDiscreteScheduler",),
    "DDIMScheduler": ("DDIMScheduler",),
}
"""The published model's scheduler -> those that a folder of its architecture may have."""

ORIGINALS = {
    "high_noise_model": ("Wan2.2 in upstream's own layout", "Wan-AI/Wan2.2-I2V-A14B-Diffusers"),
    "models_t5_umt5-xxl-enc-bf16.pth": ("Wan in upstream's own layout", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"),
    "i2vgen_xl_00854500.pth": ("I2VGen-XL in upstream's own layout", "ali-vilab/i2vgen-xl"),
}
"""A file or folder that gives an original layout away -> what it is, and the repository to use instead."""


def recognise(folder: Path) -> Checkpoint:
    """The row of the architecture in `folder`, with the folder's own configurations.

    Raises:
        ModelMissing: no configurations, an original layout, or an architecture that framefit does not run.
    """
    for name, (what, instead) in ORIGINALS.items():
        if (folder / name).exists():
            raise ModelMissing(f"{folder} holds {what}, which framefit does not read: use {instead}.")
    row = CHECKPOINTS[_row_id(folder)]
    if missing := [c.name for c in row.components if not (folder / c.name).is_dir()]:
        raise ModelMissing(f"{folder} looks like {row.title} and lacks the folder {', '.join(missing)}.")
    index = _read(folder / "model_index.json")
    return replace(
        row,
        id=folder.resolve().name,
        title=f"{row.title}, in {folder}",
        components=tuple(_component(c, folder / c.name) for c in row.components),
        boundary_ratio=index.get("boundary_ratio", row.boundary_ratio),
        folder=folder.resolve(),
    )


def _row_id(folder: Path) -> str:
    """Which row's architecture this is."""
    unet, transformer = _read(folder / "unet" / "config.json"), _read(folder / "transformer" / "config.json")
    if unet.get("_class_name") == "I2VGenXLUNet":
        return "i2vgen-xl"
    if transformer.get("_class_name") == "WanTransformer3DModel":
        return _wan_id(folder, transformer)
    if transformer.get("_class_name") == "EasyAnimateTransformer3DModel":
        return _easyanimate_id(folder, transformer)
    found = transformer.get("_class_name") or unet.get("_class_name")
    if found is None:
        raise ModelMissing(
            f"{folder} has no model configurations (transformer/config.json or unet/config.json): "
            f"give the folder of a diffusers-layout checkpoint, the one that holds model_index.json."
        )
    raise ModelMissing(
        f"{folder} holds a {found}, which is no image-to-video model that framefit runs (framefit models ls)."
    )


def _wan_id(folder: Path, transformer: dict[str, Any]) -> str:
    inputs, outputs = transformer.get("in_channels"), transformer.get("out_channels")
    if _read(folder / "model_index.json").get("expand_timesteps"):
        return "wan2.2-ti2v-5b"
    if inputs == outputs:
        raise ModelMissing(
            f"{folder} holds a Wan text-to-video model ({inputs} input channels): an image-to-video model has 36."
        )
    if transformer.get("image_dim"):
        shift = _read(folder / "scheduler" / "scheduler_config.json").get("flow_shift", 3.0)
        return "wan2.1-i2v-14b-720p" if shift > 4 else "wan2.1-i2v-14b-480p"
    return "wan2.2-i2v-a14b"


def _easyanimate_id(folder: Path, transformer: dict[str, Any]) -> str:
    if transformer.get("in_channels") != 33:
        raise ModelMissing(
            f"{folder} holds an EasyAnimate model with {transformer.get('in_channels')} input channels "
            f"(text-to-video or control): framefit runs the InP models, which have 33."
        )
    keys = {key for file in (folder / "transformer").glob("*.safetensors") for key in _shapes(file)}
    native = easyanimate_v5.is_native(keys)
    if transformer.get("text_embed_dim_t5"):
        if keys and not native:
            raise ModelMissing(
                f"{folder} holds EasyAnimate V5 under diffusers' names, which nobody publishes: "
                f"give the native folder of alibaba-pai/EasyAnimateV5-7b-zh-InP."
            )
        return "easyanimate-v5-7b-zh-inp"
    if native:
        raise ModelMissing(
            f"{folder} holds EasyAnimate V5.1 in upstream's native layout, which framefit does not read: "
            f"use alibaba-pai/EasyAnimateV5.1-7b-zh-InP-diffusers."
        )
    whole = transformer.get("mmdit_layers") == transformer.get("num_layers")
    return "easyanimate-v5.1-12b-inp" if whole else "easyanimate-v5.1-7b-inp"


def _component(row: Component, folder: Path) -> Component:
    config = next((_read(folder / name) for name in CONFIG_NAMES if (folder / name).is_file()), {})
    class_name = config.get("_class_name", row.class_name) if row.name == "scheduler" else row.class_name
    if row.name == "scheduler" and class_name not in SCHEDULERS[row.class_name]:
        raise ModelMissing(
            f"{folder} holds a {class_name}, and it should be {' or '.join(SCHEDULERS[row.class_name])}."
        )
    facts = {k: v for k, v in config.items() if not k.startswith("_")}
    params = sum(math.prod(shape) for file in folder.glob("*.safetensors") for shape in _shapes(file).values())
    source = f"{folder}, its own files"
    # a model without safetensors keeps the row's count: it has weights, and `needed_files` says that they are missing
    return replace(
        row, class_name=class_name, config=facts, params=(params or row.params) if row.params else 0, source=source
    )


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelMissing(f"{file} cannot be read as JSON ({error}): fetch it again.") from None
    if not isinstance(data, dict):
        raise ModelMissing(f"{file} holds no JSON object: fetch it again.")
    return data


def _shapes(file: Path) -> Shapes:
    shapes, wrong = header(file)
    if shapes is None or wrong:
        raise ModelMissing(f"{file} {wrong}: fetch it again.")
    return shapes
