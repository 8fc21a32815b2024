"""The model that the package ships, so that the whole road can be seen without a download.

Wan2.2-I2V-A14B's architecture made small and trained on moved photos; how is in training/, what it can do in its card.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from framefit.families.checkpoint import Checkpoint, Frames, Sizes
from framefit.families.folder import recognise

__all__ = ["FOLDER", "TINY", "tiny"]

TINY = "tiny"
FOLDER = Path(__file__).parents[1] / "models" / TINY


def tiny() -> Checkpoint:
    """Its row: the components' facts from its files, and what it was trained for."""
    return replace(
        recognise(FOLDER),
        id=TINY,
        title="Small model in the package: camera moves over any photo",
        repo="",
        licence="Apache-2.0",
        download_bytes=0,
        sizes=Sizes(
            multiple=16, default=(384, 256), named=((384, 256), (256, 384), (320, 320)),
            max_area=512 * 512, min_side=64,
        ),
        frames=Frames(stride=4, default=17, trained=17, most=81),
        fps=8,
        steps=16,
        guidance=(2.0, 2.0),
        negative_prompt="",
        max_tokens=64,
        last_image=False,
        shifts=(),
        presets={
            "draft": {"steps": 4, "guidance": (1.0,), "loras": ("few_step.safetensors",)},
            "standard": {"steps": 16, "guidance": (2.0,)},
        },
        bundled=True,
    )  # fmt: skip
