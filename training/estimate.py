"""The motion of the camera between two frames, measured from the pixels alone: it knows nothing of how they were made.

Candidates come from features and from phase correlation under a coarse grid of zooms and rolls, and identity is one;
each of the likely ones is refined, and the one that aligns the frames best is kept. Signs are those of
`training.motion`: of the camera. Needs OpenCV (opencv-python-headless), which framefit itself does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from training.motion import LIGHT, PAN_PX, ROLL_DEGREES, SPEEDS, ZOOM, Motion, find, to_scene

__all__ = ["MIN_CONFIDENCE", "STILL_PX", "Estimate", "agrees", "classify", "estimate", "warp"]

Image = npt.NDArray[np.uint8]
Grey = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float64]
"""2x3: a pixel of the second frame -> the place in the first frame that it shows."""
Mask = npt.NDArray[np.bool_]

STILL_PX = 1.0
"""A camera under this displacement everywhere in the picture stands still."""
MIN_CONFIDENCE = 0.7
"""Frames that correlate less, after alignment, show no motion that can be named: unrelated photos reach 0.5."""
THRESHOLD = 0.4 * SPEEDS["slow"]
"""Share of the normal speed that a component needs to count."""
UNASKED_SHARE = 0.5

ZOOMS = (-0.3, -0.15, 0.0, 0.15, 0.3)
ROLLS = (-12.0, -6.0, 0.0, 6.0, 12.0)
REFINED = 6
"""Candidates that are refined: the rest of them are far off."""
ECC_BLURS = (21, 5)
"""Sides of the Gaussian, px: the wide one draws near what is far off, the narrow one makes it exact."""
MIN_VISIBLE = 0.25
"""Share of the picture that a candidate must leave visible: a small piece correlates with many places."""
MAX_ZOOM = 0.6
RATIO = 0.8
"""Of the distances to the nearest and the second feature; source: Lowe, IJCV 60(2), 2004, section 7.1."""
BLUR_PX = 1.0
"""Deviation of the Gaussian before frames are compared: noise and lost detail are no motion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """How the camera moved from the first frame to the second, in all; fields mean what they do in `Motion`."""

    width: int
    height: int
    pan_x: float = 0.0
    """px; right is positive"""
    pan_y: float = 0.0
    """px; down is positive"""
    zoom: float = 0.0
    """log of the magnification; in is positive"""
    roll: float = 0.0
    """degrees; clockwise is positive"""
    light: float = 0.0
    """log of the gain; brighter is positive"""
    confidence: float = 1.0
    """Correlation of the aligned frames where both are visible, -1 to 1; 0 where the picture is flat."""

    @property
    def displacement_px(self) -> float:
        """Mean over the picture of how far a point moved."""
        return float(_displacements(self).mean())

    @property
    def largest_px(self) -> float:
        """The most that any point moved, the corners included."""
        return float(_displacements(self).max())

    @property
    def total(self) -> Motion:
        """The same over an interval of one frame."""
        return Motion(pan_x=self.pan_x, pan_y=self.pan_y, zoom=self.zoom, roll=self.roll, light=self.light)


def estimate(first: Image, second: Image) -> Estimate:
    """The camera's motion from `first` to `second`, uint8 RGB (H, W, 3) of one size.

    Made for pans up to a fifth of the width, zooms from 0.7 to 1.4 times, rolls up to 13 degrees and any of them
    together, on frames that may be soft, noisy, brighter or darker. What cannot be aligned has a low `confidence`.
    """
    if first.shape != second.shape:
        raise ValueError(f"the frames are {first.shape} and {second.shape}, and must have one size.")
    before, after = _grey(first), _grey(second)
    likely = sorted(_candidates(first, second), key=lambda matrix: -_correlation(before, after, matrix))[:REFINED]
    matrices = [np.eye(2, 3), *likely, *(_refined(before, after, matrix) for matrix in (np.eye(2, 3), *likely))]
    best = max(matrices, key=lambda matrix: _correlation(before, after, matrix))
    found = replace(_from_matrix(best, *_size(first)), confidence=_correlation(before, after, best))
    return replace(found, light=_gain(before, after, best))


def classify(estimate: Estimate, num_frames: int) -> str:
    """Kind and direction of the motion over `num_frames` frames.

    "still" (under `STILL_PX` everywhere), the directions that are at least 40 % as fast as the slow motions of the
    catalogue, joined by "+" (pan-left, roll-right, pan-left+zoom-in), or "unclear" for what is neither, and for frames
    that do not align.
    """
    if estimate.confidence < MIN_CONFIDENCE:
        return "unclear"
    if estimate.largest_px < STILL_PX:
        return "still"
    least, total = _least(num_frames), estimate.total
    words = {
        "pan_x": ("pan-left", "pan-right"),
        "pan_y": ("pan-up", "pan-down"),
        "zoom": ("zoom-out", "zoom-in"),
        "roll": ("roll-left", "roll-right"),
    }
    found = [
        words[name][getattr(total, name) > 0] for name in words if abs(getattr(total, name)) >= getattr(least, name)
    ]
    return "+".join(found) or "unclear"


def agrees(estimate: Estimate, name: str, num_frames: int) -> bool:
    """Whether the motion called `name` in the catalogue was seen over `num_frames` frames: its kind and direction.

    - Every component that `name` has (pan_x, pan_y, zoom, roll, light) has its sign, and at least 40 % of the speed
      that its slow form has; how fast beyond that is not judged.
    - The camera's other components, as a displacement of the picture, move its points by less than half of what the
      asked ones do, both on the mean over the picture. Light that was not asked for is not judged.
    - Where no motion of the camera is asked for (still, darken, brighten), no point moves by 1 px.
    - The aligned frames correlate by at least `MIN_CONFIDENCE`.

    Raises:
        ValueError: `name` moves an object, which an estimate of the whole picture cannot tell.
    """
    asked = find(name)
    if asked.object_x or asked.object_y:
        raise ValueError(f"{name} moves an object, and only motions of the camera are estimated.")
    if estimate.confidence < MIN_CONFIDENCE:
        return False
    total, least = estimate.total, _least(num_frames)
    names = [name for name, value in _components(asked).items() if value]
    for name in names:
        if getattr(total, name) * math.copysign(1, getattr(asked, name)) < getattr(least, name):
            return False
    if set(names) <= {"light"}:
        return estimate.largest_px < STILL_PX
    others = [name for name in _components(asked) if name not in names]
    return _without(estimate, names).displacement_px < UNASKED_SHARE * _without(estimate, others).displacement_px


def warp(photo: Image, estimate: Estimate) -> tuple[Image, Mask]:
    """The first frame as the moved camera sees it, and where it is visible; its light stays as it was."""
    matrix = _to_matrix(estimate)
    size = (estimate.width, estimate.height)
    # clipping replaces what bicubic overshoots; the border is outside of the mask
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    warped = cv2.warpAffine(photo, matrix, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(warped, np.uint8), _visible(matrix, *size)


def _components(motion: Motion) -> dict[str, float]:
    return {name: getattr(motion, name) for name in ("pan_x", "pan_y", "zoom", "roll", "light")}


def _without(estimate: Estimate, components: list[str]) -> Estimate:
    return Estimate(**(asdict(estimate) | dict.fromkeys(components, 0.0)))


def _least(num_frames: int) -> Motion:
    """The least of each component that counts as seen."""
    scale = THRESHOLD * (num_frames - 1)
    return Motion(
        pan_x=PAN_PX * scale, pan_y=PAN_PX * scale, zoom=ZOOM * scale, roll=ROLL_DEGREES * scale, light=-LIGHT * scale
    )


def _size(image: npt.NDArray[Any]) -> tuple[int, int]:
    return image.shape[1], image.shape[0]


def _grey(image: Image) -> Grey:
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return np.asarray(cv2.GaussianBlur(grey, (0, 0), BLUR_PX), np.float32)


def _displacements(estimate: Estimate) -> npt.NDArray[np.float64]:
    """How far each point moved, px; on a grid that has the corners."""
    x, y = _grid(estimate.width, estimate.height)
    matrix = _centred(estimate)
    return np.asarray(np.hypot(*(matrix[:, :2] @ np.stack([x, y]) + matrix[:, 2:] - np.stack([x, y]))), np.float64)


@cache
def _grid(width: int, height: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    x, y = np.meshgrid(np.linspace(-0.5, 0.5, 33) * (width - 1), np.linspace(-0.5, 0.5, 33) * (height - 1))
    return x.ravel(), y.ravel()


def _centred(estimate: Estimate) -> Matrix:
    """The motion about the picture's centre; `to_scene` is the one definition of its signs."""
    total = estimate.total
    (tx, ty), (ax, ay), (bx, by) = (to_scene(total, 1, x, y) for x, y in ((0, 0), (1, 0), (0, 1)))
    return np.array([[ax - tx, bx - tx, tx], [ay - ty, by - ty, ty]])


def _to_matrix(estimate: Estimate) -> Matrix:
    matrix = _centred(estimate)
    centre = np.array([(estimate.width - 1) / 2, (estimate.height - 1) / 2])
    return np.column_stack([matrix[:, :2], matrix[:, 2] + centre - matrix[:, :2] @ centre])


def _from_matrix(matrix: Matrix, width: int, height: int) -> Estimate:
    """The inverse of `_to_matrix`; of a matrix that is no similarity, the nearest one."""
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    pan = matrix[:, :2] @ centre + matrix[:, 2] - centre
    cos, sin = (matrix[0, 0] + matrix[1, 1]) / 2, (matrix[1, 0] - matrix[0, 1]) / 2
    return Estimate(
        width=width,
        height=height,
        pan_x=float(pan[0]),
        pan_y=float(pan[1]),
        zoom=-math.log(max(math.hypot(cos, sin), 1e-6)),
        roll=math.degrees(math.atan2(sin, cos)),
    )


def _candidates(first: Image, second: Image) -> Iterator[Matrix]:
    before, after = _grey(first), _grey(second)
    if (found := _by_features(first, second)) is not None:
        yield found
    for zoom in ZOOMS:
        for roll in ROLLS:
            yield _by_phase(before, after, zoom, roll)


def _by_features(first: Image, second: Image) -> Matrix | None:
    """The similarity that most SIFT features agree on; None where there are too few of them."""
    detector = cv2.SIFT.create(contrastThreshold=0.01)  # soft and dark frames have weak features only
    points, descriptors = zip(*(_features(detector, image) for image in (first, second)), strict=True)
    if any(d is None or len(d) < 2 for d in descriptors):
        return None
    pairs = cv2.BFMatcher().knnMatch(descriptors[1], descriptors[0], k=2)
    good = [best for best, other in pairs if best.distance < RATIO * other.distance]
    if len(good) < 4:
        return None
    source = np.array([points[1][match.queryIdx].pt for match in good])
    target = np.array([points[0][match.trainIdx].pt for match in good])
    matrix, _ = cv2.estimateAffinePartial2D(source, target, ransacReprojThreshold=1.5, maxIters=5000)
    return None if matrix is None else np.asarray(matrix, np.float64)


def _features(detector: Any, image: Image) -> tuple[Any, Any]:
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    bright = cv2.convertScaleAbs(grey, alpha=255 / max(int(grey.max()), 1))
    points, descriptors = detector.detectAndCompute(bright, None)
    return points, descriptors


def _by_phase(before: Grey, after: Grey, zoom: float, roll: float) -> Matrix:
    """The pan that goes best with a zoom and a roll."""
    width, height = _size(before)
    start = Estimate(width=width, height=height, zoom=zoom, roll=roll)
    moved = _moved(before, _to_matrix(start))
    (dx, dy), _ = cv2.phaseCorrelate(moved, after, _window(width, height))
    # what moved by (dx, dy) was seen (-dx, -dy) from there, in the directions of the turned picture
    matrix = _centred(start)[:, :2] @ np.array([-dx, -dy])
    return _to_matrix(replace(start, pan_x=float(matrix[0]), pan_y=float(matrix[1])))


@cache
def _window(width: int, height: int) -> Grey:
    return np.asarray(cv2.createHanningWindow((width, height), cv2.CV_32F), np.float32)


def _refined(before: Grey, after: Grey, start: Matrix) -> Matrix:
    """The similarity near `start` with the best correlation; `start` where there is none."""
    whole = np.full(before.shape, 255, np.uint8)
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 60, 1e-6)
    matrix: npt.NDArray[Any] = start.astype(np.float32)
    try:
        for blur in ECC_BLURS:
            _, matrix = cv2.findTransformECC(after, before, matrix, cv2.MOTION_AFFINE, criteria, whole, blur)
    except cv2.error:  # it did not converge
        return start
    return _to_matrix(_from_matrix(np.asarray(matrix, np.float64), *_size(before)))


def _moved(image: Grey, matrix: Matrix) -> Grey:
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.asarray(
        cv2.warpAffine(image, matrix, _size(image), flags=flags, borderMode=cv2.BORDER_REPLICATE), np.float32
    )


def _visible(matrix: Matrix, width: int, height: int) -> Mask:
    """Where the moved camera shows what the first frame showed."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    u, v = (row[0] * x + row[1] * y + row[2] for row in matrix)
    # a hundredth of a pixel, or rounding would hide the border of a picture that stands still
    return np.asarray((u >= -0.01) & (u <= width - 0.99) & (v >= -0.01) & (v <= height - 0.99), np.bool_)


def _correlation(before: Grey, after: Grey, matrix: Matrix) -> float:
    """Of the aligned frames where both are visible; -1 for a motion out of the range that is measured."""
    visible = _visible(matrix, *_size(before))
    if visible.mean() < MIN_VISIBLE or abs(_from_matrix(matrix, *_size(before)).zoom) > MAX_ZOOM:
        return -1.0
    one, other = _moved(before, matrix)[visible], after[visible]
    one, other = one - one.mean(), other - other.mean()
    scale = math.sqrt(float(one @ one) * float(other @ other))
    return float(one @ other) / scale if scale > one.size * 1e-3 else 0.0


def _gain(before: Grey, after: Grey, matrix: Matrix) -> float:
    """Log of how much brighter the second frame is, by what neither frame has burnt out."""
    one = _moved(before, matrix)
    usable = _visible(matrix, *_size(before)) & (one < 250) & (after < 250)
    return math.log((float(after[usable].sum()) + 1) / (float(one[usable].sum()) + 1))
