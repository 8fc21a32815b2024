"""What a row of facts is made of. A row says everything that can be known of a model without its weights.

Nothing here imports torch: listing models, refusing a size and planning read rows only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from framefit.errors import BadInput

__all__ = ["Checkpoint", "Component", "Frames", "Sizes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Component:
    """One folder of a checkpoint: a model, a tokenizer, an image processor or a scheduler."""

    name: str
    """Folder name in the diffusers layout, e.g. "transformer_2"."""
    package: Literal["diffusers", "transformers"]
    class_name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    """Constructor configuration of the full-size component (its class's defaults where a key is absent)."""
    params: int = 0
    """Parameters at full size; 0 where there are none (tokenizers, processors, schedulers)."""
    source: str = ""
    """Where the configuration and the count come from."""
    keep_fp32: bool = False
    """Stays in fp32 whatever the plan's precision (the authors advise it, e.g. Wan's VAE)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Which frame sizes a model takes: multiples of `multiple` pixels within an area that it was trained for."""

    multiple: int
    default: tuple[int, int]
    """(width, height) of the authors' default; its area is kept when the aspect follows the photo."""
    named: tuple[tuple[int, int], ...]
    """The sizes the authors name, for messages and tables."""
    max_area: int
    min_side: int

    def refuse(self, width: int, height: int) -> str | None:
        """Why (width, height) is not legal, with the two nearest legal sizes; None where it is legal."""
        if self._legal(width, height):
            return None
        near = " or ".join(f"{w}x{h}" for w, h in self.nearest(width, height))
        return (
            f"{width}x{height} is not a size of this model (sides in multiples of {self.multiple} px from "
            f"{self.min_side} px, area up to {self.max_area:,} px): the nearest are {near}"
        )

    def nearest(self, width: int, height: int) -> list[tuple[int, int]]:
        """The two legal sizes nearest to (width, height), by relative change of both sides."""
        shrink = min(1.0, math.sqrt(self.max_area / (width * height)))
        most = self.max_area / self.min_side
        sides = [self._around(min(side * shrink, most)) for side in (width, height)]
        legal = [(w, h) for w in sides[0] for h in sides[1] if self._legal(w, h)]
        return sorted(legal, key=lambda s: abs(math.log(s[0] / width)) + abs(math.log(s[1] / height)))[:2]

    def for_aspect(self, aspect: float, area: int | None = None) -> tuple[int, int]:
        """The legal size nearest to `aspect` (width / height) with about the area of `area`, never above it by a row.

        Ties and near ties go to the larger area, so that a 16:9 photo gives the authors' own 1280x720.
        """
        area = min(area or math.prod(self.default), self.max_area)
        aspect = min(max(aspect, self.min_side**2 / area), area / self.min_side**2)
        ideal = math.sqrt(area * aspect), math.sqrt(area / aspect)
        legal = [(w, h) for w in self._around(ideal[0]) for h in self._around(ideal[1]) if self._legal(w, h)]
        within = [s for s in legal if math.prod(s) <= area] or legal
        return min(within, key=lambda s: abs(math.log(s[0] / s[1] / aspect)) + abs(math.log(math.prod(s) / area)))

    def _legal(self, width: int, height: int) -> bool:
        whole = width % self.multiple == 0 and height % self.multiple == 0
        return whole and min(width, height) >= self.min_side and width * height <= self.max_area

    def _around(self, side: float) -> list[int]:
        """Whole multiples near `side`: two below, two above, none under the least."""
        low = int(max(side, self.min_side) // self.multiple) * self.multiple
        steps = (low + k * self.multiple for k in (-1, 0, 1, 2))
        return [step for step in steps if step >= self.min_side]


@dataclass(frozen=True, kw_only=True, slots=True)
class Frames:
    """Which frame counts a model takes: k * stride + 1 (stride 1: any), from 1 to `most`."""

    stride: int
    default: int
    trained: int
    """Length of the training videos; more is possible and drifts."""
    most: int

    def check(self, num_frames: int) -> None:
        if num_frames > self.most:
            raise BadInput(f"{num_frames} frames were asked for; this model takes at most {self.most}.")
        if (num_frames - 1) % self.stride:
            low = (num_frames - 1) // self.stride * self.stride + 1
            raise BadInput(
                f"{num_frames} frames were asked for; this model takes {self.stride}n+1: "
                f"use {low} or {min(low + self.stride, self.most)}."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A row: one published model, or a local folder of the same architecture."""

    id: str
    family: Literal["wan", "easyanimate", "i2vgen"]
    title: str
    repo: str
    """Hub repository id."""
    licence: str
    download_bytes: int
    """Size of the files that a run needs, as published."""
    components: tuple[Component, ...]
    sizes: Sizes
    frames: Frames
    fps: float
    steps: int
    guidance: tuple[float, ...]
    negative_prompt: str
    max_tokens: int
    """Prompt length the text encoder takes, special tokens included."""
    last_image: bool
    """Whether an end image can be given."""
    layout: Literal["diffusers", "easyanimate-v5"] = "diffusers"
    boundary_ratio: float | None = None
    """Timesteps from this share of the training range upwards belong to `transformer`, the rest to `transformer_2`."""
    first_frame_clean: bool = False
    """Whether the photo is the first latent frame itself, with a timestep per token (`expand_timesteps`)."""
    shifts: tuple[tuple[int, float], ...] = ()
    """(area in pixels up to which it holds, flow shift); empty: the scheduler's own."""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """`--preset` name -> Request fields; `loras` are names of files in `folder`."""
    batched_guidance: bool = True
    """Whether the reference runs both guidance branches in one forward."""
    caution: str = ""
    """Said before every run."""
    folder: Path | None = None
    """Where the weights lie; None: in the hub's cache."""
    bundled: bool = False
    """Whether `folder` is a part of framefit, and not the user's own."""

    def __getitem__(self, name: str) -> Component:
        return next(c for c in self.components if c.name == name)

    def __contains__(self, name: str) -> bool:
        return any(c.name == name for c in self.components)

    @property
    def experts(self) -> tuple[str, ...]:
        """The denoisers' folder names, the one for high noise first."""
        return tuple(c.name for c in self.components if c.name in ("transformer", "transformer_2", "unet"))

    @property
    def params(self) -> int:
        return sum(c.params for c in self.components)

    def shift(self, width: int, height: int) -> float | None:
        """The authors' flow shift at this size; None: the scheduler's own."""
        return next((shift for area, shift in self.shifts if width * height <= area), None)
