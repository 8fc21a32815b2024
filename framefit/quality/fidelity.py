"""Pixel for pixel: PSNR and SSIM of two videos, frame by frame, as scikit-image computes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from framefit.errors import UsageError

__all__ = ["EQUAL_DB", "Frames", "psnr", "ssim"]

Frames = npt.NDArray[np.uint8]

EQUAL_DB = 100.0
"""Stands for the PSNR of equal frames, which is infinite."""
WINDOW_PX = 11
"""Side of SSIM's window."""


def psnr(ours: Frames, reference: Frames) -> list[float]:
    """Of each frame, in dB."""
    errors = (np.mean(np.square(a.astype(np.float64) - b)) for a, b in zip(ours, reference, strict=True))
    return [min(EQUAL_DB, 10 * np.log10(255**2 / error)) if error else EQUAL_DB for error in errors]


def ssim(ours: Frames, reference: Frames) -> list[float]:
    """Of each frame, mean of the three colours. Source: Wang et al. 2004, with its Gaussian window."""
    try:
        from skimage import metrics
    except ImportError:
        raise UsageError("SSIM needs scikit-image: pip install 'framefit[quality]'.") from None
    similarity: Any = metrics.structural_similarity
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return [
        float(similarity(a, b, channel_axis=-1, data_range=255, **settings))
        for a, b in zip(ours, reference, strict=True)
    ]
