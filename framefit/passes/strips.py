"""A convolution over some frames, strip after strip of their rows: its input is put together, but never whole.

The frames may lie apart in memory, so that those that are remembered are the very ones that were computed. cuDNN's
copies of its input and output are as small as the strips are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

__all__ = ["STRIP_BYTES", "convolved"]

STRIP_BYTES = 2**27
"""Of a strip's input: rows enough to fill a card's kernels."""


def convolved(convolution: nn.Conv3d, frames: Sequence[torch.Tensor | None], padding: tuple[int, int]) -> torch.Tensor:
    """One frame (1, C', 1, H', W') of as many frames (1, C, 1, H, W) as the convolution looks over at once.

    Args:
        frames: None stands for one of zeros.
        padding: of rows and columns, on both sides.
    """
    like = next(frame for frame in frames if frame is not None)
    rows, columns = like.shape[3:]
    (_, tall, wide), (_, down, across) = convolution.kernel_size, convolution.stride
    height = (rows + 2 * padding[0] - tall) // down + 1
    width = (columns + 2 * padding[1] - wide) // across + 1
    out = like.new_empty(1, convolution.out_channels, 1, height, width)
    row_bytes = len(frames) * like.nbytes // rows
    step = max(1, STRIP_BYTES // row_bytes // down)
    for begin in range(0, height, step):
        end = min(begin + step, height)
        top, bottom = begin * down - padding[0], (end - 1) * down - padding[0] + tall
        strip = _strip(frames, like, max(top, 0), min(bottom, rows))
        if top < 0 or bottom > rows:
            strip = functional.pad(strip, (0, 0, max(-top, 0), max(bottom - rows, 0)))
        out[..., begin:end, :] = functional.conv3d(
            strip, convolution.weight, convolution.bias, convolution.stride, (0, 0, padding[1])
        )
    return out


def _strip(frames: Sequence[torch.Tensor | None], like: torch.Tensor, top: int, bottom: int) -> torch.Tensor:
    """(1, C, F, rows, W)."""
    cut = [frame if frame is None else frame[..., top:bottom, :] for frame in frames]
    zeros = like.new_zeros(()).expand_as(like[..., top:bottom, :])
    return torch.cat([zeros if each is None else each for each in cut], dim=2)
