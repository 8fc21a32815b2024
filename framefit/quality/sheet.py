"""A comparison to look at: the metrics frame by frame as a picture, the two videos beside each other as a video."""

from __future__ import annotations

import importlib.util
import secrets
from itertools import islice
from pathlib import Path

import numpy as np

from framefit import video
from framefit.errors import BadOutput, UsageError
from framefit.quality.compare import METRICS, Comparison, load

__all__ = ["check_plot", "check_side_by_side", "plot", "side_by_side"]


def plot(comparison: Comparison, file: Path, *, overwrite: bool = False) -> None:
    """A panel for each metric that has figures by frame, as PNG.

    Raises:
        BadOutput: the file exists, or is no PNG.
        UsageError: matplotlib is not installed.
    """
    check_plot(file, overwrite=overwrite)
    from matplotlib.figure import Figure

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
    title = f"{comparison.ours.name} against {comparison.reference.name}"
    figure.suptitle(title.replace("$", r"\$"), fontsize=11)  # a dollar would begin a formula
    partial = file.with_name(f".framefit-{secrets.token_hex(8)}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(partial, dpi=100, format="png")
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise BadOutput(f"{file} cannot be written ({error.strerror}): choose another place.") from None


def check_plot(file: Path, *, overwrite: bool) -> None:
    """Raises now what `plot` would raise after the metrics are measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("a plot needs matplotlib: pip install 'framefit[quality]'.")
    if file.suffix.lower() != ".png" or file.is_dir():
        raise BadOutput(f"{file.name} is no PNG: end the plot's name in .png.")
    if file.exists() and not overwrite:
        raise BadOutput(f"{file} exists: add --overwrite to replace it, or choose another name.")


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


def check_side_by_side(ours: Path, file: Path, *, overwrite: bool) -> None:
    """Raises now what `side_by_side` would raise after the metrics are measured."""
    seen = video.inspect(ours)
    video.check_output(
        file, overwrite=overwrite, width=2 * seen.width, height=seen.height, num_frames=max(1, seen.num_frames)
    )  # fmt: skip
