"""What should not change, and does: brightness from frame to frame, colour over the video, the line between tiles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from framefit.errors import UsageError
from framefit.quality.fidelity import Frames

__all__ = ["Seam", "drift", "flicker", "outliers", "seam"]

LUMA = np.array([0.2126, 0.7152, 0.0722])
"""BT.709."""
BLOCKS = 8
"""A side: what is smaller moves, what is larger flickers together."""
NEIGHBOURS = 8
"""Lines to each side that a seam is compared with."""
LEAST_STEP = 0.05
"""Grey levels; under this a step is rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seam:
    """The line that stands out most."""

    ratio: float
    """Its mean step over that of the lines beside it; 1 is nothing, and from about 3 a seam is seen."""
    axis: str
    """x for a vertical line, y for a horizontal one."""
    at_px: int
    """The first pixel behind it."""


def flicker(frames: Frames) -> list[float]:
    """For each inner frame, how far the brightness of blocks is from the mean of the frames around it, grey levels.

    A steady fade or pan changes a block evenly and counts for nothing.
    """
    if len(frames) < 3:
        return []
    light = np.stack([_block_means(frame @ LUMA) for frame in frames])
    bends = light[1:-1] - (light[:-2] + light[2:]) / 2
    return [float(np.sqrt(np.mean(np.square(bend)))) for bend in bends]


def drift(frames: Frames) -> list[float]:
    """Of each frame's mean colour from the first one's, CIE 1976 colour difference: 2.3 is just seen.

    Raises:
        UsageError: scikit-image is not installed.
    """
    try:
        from skimage.color import rgb2lab
    except ImportError:
        raise UsageError("colour drift needs scikit-image: pip install 'framefit[quality]'.") from None
    means = np.stack([frame.mean((0, 1)) for frame in frames]) / 255
    lab = rgb2lab(means[None])[0]
    return [float(distance) for distance in np.linalg.norm(lab - lab[0], axis=1)]


def seam(frames: Frames, reference: Frames | None = None) -> Seam:
    """The strongest straight line across the whole video; of the difference to `reference` where there is one.

    Edges of the scene are no seams: with a reference they cancel, without one a still picture of a building has some.
    """
    ratios = outliers(frames, reference)
    axis = max(ratios, key=lambda axis: float(ratios[axis].max()))
    at = int(ratios[axis].argmax())
    return Seam(ratio=float(ratios[axis][at]), axis=axis, at_px=at + 1)


def outliers(frames: Frames, reference: Frames | None = None) -> dict[str, npt.NDArray[np.float64]]:
    """Axis -> for every line but the first, the mean step onto it over the median of its neighbours'; as `seam`."""
    steps = {axis: np.zeros(side - 1) for axis, side in (("x", frames.shape[2]), ("y", frames.shape[1]))}
    for index, frame in enumerate(frames):
        light = frame @ LUMA - (reference[index] @ LUMA if reference is not None else 0)
        steps["x"] += np.abs(np.diff(light, axis=1)).mean(0) / len(frames)
        steps["y"] += np.abs(np.diff(light, axis=0)).mean(1) / len(frames)
    return {axis: _ratios(line) for axis, line in steps.items()}


def _block_means(light: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    rows, columns = (np.linspace(0, side, min(BLOCKS, side) + 1).astype(int)[:-1] for side in light.shape)
    sums = np.add.reduceat(np.add.reduceat(light, rows, axis=0), columns, axis=1)
    counts = np.outer(np.diff([*rows, light.shape[0]]), np.diff([*columns, light.shape[1]]))
    means: npt.NDArray[np.float64] = sums / counts
    return means


def _ratios(steps: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    padded = np.pad(steps, NEIGHBOURS, mode="reflect" if len(steps) > NEIGHBOURS else "edge")
    around = np.lib.stride_tricks.sliding_window_view(padded, 2 * NEIGHBOURS + 1)
    ratios: npt.NDArray[np.float64] = (steps + LEAST_STEP) / (np.median(around, axis=1) + LEAST_STEP)
    return ratios
