"""A comparison to look at: the metrics frame by frame as a picture, the two videos beside each other as a video."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np

from framefit import video
from framefit.errors import BadOutput, UsageError
from framefit.quality.compare import METRICS, Comparison, load

__all__ = ["plot", "side_by_side"]


def plot(comparison: Comparison, file: Path, *, overwrite: bool = False) -> None:
    """A panel for each metric that has figures by frame, as PNG.

    Raises:
        BadOutput: the file exists, or is no PNG.
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("a plot needs matplotlib: pip install 'framefit[quality]'.") from None
    if file.suffix.lower() != ".png":
        raise BadOutput(f"{file.name} is no PNG: end the plot's name in .png.")
    if file.exists() and not overwrite:
        raise BadOutput(f"{file} exists: add --overwrite to replace it, or choose another name.")
    shown = {name: score for name, score in comparison.scores.items() if score.per_frame}
    if not shown:
        raise UsageError("none of these metrics has figures by frame to plot: add psnr, ssim or vmaf.")
    figure = Figure(figsize=(8, 1.7 * len(shown) + 0.6), layout="constrained")
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, score) in zip(panels, shown.items(), strict=True):
        frames = range(score.first, score.first + len(score.per_frame))
        axes.plot(frames, score.per_frame, marker=".", linewidth=1.5)
        axes.set_ylabel(f"{name} {METRICS[name].unit}".strip())
        axes.set_title(f"{METRICS[name].says}: {score.value:.4g}", fontsize=10, loc="left")
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("frame")
    figure.suptitle(f"{comparison.ours.name} against {comparison.reference.name}", fontsize=11)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def side_by_side(comparison: Comparison, file: Path, *, overwrite: bool = False) -> None:
    """Ours on the left, the reference on the right, as far as they were compared."""
    left, right = load(comparison.ours), load(comparison.reference)
    pairs = zip(left[comparison.first[0] :], right[comparison.first[1] :], strict=False)
    frames = (np.concatenate(pair, axis=1) for pair in islice(pairs, comparison.num_frames))
    made = video.Video(
        frames=frames, num_frames=comparison.num_frames, width=2 * comparison.width, height=comparison.height,
        fps=video.inspect(comparison.reference).fps or video.inspect(comparison.ours).fps or 8,
    )  # fmt: skip
    sources = {"compared": [str(comparison.ours), str(comparison.reference)]}
    video.write(made, file, parameters=sources, overwrite=overwrite)
