"""Two videos side by side: every metric, frame by frame, and whether the result is good enough.

The first video is ours, the second the reference that it should equal. Metrics whose package or weights are missing are
named with the reason, never left out silently.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from framefit import video
from framefit.errors import BadInput, UsageError
from framefit.quality import fidelity, stability, tiles, windows
from framefit.quality.fidelity import Frames
from framefit.quality.motion import motion
from framefit.quality.sanity import findings
from framefit.quality.tiles import Tiles
from framefit.quality.windows import Windows

__all__ = ["METRICS", "Comparison", "Metric", "Score", "beyond", "compare", "load"]

THUMBNAIL_PX = 32
STILL_PX = 0.2
"""Mean motion a frame under which flow is noise."""
MOST_SHIFT = 4
"""Frames that videos of one length are tried at, to say that one lags."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What one metric says."""

    value: float
    """The figure that a bar is held against: a mean over frames, unless the metric says otherwise."""
    per_frame: tuple[float, ...] = ()
    """Empty where the metric has one figure for the video."""
    first: int = 0
    """The frame that `per_frame` begins with."""
    detail: dict[str, float | str] = field(default_factory=dict)
    """What a person wants to know beside it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    measure: Callable[[Frames, Frames, Path | None], Score]
    """Ours, the reference, LPIPS's weights."""
    better: Literal["higher", "lower", "one"]
    """lower: a bar is the most that is allowed."""
    unit: str
    says: str
    """What it is, for the table and the docs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    ours: Path
    reference: Path
    width: int
    height: int
    num_frames: int
    """That were compared."""
    lengths: tuple[int, int]
    """Frames of ours and of the reference."""
    first: tuple[int, int]
    """The first frame compared of either."""
    scores: dict[str, Score]
    missing: dict[str, str]
    """Metric -> why it was not measured."""
    faults: tuple[tuple[str, ...], tuple[str, ...]]
    """What is wrong with ours, and with the reference, by itself."""
    lag: int
    """Frames that ours would have to begin later to fit much better, for videos of one length; mostly 0."""
    windows: Windows | None = None
    """Of ours, where it was made in windows and they can be measured."""
    tiles: Tiles | None = None
    """Of ours, where it was made in tiles that differ."""

    @property
    def notes(self) -> list[str]:
        """Faults and lag as sentences."""
        pairs = zip((self.ours, self.reference), self.faults, strict=True)
        said = [f"{path}: {fault}" for path, faults in pairs for fault in faults]
        if self.lengths[0] != self.lengths[1]:
            (one, other), (start, begin) = self.lengths, self.first
            said.append(
                f"{self.ours} has {one} frames and {self.reference} {other}: {self.num_frames} were compared, from "
                f"frame {start} and from frame {begin}."
            )
        if self.lag:
            when = "later" if self.lag > 0 else "earlier"
            said.append(f"{self.ours} would fit {self.reference} better {abs(self.lag)} frames {when}.")
        if self.windows:
            said.append(f"{self.ours} was {self.windows}")
        if self.tiles:
            said.append(f"{self.ours} was {self.tiles}")
        return said

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ours": str(self.ours), "reference": str(self.reference)}


def compare(
    ours: Path,
    reference: Path,
    *,
    metrics: Iterable[str] | None = None,
    required: Collection[str] = (),
    lpips_weights: Path | None = None,
) -> Comparison:
    """Measure `ours` against `reference` by `metrics`, or by all.

    Raises:
        BadInput: a file that is no video, or two of different sizes.
        UsageError: a metric in `required` cannot be measured.
    """
    a, b = load(ours), load(reference)
    if a.shape[1:] != b.shape[1:]:
        (ah, aw), (bh, bw) = a.shape[1:3], b.shape[1:3]
        raise BadInput(f"{ours} is {aw}x{ah} and {reference} is {bw}x{bh}: metrics need one size, so make both at it.")
    faults, lengths = (tuple(findings(a)), tuple(findings(b))), (len(a), len(b))
    scores: dict[str, Score] = {}
    missing: dict[str, str] = {}
    joined = _windows(ours, a, missing)
    first, lag = _alignment(a, b)
    a, b = a[first[0] :], b[first[1] :]
    count = min(len(a), len(b))
    a, b = a[:count], b[:count]
    borders = tiles.borders(video.inspect(ours).parameters, a.shape[2], a.shape[1])
    for name in METRICS if metrics is None else metrics:
        try:
            scores[name] = METRICS[name].measure(a, b, lpips_weights)
        except UsageError as error:
            if name in required:
                raise
            missing[name] = str(error)
    return Comparison(
        ours=ours, reference=reference, width=a.shape[2], height=a.shape[1], num_frames=count, first=first,
        lengths=lengths, scores=scores, missing=missing, faults=faults, lag=lag, windows=joined,
        tiles=tiles.measure(a, borders, b) if borders else None,
    )  # fmt: skip


def beyond(scores: Mapping[str, Score], at_least: Mapping[str, float], at_most: Mapping[str, float]) -> list[str]:
    """A sentence for each bar that is not met."""
    values = {name: score.value for name, score in scores.items()}
    # written so that NaN meets no bar
    under = [f"{m} is {values[m]:.4g}, under {bar:g}" for m, bar in at_least.items() if not values[m] >= bar]
    return under + [f"{m} is {values[m]:.4g}, over {bar:g}" for m, bar in at_most.items() if not values[m] <= bar]


def load(path: Path) -> Frames:
    """All frames of a video file or a folder of PNGs, (F, H, W, 3)."""
    frames = list(video.read(path))
    if len(shapes := {frame.shape for frame in frames}) > 1:
        sizes = " and ".join(sorted(f"{width}x{height}" for height, width, _ in shapes))
        raise BadInput(f"{path} holds frames of {sizes}: a video has one size.")
    return np.stack(frames)


def _alignment(a: Frames, b: Frames) -> tuple[tuple[int, int], int]:
    """Where to begin in each, and by how many frames another beginning would fit much better (videos of one length)."""
    small, other = _thumbnails(a), _thumbnails(b)
    if len(a) != len(b):
        shorter, longer = sorted((small, other), key=len)
        errors = [_error(shorter, longer[start:]) for start in range(len(longer) - len(shorter) + 1)]
        start = int(np.argmin(errors))
        return ((start, 0) if len(a) > len(b) else (0, start)), 0
    shifts = [s for s in range(-MOST_SHIFT, MOST_SHIFT + 1) if abs(s) < len(a) / 2]
    errors = [_error(small[max(0, -s) :], other[max(0, s) :]) for s in shifts]
    best = int(np.argmin(errors))
    return (0, 0), shifts[best] if errors[best] < errors[shifts.index(0)] / 2 else 0


def _windows(path: Path, frames: Frames, missing: dict[str, str]) -> Windows | None:
    if not (spans := windows.spans(video.inspect(path).parameters, len(frames))):
        return None
    try:
        return windows.measure(frames, spans)
    except UsageError as error:
        missing["windows"] = str(error)
        return None


def _thumbnails(frames: Frames) -> npt.NDArray[np.float64]:
    rows, columns = (max(1, side // THUMBNAIL_PX) for side in frames.shape[1:3])
    grey: npt.NDArray[np.float64] = frames[:, ::rows, ::columns].mean(-1)
    return grey


def _error(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    count = min(len(one), len(other))
    return float(np.square(one[:count] - other[:count]).mean())


def _mean(values: Sequence[float], **detail: float | str) -> Score:
    return Score(value=float(np.mean(values)), per_frame=tuple(map(float, values)), detail=detail)


def _psnr(a: Frames, b: Frames, _: Path | None) -> Score:
    values = fidelity.psnr(a, b)
    return Score(value=fidelity.overall_psnr(values), per_frame=tuple(values), detail={"worst": min(values)})


def _ssim(a: Frames, b: Frames, _: Path | None) -> Score:
    values = fidelity.ssim(a, b)
    return _mean(values, worst=min(values))


def _ms_ssim(a: Frames, b: Frames, _: Path | None) -> Score:
    from framefit.quality.vmaf import ms_ssim

    values = ms_ssim(a, b)
    return _mean(values, worst=min(values))


def _vmaf(a: Frames, b: Frames, _: Path | None) -> Score:
    from framefit.quality.vmaf import vmaf

    values = vmaf(a, b)
    return _mean(values, worst=min(values))


def _lpips(a: Frames, b: Frames, weights: Path | None) -> Score:
    from framefit.quality.lpips import lpips

    if weights is None:
        raise UsageError("LPIPS needs a network's weights: name them with --lpips-weights FILE (docs/quality.md).")
    values = lpips(a, b, weights)
    return _mean(values, worst=max(values))


def _motion(a: Frames, b: Frames, _: Path | None) -> Score:
    ours, theirs = motion(a), motion(b)
    turned = abs((ours.direction_degrees - theirs.direction_degrees + 180) % 360 - 180)
    # what moves less stands still, and of two that stand still neither moves more
    floor = max(theirs.mean_px, STILL_PX)
    ratio = max(ours.mean_px, STILL_PX) / floor
    detail: dict[str, float | str] = {"ours_px": ours.mean_px, "reference_px": theirs.mean_px, "turned_degrees": turned}
    per_frame = tuple(px / floor for px in ours.magnitude_px)
    return Score(value=ratio, per_frame=per_frame, first=1, detail=detail)


def _flicker(a: Frames, b: Frames, _: Path | None) -> Score:
    ours, theirs = stability.flicker(a), stability.flicker(b)
    value, other = (float(np.mean(v)) if v else 0.0 for v in (ours, theirs))
    return Score(value=value, per_frame=tuple(ours), first=1, detail={"reference": other})


def _drift(a: Frames, b: Frames, _: Path | None) -> Score:
    ours, theirs = stability.drift(a), stability.drift(b)
    return Score(value=max(ours), per_frame=tuple(ours), detail={"reference": max(theirs)})


def _seam(a: Frames, b: Frames, _: Path | None) -> Score:
    found = stability.seam(a, b)
    return Score(value=found.ratio, detail={"axis": found.axis, "at_px": found.at_px})


METRICS: Mapping[str, Metric] = {
    "psnr": Metric(measure=_psnr, better="higher", unit="dB", says="squared error; 100 stands for equal"),
    "ssim": Metric(measure=_ssim, better="higher", unit="", says="structure, of 1"),
    "ms_ssim": Metric(measure=_ms_ssim, better="higher", unit="", says="structure at five scales, of 1"),
    "vmaf": Metric(measure=_vmaf, better="higher", unit="", says="as viewers judge, of 100"),
    "lpips": Metric(measure=_lpips, better="lower", unit="", says="distance in a network's features"),
    "motion": Metric(measure=_motion, better="one", unit="", says="motion of ours over the reference's"),
    "flicker": Metric(measure=_flicker, better="lower", unit="levels", says="brightness that jumps, of ours"),
    "drift": Metric(measure=_drift, better="lower", unit="dE", says="most that the mean colour of ours goes off"),
    "seam": Metric(measure=_seam, better="lower", unit="", says="strongest line in the difference, 1 is none"),
}
