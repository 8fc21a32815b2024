"""Photos into the range of the models, and decoded tensors into frames."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from framefit.errors import NotFinite

__all__ = ["blank", "placed", "to_frames", "to_tensor"]


def to_tensor(photo: Image.Image) -> torch.Tensor:
    """RGB photo -> fp32 (1, 3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.asarray(photo, dtype=np.float32) / 255.0)
    return (2.0 * pixels.permute(2, 0, 1) - 1.0).unsqueeze(0).contiguous()


def blank(frame: torch.Tensor) -> bool:
    """Whether it is one value repeated, which takes no memory."""
    return all(stride == 0 for size, stride in zip(frame.shape, frame.stride(), strict=True) if size > 1)


def placed(frames: Sequence[torch.Tensor], device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """The same frames there; what is blank takes no memory there either."""
    return [
        frame[(slice(0, 1),) * frame.ndim].to(device, dtype).expand_as(frame)
        if blank(frame)
        else frame.to(device, dtype)
        for frame in frames
    ]


def to_frames(video: torch.Tensor) -> torch.Tensor:
    """(1, 3, F, H, W) in [-1, 1] -> uint8 (F, H, W, 3) on the host.

    Raises:
        NotFinite: the decoder produced NaN or infinity, which would show as black.
    """
    if not bool(video.isfinite().all()):
        raise NotFinite(f"the VAE produced NaN or infinity in {str(video.dtype).removeprefix('torch.')}.")
    frames = (video[0].float() * 0.5 + 0.5).clamp(0, 1)
    return (frames * 255).round().to(torch.uint8).permute(1, 2, 3, 0).cpu()
