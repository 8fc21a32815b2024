"""Pixel for pixel: PSNR and SSIM of two videos, frame by frame, as scikit-image computes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from framefit.errors import UsageError

__all__ = ["EQUAL_DB", "Frames", "overall_psnr", "psnr", "ssim"]

Frames = npt.NDArray[np.uint8]

EQUAL_DB = 100.0
"""Stands for the PSNR of equal frames, which is infinite."""
WINDOW_PX = 11
"""Side of SSIM's window."""


def psnr(ours: Frames, reference: Frames) -> list[float]:
    """Of each frame, in dB."""
    return [decibels(np.mean(np.square(a.astype(np.float64) - b))) for a, b in zip(ours, reference, strict=True)]


def overall_psnr(per_frame: Sequence[float]) -> float:
    """Of a video, from its frames' in dB: of their mean squared error, so that good frames do not hide others."""
    return decibels(np.mean([0.0 if db >= EQUAL_DB else 255**2 / 10 ** (db / 10) for db in per_frame]))


def decibels(error: float | np.floating[Any]) -> float:
    """PSNR of a mean squared error of 8-bit levels."""
    return min(EQUAL_DB, float(10 * np.log10(255**2 / error))) if error else EQUAL_DB


def ssim(ours: Frames, reference: Frames) -> list[float]:
    """Of each frame, mean of the three colours. Source: Wang et al. 2004, with its Gaussian window."""
    try:
        from skimage import metrics
    except ImportError:
        raise UsageError("SSIM needs scikit-image: pip install 'framefit[quality]'.") from None
    if min(ours.shape[1:3]) < WINDOW_PX:
        raise UsageError(f"SSIM needs sides of {WINDOW_PX} px at least, and the videos are smaller.")
    similarity: Any = metrics.structural_similarity
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return [
        float(similarity(a, b, channel_axis=-1, data_range=255, **settings))
        for a, b in zip(ours, reference, strict=True)
    ]
