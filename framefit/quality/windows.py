"""A video that was made in windows: whether it jumps where they join, and how far later ones go from the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from framefit.quality.fidelity import Frames
from framefit.quality.motion import motion
from framefit.quality.stability import LUMA, drift

__all__ = ["Windows", "measure", "spans"]

NEIGHBOURS = 8
"""Changes to each side that the one at a join is compared with."""
LEAST_CHANGE = 0.05
"""Grey levels; under this a change is rounding."""
LEAST_PX = 0.2
"""Motion a frame under which flow is noise."""

Spans = Sequence[tuple[int, int]]
"""The first frame of each window and the one behind its last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """A list has a figure for each window, against the first one, which has 0 or 1."""

    spans: tuple[tuple[int, int], ...]
    join: float
    """The change across a join over that of the frames around it, where it is most; 1 is nothing."""
    at: int
    """The frame behind that join."""
    colour: tuple[float, ...]
    """Distance of the mean colour, CIE 1976: 2.3 is just seen."""
    sharpness: tuple[float, ...]
    """Ratio of the mean step from pixel to pixel."""
    motion: tuple[float, ...]
    """Ratio of the mean motion a frame."""

    def __str__(self) -> str:
        return (
            f"made in {len(self.spans)} windows: where they join it changes up to {self.join:.2f} times as much as "
            f"beside (at frame {self.at}); the last is {self.colour[-1]:.1f} dE off the first in colour, "
            f"{self.sharpness[-1]:.2f} times as sharp, and moves {self.motion[-1]:.2f} times as much."
        )


def spans(parameters: Mapping[str, Any] | None, num_frames: int) -> tuple[tuple[int, int], ...]:
    """The frames that each window made, where the file says that there were windows of this video; else nothing."""
    try:
        found = tuple((int(start), int(stop)) for start, stop in (parameters or {})["windows"])
    except (KeyError, TypeError, ValueError):
        return ()
    ordered = all(0 <= start < stop for start, stop in found) and found == tuple(sorted(found))
    return found if len(found) > 1 and ordered and found[0][0] == 0 and found[-1][1] == num_frames else ()


def measure(frames: Frames, windows: Spans) -> Windows:
    """Of uint8 (F, H, W, 3).

    Raises:
        UsageError: scikit-image or OpenCV is not installed.
    """
    joins = sorted({start for start, _ in windows[1:]} | {stop for _, stop in windows[:-1]})
    ratio, at = max((_jump(frames, join, joins), join) for join in joins)
    parts = [frames[start:stop] for start, stop in windows]
    means = np.stack([part.mean((0, 1, 2), keepdims=True)[0] for part in parts])
    sharpness = [float(np.mean([np.abs(np.diff(frame @ LUMA)).mean() for frame in part])) for part in parts]
    moved = [max(motion(part).mean_px, LEAST_PX) for part in parts]
    return Windows(
        spans=tuple(windows), join=ratio, at=at, colour=tuple(drift(means)),
        sharpness=tuple((s + LEAST_CHANGE) / (sharpness[0] + LEAST_CHANGE) for s in sharpness),
        motion=tuple(px / moved[0] for px in moved),
    )  # fmt: skip


def _jump(frames: Frames, join: int, joins: Sequence[int]) -> float:
    """The change into frame `join` over the median of those around it that are at no join."""
    near = range(max(1, join - NEIGHBOURS), min(len(frames), join + NEIGHBOURS + 1))
    beside = [_change(frames, index) for index in near if index not in joins]
    usual = float(np.median(beside)) if beside else 0.0
    return (_change(frames, join) + LEAST_CHANGE) / (usual + LEAST_CHANGE)


def _change(frames: Frames, index: int) -> float:
    return float(np.abs(frames[index] @ LUMA - frames[index - 1] @ LUMA).mean())
