"""Is it a video at all: black, frozen, flat, seamed, or not numbers. Names what is wrong; repairs nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from framefit.quality.stability import Seam, seam
from framefit.quality.tiles import Borders, measure

__all__ = ["SEAM", "Watch", "findings"]

BLACK_LEVEL = 8
"""Grey level, of 255, under which nothing is seen."""
SAME_LEVELS = 0.1
"""Mean difference of two frames, grey levels, under which they are one."""
FROZEN_LEVELS = 0.3
"""The same, mean over a video, under which nothing moves in it: an encoder stirs a frozen one by less."""
FLAT_LEVELS = 1.0
"""Deviation inside a frame, grey levels, under which it shows nothing."""


LINES = 240
"""Of a frame, as many as are looked at while it goes by: enough for all of the above."""
SEAM = "a seam"
"""How a finding begins that says so."""
SEAM_RATIO = 3.0
"""Step over that of the lines beside it, from which a line between tiles is seen."""
SEAM_FRAMES = 4
"""One frame of so many is looked at for seams, which stay where they are."""

Frame = npt.NDArray[np.uint8] | npt.NDArray[np.floating]


def findings(frames: Frame) -> list[str]:
    """Sentences for a person, none for a sound video. Seams are not looked for: an edge of the scene may be one.

    Args:
        frames: (F, H, W, 3), uint8 or float in [0, 1].
    """
    watch = Watch()
    for frame in frames:
        watch.see(frame)
    return watch.findings()


@dataclass(slots=True)
class Watch:
    """Looks at a video frame by frame, as it goes by."""

    thin: bool = False
    """Whether some lines of a large frame stand for all."""
    seams: bool = False
    """Whether to look for lines between tiles."""
    borders: Borders = field(default_factory=dict)
    """Where these would be; nothing: anywhere."""
    _black: list[bool] = field(default_factory=list)
    _flat: list[bool] = field(default_factory=list)
    _broken: list[bool] = field(default_factory=list)
    _changes: list[float] = field(default_factory=list)
    """Of each frame from the one before."""
    _before: Any = None
    _kept: list[Any] = field(default_factory=list)

    def see(self, frame: Frame) -> None:
        """The next frame, (H, W, 3), uint8 or float in [0, 1]."""
        if self.seams and len(self._black) % SEAM_FRAMES == 0:
            self._kept.append(frame)
        every = max(1, min(frame.shape[:2]) // LINES) if self.thin else 1
        frame = frame[::every, ::every]
        floating = np.issubdtype(frame.dtype, np.floating)
        broken = floating and not np.isfinite(frame).all()
        levels = np.zeros(frame.shape, np.float32) if broken else frame.astype(np.float32) * (255 if floating else 1)
        self._broken.append(bool(broken))
        self._black.append(bool(levels.max() <= BLACK_LEVEL))
        self._flat.append(not self._black[-1] and bool(levels.std((0, 1)).max() < FLAT_LEVELS))
        if self._before is not None:
            self._changes.append(float(np.abs(levels - self._before).mean()))
        self._before = levels

    def findings(self) -> list[str]:
        """Of all frames so far."""
        if broken := _numbers(self._broken):
            return [f"not numbers (NaN or infinity): {broken}"]
        named = {"black": self._black, "of one colour": self._flat}
        found = [f"{word}: {listed}" for word, which in named.items() if (listed := _numbers(which))]
        if self._changes and np.mean(self._changes) < FROZEN_LEVELS:
            found.append(f"frozen: all {len(self._black)} frames are the same")
        elif listed := _numbers([False, *(change < SAME_LEVELS for change in self._changes)]):
            found.append(f"the same as the one before: {listed}")
        return found + self._seam()

    def _seam(self) -> list[str]:
        if not self._kept:
            return []
        kept = np.stack(self._kept)
        if self.borders:
            met = measure(kept, self.borders)
            usual, worst = met.usual, Seam(ratio=met.seam, axis=met.axis, at_px=met.at_px)
        else:
            worst = seam(kept)
            usual = worst.ratio
        if usual < SEAM_RATIO:
            return []
        return [f"{SEAM}: a line at {worst.axis}={worst.at_px} stands out {worst.ratio:.1f}-fold"]


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
