"""Is it a video at all: black, frozen, empty of detail, or not numbers. Names what is wrong; repairs nothing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["findings"]

BLACK_LEVEL = 8
"""Grey level, of 255, under which nothing is seen."""
SAME_LEVELS = 0.1
"""Mean difference of two frames, grey levels, under which they are one."""
FLAT_LEVELS = 1.0
"""Deviation inside a frame, grey levels, under which it shows nothing."""


def findings(frames: npt.NDArray[np.uint8] | npt.NDArray[np.floating]) -> list[str]:
    """Sentences for a person, none for a sound video.

    Args:
        frames: (F, H, W, 3), uint8 or float in [0, 1].
    """
    if np.issubdtype(frames.dtype, np.floating):
        if broken := _numbers(~np.isfinite(frames).all((1, 2, 3))):
            return [f"not numbers (NaN or infinity): {broken}"]
        frames = frames * 255
    frames = frames.astype(np.float32)
    found = []
    black = frames.max((1, 2, 3)) <= BLACK_LEVEL
    flat = (frames.std((1, 2)).max(1) < FLAT_LEVELS) & ~black
    for word, which in (("black", black), ("of one colour", flat)):
        if listed := _numbers(which):
            found.append(f"{word}: {listed}")
    if len(frames) > 1:
        changes = np.array([np.abs(b - a).mean() for a, b in pairwise(frames)])
        if (changes < SAME_LEVELS).all():
            found.append(f"frozen: all {len(frames)} frames are the same")
        elif listed := _numbers(np.array([False, *(changes < SAME_LEVELS)])):
            found.append(f"the same as the one before: {listed}")
    return found


def _numbers(which: Any) -> str:
    """Frames by number, runs of neighbours as one; `which` is boolean, (F,)."""
    runs: list[list[int]] = []
    for number in np.flatnonzero(which).tolist():
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ("frame " if runs and sum(which) == 1 else "frames ") * bool(runs) + ", ".join(
        "-".join(map(str, run)) for run in runs
    )
