"""How much a video moves, and whereto: dense optical flow between neighbouring frames.

Source: Kroeger et al. 2016, arXiv 1603.03590 (DIS), as OpenCV computes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from framefit.errors import UsageError
from framefit.quality.fidelity import Frames

__all__ = ["Motion", "motion"]

WORKING_PX = 384
"""The longer side is shrunk to this: flow of large pictures is slow and no better in the mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Motion:
    """Means over all pixels, px of the video a frame."""

    magnitude_px: tuple[float, ...]
    """For each pair of neighbouring frames."""
    dx_px: float
    """Of the content, over all pairs; right is positive."""
    dy_px: float
    """Down is positive."""

    @property
    def mean_px(self) -> float:
        return float(np.mean(self.magnitude_px)) if self.magnitude_px else 0.0

    @property
    def direction_degrees(self) -> float:
        """0 is right, 90 is down."""
        return math.degrees(math.atan2(self.dy_px, self.dx_px)) % 360


def motion(frames: Frames) -> Motion:
    """Of uint8 (F, H, W, 3); a video of one frame does not move.

    Raises:
        UsageError: OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError:
        raise UsageError("motion needs OpenCV: pip install 'framefit[quality]'.") from None
    height, width = frames.shape[1:3]
    shrink = min(1.0, WORKING_PX / max(height, width))
    size = (max(16, round(width * shrink)), max(16, round(height * shrink)))
    small = [cv2.resize(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_AREA) for f in frames]
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    scale = np.array([width / size[0], height / size[1]])
    fields = [flow.calc(one, other, None) * scale for one, other in pairwise(small)]  # type: ignore[call-overload]
    mean = np.mean([field.mean((0, 1)) for field in fields], axis=0) if fields else np.zeros(2)
    return Motion(
        magnitude_px=tuple(float(np.linalg.norm(field, axis=-1).mean()) for field in fields),
        dx_px=float(mean[0]),
        dy_px=float(mean[1]),
    )
