"""How far an output is from stock's on the same inputs."""

from __future__ import annotations

import math

import torch

__all__ = ["compare"]


def compare(output: torch.Tensor, reference: torch.Tensor) -> dict[str, float | None]:
    """relative_l2 and max_abs; for uint8 frames psnr_db too, None where they are equal.

    Args:
        output, reference: predictions (1, C, F, H, W), or frames (F, H, W, 3) in uint8, whose max_abs is in levels.

    Raises:
        ValueError: they differ in shape.
    """
    if output.shape != reference.shape:
        raise ValueError(f"the output has shape {tuple(output.shape)}, and stock's has {tuple(reference.shape)}")
    difference = output.float() - reference.float()
    squares = float(difference.square().sum(dtype=torch.float64))
    total = float(reference.float().square().sum(dtype=torch.float64))
    quality: dict[str, float | None] = {
        "relative_l2": math.sqrt(squares / total) if total else math.inf if squares else 0.0,
        "max_abs": float(difference.abs().max()),
    }
    if output.dtype == torch.uint8:
        quality["psnr_db"] = 10 * math.log10(255**2 * output.numel() / squares) if squares else None
    return quality
